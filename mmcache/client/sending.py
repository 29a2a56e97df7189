"""The frames of a put on their way: through the ring or the socket, hashed as they are copied or just before they go;
or left where they lie, in memory that the server maps, hashed while it copies them.

A header that was made before its tensors were hashed is followed, at the frame's end, by what stands for their
checksums (`ReserveRequest.sums_last`). So every byte is read from memory once.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np

from mmcache.client.protocol import Conversation, Flow, Send, Work
from mmcache.frame import SUM_NBYTES, align_up, sum_of_sums
from mmcache.hashing import Hasher
from mmcache.transport.base import LENT_PIECE, SHORT_NBYTES, SLICE_NBYTES, SLOT_NOTE, WriteSlots


class Outgoing(NamedTuple):
    """A frame to be sent: its header, the tensors' bytes, and the size of it all."""

    header: bytes
    payloads: list[memoryview]
    alignment: int
    nbytes: int


class Way(Protocol):
    """Where the bytes go."""

    def begin(self, nbytes: int) -> Flow[None]:
        """A frame of so many bytes comes next."""

    def write(self, data: bytes | memoryview, hasher: Hasher | None) -> Flow[None]:
        """Send these next; what is hashed is what is sent."""

    def end(self) -> Flow[None]:
        """There are no more."""


def way_of(conversation: Conversation, ring: WriteSlots | None) -> Way:
    """Through the ring, where there is one."""
    return RingWay(conversation, ring) if ring is not None else SocketWay()


def send_frames(frames: Iterable[Flow[Outgoing]], hasher: Hasher | None, way: Way) -> Flow[None]:
    """Send the frames' bytes. With a `hasher` their headers lack the checksums, and what stands for those follows."""
    for making in frames:
        header, payloads, alignment, nbytes = yield from making
        yield from way.begin(nbytes + (SUM_NBYTES if hasher is not None else 0))
        yield from way.write(header, None)
        end, sums = len(header), []
        for payload in payloads:
            gap = align_up(end, alignment) - end
            if gap:
                yield from way.write(bytes(gap), None)
            yield from way.write(payload, hasher)
            if hasher is not None:
                sums.append(hasher.take())
            end += gap + len(payload)
        if hasher is not None:
            yield from way.write(sum_of_sums(sums), None)
    yield from way.end()


class SocketWay:
    """Over the connection, about SLICE_NBYTES at a time: long tensors cut, short frames together."""

    def __init__(self) -> None:
        self._waiting: list[bytes | memoryview] = []
        self._nbytes = 0

    def begin(self, nbytes: int) -> Flow[None]:
        """See Way."""
        yield from ()

    def write(self, data: bytes | memoryview, hasher: Hasher | None) -> Flow[None]:
        """See Way."""
        for start in range(0, len(data), SLICE_NBYTES):
            part = memoryview(data)[start : start + SLICE_NBYTES]
            if hasher is not None:
                yield Work(partial(hasher.update, part), len(part))
            self._waiting.append(part)
            self._nbytes += len(part)
            if self._nbytes >= SLICE_NBYTES:
                yield from self.end()

    def end(self) -> Flow[None]:
        """See Way."""
        if self._waiting:
            yield Send(self._waiting)
            self._waiting, self._nbytes = [], 0


class Lent(Protocol):
    """Memory that a server has mapped."""

    def place(self, data: bytes | memoryview) -> tuple[int, int, int]:
        """(number, offset, size) of bytes that lie in it."""


class LentWay:
    """By records that say where the tensors lie. Short bytes between them go along.

    A tensor's record goes before its hash is taken: the server copies it meanwhile.
    """

    def __init__(self, lent: Lent) -> None:
        self._lent = lent
        self._short = bytearray()

    def begin(self, nbytes: int) -> Flow[None]:
        """See Way."""
        yield from ()

    def write(self, data: bytes | memoryview, hasher: Hasher | None) -> Flow[None]:
        """See Way."""
        if hasher is not None and len(data):
            yield Send((LENT_PIECE.pack(len(self._short), *self._lent.place(data)), bytes(self._short)))
            self._short.clear()
            yield Work(partial(hasher.update, memoryview(data)), len(data))
            return
        for start in range(0, len(data), SLICE_NBYTES):
            if len(self._short) >= SLICE_NBYTES:
                yield from self.end()
            self._short += data[start : start + SLICE_NBYTES]

    def end(self) -> Flow[None]:
        """See Way."""
        if self._short:
            yield Send((LENT_PIECE.pack(len(self._short), 0, 0, 0), bytes(self._short)))
            self._short.clear()


class RingWay:
    """Through the slots of a ring; before a slot is used again, this waits for the server's note that it is done."""

    def __init__(self, conversation: Conversation, ring: WriteSlots) -> None:
        self._conversation, self._ring = conversation, ring
        self._number = self._filled = 0
        self._slot = ring.slot(0).data

    def begin(self, nbytes: int) -> Flow[None]:
        """See Way. A frame that fits a slot is not cut: the server puts it into place in one go."""
        if self._filled and self._ring.slot_nbytes - self._filled < nbytes <= self._ring.slot_nbytes:
            yield from self._full()

    def write(self, data: bytes | memoryview, hasher: Hasher | None) -> Flow[None]:
        """See Way."""
        view, ring, start = memoryview(data), self._ring, 0
        while start < len(view):
            if not self._filled and self._number >= ring.slots:
                yield from self._conversation.slot_done()
            source = view[start : start + ring.slot_nbytes - self._filled]
            target = self._slot[self._filled : self._filled + len(source)]
            if hasher is not None:
                yield Work(partial(hasher.copy, source, target, False), len(source))
            elif len(source) <= SHORT_NBYTES:
                target[:] = source
            else:
                yield Work(partial(_copy, source, target), len(source))
            start += len(source)
            self._filled += len(source)
            if self._filled == ring.slot_nbytes:
                yield from self._full()

    def _full(self) -> Flow[None]:
        yield Send((SLOT_NOTE.pack(self._filled),))
        self._number, self._filled = self._number + 1, 0
        self._slot = self._ring.slot(self._number).data

    def end(self) -> Flow[None]:
        """See Way."""
        if self._filled:
            yield from self._full()
        for _ in range(min(self._number, self._ring.slots)):
            yield from self._conversation.slot_done()


def _copy(source: memoryview, target: memoryview) -> None:
    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))
