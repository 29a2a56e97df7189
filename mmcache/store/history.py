"""Why keys are not stored: the last so many that left or were refused, and when. What `explain` answers from.

A ring of names with a reason each; a key noted again moves to its newest end, and when the ring is full the oldest is
forgotten. PURE: no clock, no randomness, no I/O.
"""

from __future__ import annotations

from typing import NamedTuple

from mmcache.store.columns import Memory, column8, column_float, heap
from mmcache.store.policy import LRU
from mmcache.store.table import NO_ROW, Table
from mmcache.why import Why


class Reason(NamedTuple):
    """`since`: monotonic seconds, None where it is not known. `detail`: for REFUSED, which refusal; for
    HERE, how many children."""

    why: Why
    since: float | None = None
    detail: int = 0


NEVER = Reason(Why.NEVER_STORED)


class History:
    """The last `max_keys` names (tenant and key) that left or were refused: 74 bytes each."""

    def __init__(self, max_keys: int, seed: int, memory: Memory = heap) -> None:
        self._table = Table(max_keys, seed, memory)
        self._order = LRU(max_keys, memory)
        self._why = column8(memory, max_keys)
        self._detail = column8(memory, max_keys)
        self._since = column_float(memory, max_keys)

    def note(self, name: bytes, why: Why, now: float, detail: int = 0) -> None:
        """This became of a name (`tenant_prefix` + key) just now; what was noted of it before is forgotten."""
        prefix, key = name[:4], name[4:]
        table, order = self._table, self._order
        row = table.find(prefix, key)
        if row != NO_ROW:
            order.touch(row)
        else:
            if not table.available():
                oldest = order.victim(lambda row: True, 1)
                assert oldest is not None
                order.remove(oldest)
                table.remove(oldest)
            row = table.add(prefix, key)
            order.insert(row)
        self._why[row], self._detail[row], self._since[row] = why, detail, now

    def find(self, prefix: bytes, key: bytes) -> Reason:
        """What was noted last of this key, or NEVER."""
        row = self._table.find(prefix, key)
        return NEVER if row == NO_ROW else Reason(Why(self._why[row]), self._since[row], self._detail[row])
