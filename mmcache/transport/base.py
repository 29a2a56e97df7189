"""The framing every socket speaks and the outcomes a read can have. Pure: no sockets here.

A message is a 24-byte prelude, a protobuf body, and, for some operations, payload bytes that follow raw. The prelude:
magic "MMC1", version of this framing (1 byte), operation (1), flags (2, zero), request id (4), body bytes (4), payload
bytes (8), all little-endian. A reply repeats the request's operation and id.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain
from struct import Struct
from typing import Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mmcache.errors import ProtocolError
from mmcache.hashing import STEP_NBYTES

MAGIC: Final = b"MMC1"
PRELUDE_VERSION: Final = 1
PROTOCOL: Final = 2
OLDEST_PROTOCOL: Final = 1  # N talks to N-1
PRELUDE_NBYTES: Final = 24
MAX_BODY_NBYTES: Final = 16 << 20  # what a client accepts; servers set their own, smaller limit
SLICE_NBYTES: Final = STEP_NBYTES
RING_SLOTS: Final = 4
RING_SLOT_NBYTES: Final = (1 << 20) + (64 << 10)  # a MiB with a header: few values of up to that are cut
MAX_RING_NBYTES: Final = 64 << 20
SLOT_NOTE: Final = Struct("<I")  # client to server: this many bytes are in the next slot
SLOT_DONE: Final = b"\x01"  # server to client: the oldest slot is free again
LENT_MEMORIES: Final = 16  # that a connection may have at a time
LENT_PIECE: Final = Struct("<IIQQ")  # bytes that follow; then out of lent memory: its number, offset, size
MAX_FOLLOWING_NBYTES: Final = 1 << 20

SHORT_NBYTES: Final = 32 << 10
PIECE_NBYTES: Final = 1 << 20
Buffer = bytes | bytearray | memoryview

_PRELUDE = Struct("<4sBBHIIQ")
assert _PRELUDE.size == PRELUDE_NBYTES
_HTTP_STARTS: Final = (b"GET ", b"POST", b"HEAD", b"PUT ", b"DELE", b"OPTI", b"PATC", b"CONN", b"TRAC", b"PRI ")


class Op(enum.IntEnum):
    """What a message asks or answers. ERROR answers any request; PUT_DONE ends the payload of a RESERVE."""

    ERROR = 0
    JOIN = 1
    DECLARE = 2
    CONTAINS = 3
    ACQUIRE = 4
    RESERVE = 5
    PUT_DONE = 6
    FINISH = 7
    DELETE = 8
    RECHECK = 9
    INSPECT = 10
    STAT = 11
    MODE = 12
    REMOVE = 13
    LIST = 14
    AUDIT = 15
    EXPLAIN = 16
    RECENT = 17
    LEND = 18


_OP_BY_CODE: Final = {int(op): op for op in Op}


class Prelude(NamedTuple):
    """The parsed start of a message."""

    op: Op
    request_id: int
    body_nbytes: int
    payload_nbytes: int


def pack_prelude(op: Op, request_id: int, body_nbytes: int, payload_nbytes: int = 0) -> bytes:
    """The 24 bytes before a body."""
    return _PRELUDE.pack(MAGIC, PRELUDE_VERSION, op, 0, request_id, body_nbytes, payload_nbytes)


def parse_prelude(data: bytes | memoryview, max_body_nbytes: int) -> Prelude:
    """Check and read 24 bytes. Raises ProtocolError, which names the cause and what to do."""
    magic, version, code, flags, request_id, body_nbytes, payload_nbytes = _PRELUDE.unpack(data)
    if magic != MAGIC:
        if magic in _HTTP_STARTS:
            raise ProtocolError("this port speaks mmcache's framed protocol, not HTTP; use mmcache://HOST:PORT")
        raise ProtocolError(f"not an mmcache message (it starts with {magic!r}); is this an mmcache port?")
    if version != PRELUDE_VERSION:
        raise ProtocolError(
            f"message version {version} is not supported; this release reads {PRELUDE_VERSION}: upgrade it"
        )
    op = _OP_BY_CODE.get(code)
    if op is None or flags:
        raise ProtocolError(f"operation {code} with flags {flags} is unknown to this release")
    if body_nbytes > max_body_nbytes:
        raise ProtocolError(f"a body of {body_nbytes} bytes is over the limit of {max_body_nbytes}; send fewer keys")
    return Prelude(op, request_id, body_nbytes, payload_nbytes)


def is_http(data: bytes) -> bool:
    """True if these first bytes are an HTTP request's."""
    return data[:4] in _HTTP_STARTS


def pieces_of(buffers: Sequence[Buffer]) -> Iterator[Buffer]:
    """What to send in one call each, in order: short buffers joined, long ones cut.

    One large scatter-gather call would save system calls, but was measured at half the speed on loopback: the
    receiver then lags behind by more than the CPU caches hold.
    """
    short = bytearray()
    for buffer in buffers:
        if len(buffer) <= SHORT_NBYTES:
            short += buffer
            if len(short) < SHORT_NBYTES:
                continue
        if short:
            yield short
            short = bytearray()
        if len(buffer) <= SHORT_NBYTES:
            continue
        view = memoryview(buffer).cast("B")
        step = len(view) if len(view) <= 2 * PIECE_NBYTES else PIECE_NBYTES
        for start in range(0, len(view), step):
            yield view[start : start + step]
    if short:
        yield short


class Found(NamedTuple):
    """Where one present frame lies in its shard's arena, and the header checksum its bytes must match."""

    offset: int
    nbytes: int
    header_nbytes: int
    header_sum: bytes


PLACE: Final = Struct("<QQI16s")  # a Found in an Acquire reply


def pack_places(found: Sequence[tuple[int, int, int, bytes]]) -> bytes:
    """An Acquire reply's column of places."""
    return _places(len(found)).pack(*chain.from_iterable(found))


@lru_cache(maxsize=64)
def _places(count: int) -> Struct:
    return Struct("<" + count * PLACE.format.removeprefix("<"))


class WriteSlots(Protocol):
    """A ring of write slots; slot numbers count up for ever and wrap."""

    slots: int
    slot_nbytes: int

    def slot(self, number: int) -> NDArray[np.uint8]:
        """The bytes of a slot."""


class Outcome(enum.StrEnum):
    """What became of one key. The first three are good; every other is a miss or a skipped save, with a reason."""

    HIT = "hit"
    STORED = "stored"
    PRESENT = "present"
    MISS = "miss"
    CORRUPT = "corrupt"
    MISMATCH = "mismatch"
    REFUSED = "refused"
    UNAVAILABLE = "unavailable"


class Result(NamedTuple):
    """One key's outcome and, where it is not plain, the reason. True when the value is there (hit, stored, present)."""

    outcome: Outcome
    reason: str = ""

    def __bool__(self) -> bool:
        outcome = self[0]
        return outcome is _HIT or outcome is _STORED or outcome is _PRESENT


_HIT, _STORED, _PRESENT = Outcome.HIT, Outcome.STORED, Outcome.PRESENT
HIT: Final = Result(Outcome.HIT)
MISS: Final = Result(Outcome.MISS)
