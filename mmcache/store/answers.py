"""What the index answers with: values, never exceptions, for everything that ordinary traffic can meet."""

from __future__ import annotations

from enum import Enum, IntEnum
from typing import Final, NamedTuple


class Modality(IntEnum):
    """What a value was computed from, where its writer said so. The numbers are those of the schema's Modality."""

    UNKNOWN = 0
    TEXT = 1
    IMAGE = 2
    VIDEO = 3
    AUDIO = 4


UNIT_BITS: Final = 29  # of a row's `media`; the modality lies above
MAX_UNITS: Final = (1 << UNIT_BITS) - 1


def pack_media(modality: int, units: int) -> int:
    """A modality and how much of it (pixels, frames, milliseconds) as one 32-bit number; larger amounts are cut."""
    return modality << UNIT_BITS | min(units, MAX_UNITS)


class Found(NamedTuple):
    """Where an entry lies: its frame's offset and size in bytes, the size of the frame's header, and its checksum."""

    offset: int
    nbytes: int
    header_nbytes: int
    header_sum: bytes


class Unpinned(Enum):
    """Why a stored key was not pinned."""

    LATER = "more than may be pinned at once: ask again for this key and those after it, when this lease has ended"


class Reserved(NamedTuple):
    """Where the frame may be written, in bytes from the start of the arena."""

    offset: int


class Refusal(Enum):
    """Why a value was not stored. The value says it in words. The last three are the shard's, which sees the bytes."""

    PRESENT = "the key is stored already"
    BUSY = "another writer is storing this key"
    FULL = "all memory this tenant may have is leased, being written, or below such an entry; retry when leases end"
    AGAIN = "one call evicts only so much and it was not enough; call again to go on"
    TOO_LARGE = "the value is larger than the whole store, or than what one tenant may have in hand"
    NO_ENTRIES = "the store holds its maximum number of entries and none can leave now; retry when leases end"
    BAD_FRAME = "the bytes are not the frame that was announced; pack it again"
    EXPIRED = "its time to live passed before it was stored"
    QUOTA = "the tenant, or the namespace, has all the bytes it may have"
    STOPPED = "the operator has stopped writes"
    LOST = "the reservation expired before the value was committed; put it again"


class IndexStats(NamedTuple):
    """A snapshot. Bytes are of extents (rounded up to the alignment): `held_bytes` of those leased or reserved.
    From `evictions` on: counts since the start."""

    entries: int
    ghosts: int
    bytes_used: int
    bytes_capacity: int
    largest_free_bytes: int
    held_bytes: int
    leases: int
    reservations: int
    evictions: int
    expired_entries: int
    expired_leases: int
    expired_reservations: int
    refused_pins: int
