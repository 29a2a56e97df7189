"""A put through the ring: the client's flow joined to a server that takes slots as late as it may."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mmcache.client.protocol import Conversation, Flow, Recv, Send, Work
from mmcache.client.sending import Outgoing, send_frames, way_of
from mmcache.errors import ProtocolError
from mmcache.hashing import Hasher, PlainHasher
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


def made(frame: list[bytes]) -> Flow[Outgoing]:
    yield from ()
    return Outgoing(frame[0], [memoryview(part) for part in frame[1:]], 1, sum(map(len, frame)))


def put_through(
    ring: Slots, frames: list[list[bytes]], done: bytes = SLOT_DONE, hasher: Hasher | None = None
) -> tuple[bytes, list[int], bytes]:
    """Bytes the server takes out of the ring, the sizes in the notes, and the final statuses.

    The server is as slow as it may be: it takes a slot only when the client waits for it.
    """
    conversation = Conversation()
    flow = conversation.put_done(send_frames(map(made, frames), hasher, way_of(conversation, ring)), len(frames))
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
        if isinstance(effect, Work):
            answer = effect.call()
            continue
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


FRAMES = st.lists(st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=3), max_size=6)


@given(FRAMES, st.integers(1, 4))
def test_frames_go_through_the_ring_in_order(frames: list[list[bytes]], slots: int) -> None:
    taken, notes, status = put_through(Slots(slots, 16), frames)
    assert taken == b"".join(part for frame in frames for part in frame)
    assert sum(notes) == len(taken)
    assert all(0 < note <= 16 for note in notes)
    assert list(status) == [pb.STORED] * len(frames)


@given(FRAMES, st.integers(1, 4))
def test_what_fits_a_slot_is_not_cut_and_no_slot_is_sent_that_had_room_for_what_came_next(
    frames: list[list[bytes]], slots: int
) -> None:
    _, notes, _ = put_through(Slots(slots, 16), frames)
    ends = list(accumulate(notes))
    starts = [end - note for end, note in zip(ends, notes, strict=True)]
    at = 0
    for frame in frames:
        nbytes = sum(map(len, frame))
        cut = [note for end, note in zip(ends, notes, strict=True) if at < end < at + nbytes]
        assert not cut or nbytes > 16
        assert cut == [16] * len(cut)
        if at in starts[1:]:
            before = notes[starts.index(at) - 1]
            assert before == 16 or 16 - before < nbytes <= 16
        at += nbytes


@given(FRAMES, st.integers(1, 4))
def test_what_stands_for_the_checksums_follows_each_frame(frames: list[list[bytes]], slots: int) -> None:
    taken, _, _ = put_through(Slots(slots, 16), frames, hasher=PlainHasher())
    wanted = b""
    for frame in frames:
        sums = b"".join(xxhash.xxh3_128_digest(part) for part in frame[1:])
        wanted += b"".join(frame) + xxhash.xxh3_128_digest(sums)
    assert taken == wanted


def test_another_byte_than_done_breaks_the_conversation() -> None:
    with pytest.raises(ProtocolError, match="ring slot"):
        put_through(Slots(2, 16), [[bytes(100)]], done=b"\x02")
