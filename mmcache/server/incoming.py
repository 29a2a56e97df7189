"""The bytes of the frames that a client stores, as they come: through the socket, its ring, or memory it lent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from mmcache.errors import ProtocolError
from mmcache.store.landing import Landing
from mmcache.transport.base import LENT_PIECE, MAX_FOLLOWING_NBYTES, SLICE_NBYTES, SLOT_DONE, SLOT_NOTE
from mmcache.transport.lent import LentView
from mmcache.transport.shm import RingView
from mmcache.transport.tcp import Channel

_DROPPED: Final = memoryview(bytearray(SLICE_NBYTES))  # where goes what nobody keeps; never read
Deadline = Callable[[], float]
"""The latest instant at which the next of what was promised may come."""


class SocketStream:
    """Frames that follow a Reserve raw. All must be there by `deadline`."""

    def __init__(self, channel: Channel, next_by: Deadline, deadline: float) -> None:
        self._channel, self._next_by, self._deadline = channel, next_by, deadline

    def land(self, landing: Landing) -> None:
        """Put what has arrived of a frame into place; waits for the first of it."""
        self._channel.want(min(landing.left_nbytes, SLICE_NBYTES))
        self._channel.wait_readable(min(self._deadline, self._next_by()))
        landing.land(SLICE_NBYTES, self._channel.recv_available_into, _DROPPED)

    def take(self, nbytes: int) -> bytes:
        """The next few bytes."""
        self._channel.want(1)
        return self._channel.recv(nbytes, min(self._deadline, self._next_by()))

    def end(self) -> None:
        """All has come that was announced."""
        self._channel.want(1)


class _Parts:
    """Frames that come as parts which lie in memory somewhere. Subclasses have the next one ready."""

    _part = memoryview(b"")  # what is left of the part at hand

    def land(self, landing: Landing) -> None:
        """Put what a part has of a frame into place; waits for the part."""
        self._ready()
        part = self._part[: landing.left_nbytes]
        self._part = self._part[len(part) :]
        landing.land_from(part)

    def take(self, nbytes: int) -> bytes:
        """The next few bytes, a copy."""
        taken = b""
        while len(taken) < nbytes:
            self._ready()
            part = self._part[: nbytes - len(taken)]
            self._part = self._part[len(part) :]
            taken += part
        return taken

    def _ready(self) -> None:
        """Have something at hand."""
        raise NotImplementedError


class RingStream(_Parts):
    """Frames that come through slots of a ring; a note over the socket tells of each slot, and another gives it back.

    Raises ProtocolError for notes that break the rules.
    """

    def __init__(self, channel: Channel, ring: RingView, next_by: Deadline, deadline: float) -> None:
        self._channel, self._ring, self._next_by, self._deadline = channel, ring, next_by, deadline
        self._number = -1

    def end(self) -> None:
        """Give the last slot back."""
        if len(self._part):
            raise ProtocolError("more bytes came through the ring than the frames hold")
        self._channel.send([SLOT_DONE], self._next_by())

    def _ready(self) -> None:
        if len(self._part):
            return
        if self._number >= 0:
            self._channel.send([SLOT_DONE], self._next_by())
        (filled,) = SLOT_NOTE.unpack(self._channel.recv(SLOT_NOTE.size, min(self._deadline, self._next_by())))
        ring = self._ring
        if not 0 < filled <= ring.slot_nbytes:
            raise ProtocolError(f"a slot note of {filled} bytes for slots of {ring.slot_nbytes}")
        self._number += 1
        self._part = ring.slot(self._number).data[:filled]


class LentStream(_Parts):
    """Frames that lie in memory which the client lent, but for a few bytes between, which come through the socket.

    Raises ProtocolError for records that break the rules.
    """

    def __init__(self, channel: Channel, lent: Mapping[int, LentView], next_by: Deadline, deadline: float) -> None:
        self._channel, self._lent, self._next_by, self._deadline = channel, lent, next_by, deadline
        self._then = self._part  # what comes after the part at hand
        self.lent_nbytes = 0

    def end(self) -> None:
        """All has come that was announced."""
        if len(self._part) or len(self._then):
            raise ProtocolError("more bytes came out of lent memory than the frames hold")

    def _ready(self) -> None:
        while not len(self._part):
            if len(self._then):
                self._part, self._then = self._then, self._part
                return
            by = min(self._deadline, self._next_by())
            following, number, offset, nbytes = LENT_PIECE.unpack(self._channel.recv(LENT_PIECE.size, by))
            if following > MAX_FOLLOWING_NBYTES or not following + nbytes:
                raise ProtocolError(f"a record of {following} bytes that follow and {nbytes} out of lent memory")
            if nbytes:
                memory = self._lent.get(number)
                if memory is None or offset + nbytes > len(memory.data):
                    raise ProtocolError(f"{nbytes} bytes at {offset} are not in lent memory {number}")
                self._then = memory.data[offset : offset + nbytes]
                self.lent_nbytes += nbytes
            if following:
                self._part = memoryview(self._channel.recv(following, by))
