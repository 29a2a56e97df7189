"""A put through the ring: the client's flow joined to a server that takes slots as late as it may."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mmcache.client.protocol import Conversation, Recv, Send
from mmcache.errors import ProtocolError
from mmcache.pb import cache_pb2 as pb
from mmcache.transport.base import SLOT_DONE, Op, pack_prelude


class Slots:
    """A ring in plain memory whose reader takes each slot when it is noted."""

    def __init__(self, slots: int, slot_nbytes: int) -> None:
        self.slots, self.slot_nbytes = slots, slot_nbytes
        self.data = np.zeros(slots * slot_nbytes, np.uint8)

    def slot(self, number: int) -> NDArray[np.uint8]:
        start = number % self.slots * self.slot_nbytes
        return self.data[start : start + self.slot_nbytes]


def put_through(ring: Slots, frames: list[list[bytes]], done: bytes = SLOT_DONE) -> tuple[bytes, list[int], bytes]:
    """Bytes the server takes out of the ring, the sizes in the notes, and the final statuses.

    The server is as slow as it may be: it takes a slot only when the client waits for it.
    """
    flow = Conversation().send_frames(frames, len(frames), ring)
    taken = bytearray()
    notes: list[int] = []
    pending: list[int] = []
    answer: Any = None
    body = pb.PutReply(status=bytes([pb.STORED]) * len(frames)).SerializeToString()
    script = pack_prelude(Op.PUT_DONE, 0, len(body)) + body
    while True:
        try:
            effect = flow.send(answer)
        except StopIteration as end:
            assert pending == []
            return bytes(taken), notes, end.value
        answer = None
        if isinstance(effect, Send):
            pending.append(int.from_bytes(b"".join(effect.buffers), "little"))
            assert len(pending) <= ring.slots
            continue
        assert isinstance(effect, Recv)
        if effect.nbytes == 1:
            nbytes = pending.pop(0)
            taken += ring.slot(len(notes))[:nbytes].tobytes()
            notes.append(nbytes)
            answer = done
        else:
            answer, script = script[: effect.nbytes], script[effect.nbytes :]


@given(st.lists(st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=3), max_size=6), st.integers(1, 4))
def test_frames_go_through_the_ring_in_order(frames: list[list[bytes]], slots: int) -> None:
    ring = Slots(slots, 16)
    taken, notes, status = put_through(ring, frames)
    stream = b"".join(part for frame in frames for part in frame)
    assert taken == stream
    assert notes == [16] * (len(stream) // 16) + [len(stream) % 16] * (len(stream) % 16 > 0)
    assert list(status) == [pb.STORED] * len(frames)


def test_another_byte_than_done_breaks_the_conversation() -> None:
    with pytest.raises(ProtocolError, match="ring slot"):
        put_through(Slots(2, 16), [[bytes(100)]], done=b"\x02")
