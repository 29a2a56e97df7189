"""The framed conversation without sockets: preludes, and the client's real flows joined to a peer's scripted bytes."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import pytest
import xxhash
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from mmcache.client.protocol import Conversation, Flow, Recv, RecvInto, Send, put_result
from mmcache.client.sending import Outgoing, send_frames, way_of
from mmcache.errors import ProtocolError, RequestRefused
from mmcache.frame import FrameMeta, Kind, TensorSpec, frame_segments, pack_header
from mmcache.frame_view import Frame
from mmcache.pb import cache_pb2 as pb
from mmcache.tensors import named_tensors
from mmcache.transport.base import (
    MAX_BODY_NBYTES,
    PLACE,
    PRELUDE_NBYTES,
    SLICE_NBYTES,
    Found,
    Op,
    Outcome,
    Prelude,
    pack_prelude,
    parse_prelude,
)

T = TypeVar("T")
KEY = b"k" * 32


class Starved(Exception):
    """The flow waits for more bytes than the peer sent."""


def drive(flow: Flow[T], script: bytes = b"") -> tuple[T, bytes, bytes]:
    """Run a flow against a peer that sends `script`: its result, what it sent, and what it left unread."""
    sent = bytearray()
    answer: Any = None
    while True:
        try:
            effect = flow.send(answer)
        except StopIteration as end:
            return end.value, bytes(sent), script
        answer = None
        if isinstance(effect, Send):
            sent += b"".join(effect.buffers)
            continue
        assert isinstance(effect, (Recv, RecvInto))
        nbytes = effect.nbytes if isinstance(effect, Recv) else sum(map(len, effect.views))
        assert nbytes <= MAX_BODY_NBYTES
        if nbytes > len(script):
            raise Starved
        data, script = script[:nbytes], script[nbytes:]
        if isinstance(effect, Recv):
            answer = data
        else:
            for view in effect.views:
                view[:], data = data[: len(view)], data[len(view) :]


def reply(op: Op, message: Message | bytes, payload: bytes = b"", *, request_id: int = 1) -> bytes:
    body = message if isinstance(message, bytes) else message.SerializeToString()
    return pack_prelude(op, request_id, len(body), len(payload)) + body + payload


def request_of(sent: bytes, op: Op, message: Message) -> tuple[Prelude, bytes]:
    """The prelude of what a client sent, its body read into `message`, and what it sent behind."""
    prelude = parse_prelude(sent[:PRELUDE_NBYTES], MAX_BODY_NBYTES)
    end = PRELUDE_NBYTES + prelude.body_nbytes
    assert prelude.op == op
    message.ParseFromString(sent[PRELUDE_NBYTES:end])
    return prelude, sent[end:]


# ------------------------------------------------------------------------------------------ a request and its reply
def call(script: bytes) -> Any:
    return drive(Conversation().call(Op.CONTAINS, pb.ContainsRequest(keys=KEY), pb.ContainsReply()), script)


def test_a_call() -> None:
    answer, sent, left = call(reply(Op.CONTAINS, pb.ContainsReply(present=b"\1")))
    assert (answer.present, left) == (b"\1", b"")
    asked = pb.ContainsRequest()
    prelude, behind = request_of(sent, Op.CONTAINS, asked)
    assert (prelude.request_id, prelude.payload_nbytes, asked.keys, behind) == (1, 0, KEY, b"")


def test_request_ids_count_up_and_never_are_0() -> None:
    conversation = Conversation()
    ids = [parse_prelude(conversation.request(Op.STAT, pb.StatRequest()), 0).request_id for _ in range(3)]
    assert ids == [1, 2, 3]
    conversation._request_id = 2**32 - 1
    assert parse_prelude(conversation.request(Op.STAT, pb.StatRequest()), 0).request_id == 1


PRESENT = pb.ContainsReply(present=b"\1")


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (reply(Op.CONTAINS, PRESENT, request_id=2), "answered CONTAINS to CONTAINS"),
        (reply(Op.CONTAINS, PRESENT, request_id=0), "answered CONTAINS to CONTAINS"),
        (reply(Op.DELETE, PRESENT), "answered DELETE to CONTAINS"),
        (reply(Op.CONTAINS, PRESENT, b"x"), "unexpected payload"),
        (reply(Op.CONTAINS, b"\xff\xff\xff"), "cannot be read"),
        (reply(Op.CONTAINS, b"\x0a\x7fabc"), "cannot be read"),
        (reply(Op.ERROR, b"\x12\x7fabc"), "cannot be read"),
        (reply(Op.ERROR, pb.ErrorReply(message="no"), b"x"), "answered ERROR to CONTAINS"),
        (pack_prelude(Op.CONTAINS, 1, MAX_BODY_NBYTES + 1), "over the limit"),
        (b"HTTP/1.1 400 Bad Request\r\n", "mmcache port"),
    ],
)
def test_a_malformed_reply_is_a_protocol_error(script: bytes, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        call(script)


@pytest.mark.parametrize("request_id", [1, 0])
def test_a_refusal_carries_the_servers_words(request_id: int) -> None:
    with pytest.raises(RequestRefused, match="1 of 0 keys"):
        call(reply(Op.ERROR, pb.ErrorReply(message="1 of 0 keys"), request_id=request_id))
    with pytest.raises(RequestRefused, match="without a reason"):
        call(reply(Op.ERROR, b"", request_id=request_id))


def test_a_reply_that_stops_is_waited_for() -> None:
    script = reply(Op.CONTAINS, PRESENT)
    for length in range(len(script)):
        with pytest.raises(Starved):
            call(script[:length])


def test_a_lease_goes_back_without_an_answer_or_with_the_next_acquire() -> None:
    conversation = Conversation()
    _, sent, _ = drive(conversation.release_quietly(2**64 - 1))
    finish = pb.FinishRequest()
    assert request_of(sent, Op.FINISH, finish)[0].request_id == 0
    assert finish.lease_id == 2**64 - 1
    conversation.rider = 77
    for request_id, released in ((1, 77), (2, 0)):
        script = reply(Op.ACQUIRE, acquired([pb.MISS], []), request_id=request_id)
        _, sent, _ = drive(conversation.acquire(KEY), script)
        acquire = pb.AcquireRequest()
        request_of(sent, Op.ACQUIRE, acquire)
        assert acquire.release == released


# ------------------------------------------------------------------------------------------ acquire
def frame_of(*payloads: bytes, key: bytes = KEY, alignment: int = 64) -> bytes:
    specs = [TensorSpec(str(i), "uint8", (len(payload),)) for i, payload in enumerate(payloads)]
    meta = FrameMeta(Kind.KV, key, b"n" * 32, bytes(32), key, 0, 1, 0, "test/1")
    header = pack_header(meta, specs, [xxhash.xxh3_128_digest(payload) for payload in payloads], alignment)
    return b"".join(frame_segments(header, [memoryview(payload) for payload in payloads], alignment))


def place_of(frame: bytes, offset: int = 0) -> Found:
    header = Frame.parse(frame).header
    return Found(offset, len(frame), header.header_nbytes, header.checksum)


def acquired(status: Sequence[int], places: Sequence[Found], lease_id: int = 0) -> pb.AcquireReply:
    return pb.AcquireReply(lease_id=lease_id, status=bytes(status), places=b"".join(PLACE.pack(*at) for at in places))


FRAME = frame_of(b"first", b"second")
PLACE_OF_FRAME = place_of(FRAME, 4096)


def test_acquire_reads_places_leases_and_what_to_ask_again() -> None:
    status = [pb.MISS, pb.FOUND, pb.LATER, pb.MISS, pb.LATER]
    script = reply(Op.ACQUIRE, acquired(status, [PLACE_OF_FRAME], lease_id=2**64 - 1))
    answer, sent, left = drive(Conversation().acquire(KEY * 5, prefix=False), script)
    assert answer == (2**64 - 1, [None, PLACE_OF_FRAME, None, None, None], 2)
    assert left == b""
    asked = pb.AcquireRequest()
    request_of(sent, Op.ACQUIRE, asked)
    assert (asked.keys, asked.prefix, asked.inline) == (KEY * 5, False, False)


def test_acquire_of_a_prefix_may_be_answered_short() -> None:
    script = reply(Op.ACQUIRE, acquired([pb.FOUND, pb.MISS], [PLACE_OF_FRAME], lease_id=3))
    answer, _, _ = drive(Conversation().acquire(KEY * 4, prefix=True), script)
    assert answer.entries == [PLACE_OF_FRAME, None, None, None]


def test_a_status_of_a_later_release_is_a_miss() -> None:
    answer, _, _ = drive(Conversation().acquire(KEY), reply(Op.ACQUIRE, acquired([200], [])))
    assert answer.entries == [None]


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (acquired([pb.FOUND] * 3, [PLACE_OF_FRAME] * 3), "3 statuses for 2 keys"),
        (acquired([pb.FOUND], [PLACE_OF_FRAME]), "1 statuses for 2 keys"),
        (acquired([pb.FOUND, pb.FOUND], [PLACE_OF_FRAME]), "36 bytes of places for 2"),
        (acquired([pb.FOUND, pb.MISS], [PLACE_OF_FRAME] * 2), "72 bytes of places for 1"),
        (acquired([pb.MISS, pb.MISS], [PLACE_OF_FRAME]), "36 bytes of places for 0"),
        (pb.AcquireReply(status=b"\1\0", places=bytes(35)), "35 bytes of places"),
        (acquired([1, 0], [PLACE_OF_FRAME._replace(header_nbytes=0)]), "impossible size"),
        (acquired([1, 0], [PLACE_OF_FRAME._replace(header_nbytes=len(FRAME) + 1)]), "impossible size"),
        (acquired([1, 0], [Found(0, 2**40, 2**32 - 1, bytes(16))]), "impossible size"),
        (acquired([1, 0], [Found(0, 2**63, 256, bytes(16))]), "impossible size"),
        (acquired([1, 0], [Found(0, 0, 0, bytes(16))]), "impossible size"),
    ],
)
def test_an_acquire_reply_that_does_not_fit_its_request(message: Message, why: str) -> None:
    for inline in (False, True):
        with pytest.raises(ProtocolError, match=why):
            drive(Conversation().acquire(KEY * 2, inline=inline), reply(Op.ACQUIRE, message))


def test_places_that_nothing_pins_are_not_read() -> None:
    with pytest.raises(ProtocolError, match="pinned none"):
        drive(Conversation().acquire(KEY), reply(Op.ACQUIRE, acquired([pb.FOUND], [PLACE_OF_FRAME], lease_id=0)))


def test_payload_that_is_not_what_the_reply_lists() -> None:
    message = acquired([pb.FOUND], [PLACE_OF_FRAME])
    for payload in (b"", FRAME[:-1], FRAME + b"x"):
        with pytest.raises(ProtocolError, match="payload bytes announced"):
            drive(Conversation().acquire(KEY, inline=True), reply(Op.ACQUIRE, message, payload))
    with pytest.raises(ProtocolError, match="payload bytes announced"):
        drive(Conversation().acquire(KEY), reply(Op.ACQUIRE, message, FRAME))


# ------------------------------------------------------------------------------------------ inline frames
def receive(frame: bytes, found: Found, *, verify: bool = True, key: bytes = KEY) -> tuple[Any, list[bytearray]]:
    """One inline frame, received between others' bytes: the Result, which must leave the stream in step."""
    buffers = [bytearray(5), bytearray(6)]
    flow = Conversation().receive_frame(found, key, named_tensors(buffers, writable=True), verify)
    result, sent, left = drive(flow, frame + b"next message")
    assert (sent, left) == (b"", b"next message")
    return result, buffers


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("alignment", [64, 4096])
def test_an_inline_frame_lands_in_its_destinations(verify: bool, alignment: int) -> None:
    frame = frame_of(b"first", b"second", alignment=alignment)
    result, buffers = receive(frame, place_of(frame), verify=verify)
    assert result.outcome is Outcome.HIT
    assert buffers == [b"first", b"second"]


def test_every_flipped_bit_of_an_inline_frame_is_corrupt_and_stays_in_step() -> None:
    frame = bytearray(FRAME)
    found = place_of(FRAME)
    for position in range(len(frame)):
        frame[position] ^= 1 << position % 8
        assert receive(bytes(frame), found)[0].outcome is Outcome.CORRUPT, position
        frame[position] = FRAME[position]


@given(st.binary(min_size=1, max_size=700), st.integers(0, 900))
def test_any_inline_bytes_are_corrupt_and_stay_in_step(data: bytes, start: int) -> None:
    frame = bytearray(FRAME)
    end = min(start + len(data), len(frame))
    frame[start:end] = data[: max(0, end - start)]
    outcome = receive(bytes(frame), place_of(FRAME))[0].outcome
    assert outcome is (Outcome.HIT if frame == FRAME else Outcome.CORRUPT)
    unverified = receive(bytes(frame), place_of(FRAME), verify=False)[0].outcome
    assert unverified in (Outcome.HIT, Outcome.CORRUPT, Outcome.MISMATCH)


def test_a_sound_frame_of_another_key_or_other_bytes_is_corrupt() -> None:
    other = frame_of(b"first", b"second", key=b"o" * 32)
    assert receive(other, place_of(other))[0] == (Outcome.CORRUPT, "the frame belongs to another key")
    changed = frame_of(b"FIRST", b"second")
    assert receive(changed, place_of(FRAME))[0].outcome is Outcome.CORRUPT  # sound, but not what Acquire found
    assert receive(changed, place_of(changed))[0].outcome is Outcome.HIT
    longer = place_of(FRAME)._replace(nbytes=len(FRAME) + 64)
    assert receive(FRAME + bytes(64), longer)[0].outcome is Outcome.CORRUPT
    tiny = Found(0, 5, 5, bytes(16))
    assert receive(b"tiny!", tiny)[0].outcome is Outcome.CORRUPT


def test_destinations_that_do_not_fit_are_a_mismatch_and_stay_in_step() -> None:
    frame = frame_of(bytes(3 * SLICE_NBYTES + 5))
    result, buffers = receive(frame, place_of(frame))
    assert result == (Outcome.MISMATCH, "the entry holds 1 tensors, 2 destinations were given")
    assert buffers == [bytes(5), bytes(6)]


def test_large_tensors_land_in_slices() -> None:
    payload = np.random.default_rng(0).bytes(2 * SLICE_NBYTES + 1)
    frame = frame_of(payload)
    target = bytearray(len(payload))
    flow = Conversation().receive_frame(place_of(frame), KEY, named_tensors(target, writable=True), True)
    assert drive(flow, frame)[0].outcome is Outcome.HIT
    assert target == payload


def test_a_whole_frame_is_received_as_it_is() -> None:
    received, sent, left = drive(Conversation().receive_whole(PLACE_OF_FRAME), FRAME + b"x")
    assert (bytes(received), sent, left) == (FRAME, b"", b"x")


def test_a_whole_frame_that_no_memory_can_hold_is_a_protocol_error() -> None:
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 39, limits[1]))
    try:
        with pytest.raises(ProtocolError, match="1099511627776 bytes does not fit"):
            drive(Conversation().receive_whole(Found(0, 1 << 40, 256, bytes(16))))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


# ------------------------------------------------------------------------------------------ reserve and put
def reserve(conversation: Conversation, sizes: list[int]) -> Flow[bytes]:
    count = len(sizes)
    return conversation.reserve(KEY * count, bytes(32 * count), sizes, bytes([Kind.KV]) * count, False)


ONE = Outgoing(b"x", [], 1, 1)


def put(conversation: Conversation, frames: list[Outgoing]) -> Flow[bytes]:
    return conversation.put_done(send_frames(map(made, frames), None, way_of(conversation, None)), len(frames))


def made(frame: Outgoing) -> Flow[Outgoing]:
    yield from ()
    return frame


def test_reserve_and_raw_frames() -> None:
    conversation = Conversation()
    script = reply(Op.RESERVE, pb.ReserveReply(status=bytes([pb.WANTED, pb.PRESENT, pb.FULL])))
    status, sent, _ = drive(reserve(conversation, [10, 20, 30]), script)
    assert list(status) == [pb.WANTED, pb.PRESENT, pb.FULL]
    asked = pb.ReserveRequest()
    request_of(sent, Op.RESERVE, asked)
    assert (asked.keys, asked.parents, list(asked.frame_nbytes)) == (KEY * 3, bytes(96), [10, 20, 30])
    assert (asked.kinds, asked.ring) == (b"\1\1\1", False)
    frames = [Outgoing(b"head", [memoryview(b"tail")], 1, 8), Outgoing(b"more", [], 1, 4)]
    script = reply(Op.PUT_DONE, pb.PutReply(status=bytes([pb.STORED, pb.LOST])))
    status, sent, left = drive(put(conversation, frames), script)
    assert (list(status), sent, left) == ([pb.STORED, pb.LOST], b"headtailmore", b"")


@pytest.mark.parametrize("status", [[], [pb.WANTED], [pb.WANTED] * 3, [pb.STORED, pb.PRESENT]])
def test_a_reserve_reply_that_does_not_fit_its_request(status: list[int]) -> None:
    with pytest.raises(ProtocolError):
        drive(reserve(Conversation(), [1, 2]), reply(Op.RESERVE, pb.ReserveReply(status=bytes(status))))


def test_a_put_reply_that_does_not_fit_what_was_sent() -> None:
    good = pb.PutReply(status=bytes([pb.STORED]))
    for script in (
        reply(Op.PUT_DONE, pb.PutReply(status=b""), request_id=0),
        reply(Op.PUT_DONE, pb.PutReply(status=b"\2\2"), request_id=0),
        reply(Op.PUT_DONE, good, b"payload", request_id=0),
        reply(Op.PUT_DONE, good, request_id=5),
        reply(Op.RESERVE, good, request_id=0),
    ):
        with pytest.raises(ProtocolError):
            drive(put(Conversation(), [ONE]), script)
    drive(put(Conversation(), [ONE]), reply(Op.PUT_DONE, good, request_id=0))


@pytest.mark.parametrize("status", [value.number for value in pb.PutStatus.DESCRIPTOR.values if value.name != "WANTED"])
def test_every_put_status_has_a_result(status: int) -> None:
    result = put_result(status)
    assert bool(result) == (status in (pb.STORED, pb.PRESENT))
    assert bool(result.reason) != bool(result)


@pytest.mark.parametrize("status", [pb.WANTED, 13, 255])
def test_a_put_status_that_means_nothing_is_a_protocol_error(status: int) -> None:
    with pytest.raises(ProtocolError, match=f"status {status}"):
        put_result(status)


# ------------------------------------------------------------------------------------------ any bytes at all
@given(st.binary(max_size=300), st.sampled_from([Op.ACQUIRE, Op.RESERVE, Op.PUT_DONE, Op.ERROR]), st.booleans())
def test_any_reply_body_is_understood_or_a_protocol_error(body: bytes, op: Op, inline: bool) -> None:
    flows: list[Flow[Any]] = [
        Conversation().acquire(KEY * 2, inline=inline),
        reserve(Conversation(), [1, 2]),
        put(Conversation(), [ONE]),
    ]
    for flow in flows:
        for script in (body, reply(op, body), reply(op, body, request_id=0)):
            try:
                drive(flow, script)
            except (ProtocolError, RequestRefused, Starved):
                break
