"""Why a key is, or is not, stored: the one list that the store, the wire and `explain` share. PURE."""

from __future__ import annotations

from enum import IntEnum


class Why(IntEnum):
    """What became of a key. The numbers are those of the schema's Why."""

    HERE = 0
    NEVER_STORED = 1
    EVICTED = 2
    TTL_PASSED = 3
    DELETED = 4
    REMOVED = 5
    BAD_BYTES = 6
    REFUSED = 7
    TIMED_OUT = 8
    BEING_WRITTEN = 9
    READS_STOPPED = 10
    OTHER_TENANT = 11
