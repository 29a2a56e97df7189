"""The bytes of the frames that a client stores, as they come: through the socket, or through its ring."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from mmcache.errors import ProtocolError
from mmcache.store.landing import Landing
from mmcache.transport.base import SLICE_NBYTES, SLOT_DONE, SLOT_NOTE
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


class RingStream:
    """Frames that come through slots of a ring; a note over the socket tells of each slot, and another gives it back.

    Raises ProtocolError for notes that break the rules.
    """

    def __init__(self, channel: Channel, ring: RingView, next_by: Deadline, deadline: float) -> None:
        self._channel, self._ring, self._next_by, self._deadline = channel, ring, next_by, deadline
        self._number = -1
        self._slot = memoryview(b"")  # what is left of the slot at hand

    def land(self, landing: Landing) -> None:
        """Put what a slot has of a frame into place; waits for the slot."""
        self._ready()
        part = self._slot[: landing.left_nbytes]
        self._slot = self._slot[len(part) :]
        landing.land_from(part)

    def take(self, nbytes: int) -> bytes:
        """The next few bytes, a copy."""
        taken = b""
        while len(taken) < nbytes:
            self._ready()
            part = self._slot[: nbytes - len(taken)]
            self._slot = self._slot[len(part) :]
            taken += part
        return taken

    def end(self) -> None:
        """Give the last slot back."""
        if len(self._slot):
            raise ProtocolError("more bytes came through the ring than the frames hold")
        self._channel.send([SLOT_DONE], self._next_by())

    def _ready(self) -> None:
        """Have something at hand."""
        if len(self._slot):
            return
        if self._number >= 0:
            self._channel.send([SLOT_DONE], self._next_by())
        (filled,) = SLOT_NOTE.unpack(self._channel.recv(SLOT_NOTE.size, min(self._deadline, self._next_by())))
        ring = self._ring
        if not 0 < filled <= ring.slot_nbytes:
            raise ProtocolError(f"a slot note of {filled} bytes for slots of {ring.slot_nbytes}")
        self._number += 1
        self._slot = ring.slot(self._number).data[:filled]
