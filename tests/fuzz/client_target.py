"""Any bytes from a server: a client's flows end in ProtocolError, RequestRefused or normally, and calls never raise.

The first byte of an input picks what is asked, the second how; the rest is what the server says. The flows of
client/protocol.py are run without sockets; then whole clients, with and without shared memory, over a socket pair:
behind a sound Join, or with a Join that is the input's too.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from random import Random
from typing import Any, Final

import numpy as np
from google.protobuf.message import Message

from mmcache.client.blocking import Client
from mmcache.client.protocol import Conversation, Flow, Recv, Send, put_result
from mmcache.client.sending import Outgoing, send_frames, way_of
from mmcache.config import ClientConfig
from mmcache.errors import FrameError, LeaseLost, ProtocolError, RequestRefused, TransportError
from mmcache.frame import SUM_NBYTES, SUM_OFFSET
from mmcache.frame_view import Frame
from mmcache.hashing import PlainHasher
from mmcache.pb import cache_pb2 as pb
from mmcache.store.arena import Arena
from mmcache.tensors import named_tensors
from mmcache.transport.base import MAX_BODY_NBYTES, PLACE, PROTOCOL, Op, Result, pack_prelude
from mmcache.transport.shm import Ring
from mmcache.transport.tcp import Channel
from tests.fuzz.bed import ANSWER_S, Complaints, Descriptors, Mutate, in_time, resident_below
from tests.fuzz.edits import REPLIES, REQUESTS, Piece, edit_stream, pack
from tests.fuzz.server_target import KEYS, KNOWN, VALUE, frame_of

NBYTES: Final = 300
ASKED: Final = KEYS[:3]
COLUMN: Final = b"".join(ASKED.digests)
CALLS: Final = (Op.DECLARE, Op.CONTAINS, Op.FINISH, Op.DELETE, Op.RECHECK, Op.INSPECT, Op.STAT)
ROOM_NBYTES: Final = 32 << 20  # resident, for a client, its ring and its links
ARENA_NBYTES: Final = 1 << 20
_Reply = tuple[Op, Message, bytes]  # and the payload
LIMITS: Final = pb.Limits(batch_keys=64, inline_nbytes=1 << 20)


class _Starved(Exception):
    """The flow waits for more than the server said."""


def drive(flow: Flow[Any], script: bytearray) -> Any:
    """Run a flow against what the server says; takes from `script` what it reads. Raises _Starved."""
    answer: Any = None
    while True:
        try:
            effect: Any = flow.send(answer)
        except StopIteration as end:
            return end.value
        answer = None
        if isinstance(effect, Send):
            continue
        if hasattr(effect, "call"):  # work that a driver may take off its thread
            answer = effect.call()
            continue
        nbytes = effect.nbytes if isinstance(effect, Recv) else sum(map(len, effect.views))
        assert not isinstance(effect, Recv) or nbytes <= MAX_BODY_NBYTES, f"{nbytes} bytes wanted in one piece"
        if nbytes > len(script):
            raise _Starved
        data = bytes(script[:nbytes])
        del script[:nbytes]
        if isinstance(effect, Recv):
            answer = data
            continue
        for view in effect.views:
            view[:], data = data[: len(view)], data[len(view) :]


# ------------------------------------------------------------------------------------------- flows
def _calls(how: int, script: bytearray) -> None:
    op = CALLS[how % len(CALLS)]
    drive(Conversation().call(op, REQUESTS[op](), REPLIES[op]()), script)


def _acquire(how: int, script: bytearray) -> None:
    """Inline; every found frame is received, into destinations or whole."""
    conversation = Conversation()
    ask = conversation.acquire(COLUMN, prefix=bool(how & 1), inline=not how & 2, max_nbytes=3000 if how & 4 else 0)
    acquired = drive(ask, script)
    assert len(acquired.entries) == len(ASKED)
    for key, found in zip(ASKED.digests, acquired.entries, strict=True):
        if found is None or how & 2:
            continue
        if how & 8:
            drive(conversation.receive_whole(found), script)
            continue
        buffer = np.full(NBYTES, 0xA5, np.uint8)
        result = drive(conversation.receive_frame(found, key, named_tensors(buffer, writable=True), True), script)
        assert isinstance(result, Result)


def _put(how: int, script: bytearray) -> None:
    conversation = Conversation()
    frames = [frame_of(position, NBYTES) for position in range(len(ASKED))]
    ring = _RING if how & 1 else None
    column, sizes = b"".join(ASKED.parents), list(map(len, frames))
    status = drive(conversation.reserve(COLUMN, column, sizes, b"\1" * len(ASKED), ring is not None), script)
    wanted = [frame for frame, code in zip(frames, status, strict=True) if code == pb.WANTED]
    if wanted:
        hasher = PlainHasher() if how & 2 else None
        sending = send_frames(map(_outgoing, wanted), hasher, way_of(conversation, ring))
        status = drive(conversation.put_done(sending, len(wanted)), script)
    for code in status:
        put_result(code)


def _outgoing(frame: bytes) -> Flow[Outgoing]:
    yield from ()
    return Outgoing(frame[:HEADER_NBYTES], [memoryview(frame)[HEADER_NBYTES:]], 64, len(frame))


HEADER_NBYTES: Final = 448
_RING: Final = Ring(2, 4096)
FLOWS: Final[tuple[Callable[[int, bytearray], None], ...]] = (_calls, _acquire, _put)


# ------------------------------------------------------------------------------------------- whole clients
def _look(client: Client) -> None:
    with contextlib.suppress(LeaseLost), client.acquire(ASKED) as leased:
        for frame in leased.frames:
            if isinstance(frame, Frame):
                with contextlib.suppress(FrameError):
                    frame.verify()


def _read(client: Client, verify: bool) -> None:
    buffers = [np.full(NBYTES, 0xA5, np.uint8) for _ in ASKED]
    results = client.get_into(ASKED, buffers, verify=verify)
    for result, buffer in zip(results, buffers, strict=True):
        assert not (verify and result) or np.array_equal(buffer, VALUE[:NBYTES]) or _vouched(buffer)


def _vouched(buffer: Any) -> bool:
    """Verified is what its checksums vouch for: a server that lies consistently is believed."""
    return not np.array_equal(buffer, np.full(NBYTES, 0xA5, np.uint8))


def _administer(call: Callable[[], Any]) -> None:
    with contextlib.suppress(TransportError):
        call()


METHODS: Final[tuple[Callable[[Client], None], ...]] = (
    lambda client: _read(client, True),
    lambda client: _read(client, False),
    lambda client: _check_all(client.put(ASKED, [VALUE[:NBYTES]] * len(ASKED))),
    lambda client: _check_count(client.match_prefix(ASKED)),
    lambda client: _check_count(client.pin_prefix(ASKED).count),
    lambda client: _check_all(client.contains(ASKED)),
    _look,
    lambda client: _administer(lambda: _check_all(client.delete(ASKED))),
    lambda client: _administer(client.stat),
    lambda client: _administer(lambda: client.inspect(ASKED.digests[0])),
)


def _check_all(answers: list[Any]) -> None:
    assert len(answers) == len(ASKED)


def _check_count(count: int) -> None:
    assert 0 <= count <= len(ASKED)


class ClientTarget:
    """See the top of this file."""

    max_nbytes = 16384

    def __init__(self) -> None:
        self._complaints = Complaints()
        self._arena = Arena(ARENA_NBYTES)
        for position in range(len(ASKED)):
            frame = frame_of(position, NBYTES)
            self._arena.view[4096 * position : 4096 * position + len(frame)] = frame
        self._descriptors = Descriptors()

    def seeds(self) -> list[bytes]:
        """For everything that can be asked, what a sound server says."""
        frames = [frame_of(position, NBYTES) for position in range(len(ASKED))]
        sums = [frame[SUM_OFFSET : SUM_OFFSET + SUM_NBYTES] for frame in frames]
        places = b"".join(
            PLACE.pack(4096 * position, len(frame), HEADER_NBYTES, sums[position])
            for position, frame in enumerate(frames)
        )
        found = bytes([pb.FOUND]) * len(ASKED)
        acquired = pb.AcquireReply(lease_id=0, status=found, places=places)
        leased = pb.AcquireReply(lease_id=9, status=found, places=places)
        flags = bytes([1, 0, 1])
        replies: dict[Op, Message] = {
            Op.DECLARE: pb.DeclareReply(),
            Op.CONTAINS: pb.ContainsReply(present=flags),
            Op.FINISH: pb.FinishReply(held=True),
            Op.DELETE: pb.DeleteReply(deleted=flags),
            Op.RECHECK: pb.RecheckReply(dropped=flags),
            Op.INSPECT: pb.InspectReply(
                found=True, header=frames[0][:HEADER_NBYTES], kind="kv", facts={"model": "fuzz"}
            ),
            Op.STAT: pb.StatReply(counters={"hits": 1}, server="fuzz", server_id=bytes(16), uptime_s=1),
        }
        inline: _Reply = (Op.ACQUIRE, acquired, b"".join(frames))
        wanted = (Op.RESERVE, pb.ReserveReply(status=bytes([pb.WANTED, pb.PRESENT, pb.WANTED])), b"")
        done = (Op.PUT_DONE, pb.PutReply(status=bytes([pb.STORED, pb.BAD_FRAME])), b"")
        in_ring = (*wanted[:2], b"\1")  # the two frames are in one slot
        refused = (Op.ERROR, pb.ErrorReply(code=pb.ErrorReply.LIMIT, message="no"), b"")
        each = {op: (op, reply, b"") for op, reply in replies.items()}
        finished = each[Op.FINISH]
        scripts: list[tuple[int, int, list[_Reply]]]
        scripts = [(0, how, [each[op]]) for how, op in enumerate(CALLS)] + [(0, 1, [refused])]
        scripts += [(1, how, [inline]) for how in (0, 4, 8)] + [(1, 2, [(Op.ACQUIRE, leased, b"")])]
        scripts += [(2, 0, [wanted, done]), (2, 1, [in_ring, done])]
        for shared in (0, 128):
            got = (Op.ACQUIRE, leased, b"") if shared else inline
            sent = in_ring if shared else wanted
            answers: list[list[_Reply]] = [
                [got, each[Op.RECHECK]],
                [got, finished],
                [each[Op.DECLARE], sent, done],
                [each[Op.CONTAINS]],
                [(Op.ACQUIRE, leased, b"")],
                [each[Op.CONTAINS]],
                [got, finished],
                [each[Op.DELETE]],
                [each[Op.STAT]],
                [each[Op.INSPECT]],
            ]
            scripts += [(len(FLOWS) + shared, how, script) for how, script in enumerate(answers)]
        seeds = [bytes([what, how]) + _script(replies) for what, how, replies in scripts]
        joins = [bytes([len(FLOWS) + 1 + shared, 5]) + join_reply(bool(shared)) for shared in (0, 128)]
        return seeds + [head + _script([each[Op.CONTAINS]]) for head in joins]

    def mutate(self, data: bytes, random: Random, blind: Mutate) -> bytes:
        """One reply changed, ids, lengths and often the announced payload right; or anything."""
        head, script = data[:2].ljust(2, b"\0"), data[2:]
        if random.random() < 0.15:
            return head + blind(script or b"\0")
        if random.random() < 0.05:
            head = bytes([random.randrange(256), random.randrange(256)])
        before, pieces = edit_stream(script, REPLIES, random, blind, KNOWN, self.max_nbytes)
        if random.random() < 0.7:
            joins = bool(pieces) and pieces[0].op == Op.JOIN  # that one is of a conversation of its own
            pieces = [_mended(piece, max(1, number + 1 - joins)) for number, piece in enumerate(pieces)]
        return head + pack(before, pieces)

    def check(self, data: bytes) -> None:
        """Say it to the flow, or the client, that the first bytes pick."""
        what, how = data[:2].ljust(2, b"\0")
        script = data[2:]
        with resident_below(ROOM_NBYTES):
            if what % 128 < len(FLOWS):
                with contextlib.suppress(ProtocolError, RequestRefused, _Starved):
                    FLOWS[what % 128](how, bytearray(script))
            else:
                shared = what >= 128
                said = script if what % 128 > len(FLOWS) else join_reply(shared) + script
                in_time(lambda: self._ask(how, said, shared=shared), "a call to a server that hung up")
        self._complaints.check()
        self._descriptors.check()

    def close(self) -> None:
        """Give the arena back."""
        self._arena.close()
        self._complaints.close()

    def _ask(self, how: int, script: bytes, *, shared: bool) -> bool:
        ours, theirs = socket.socketpair()
        if shared and script:
            socket.send_fds(theirs, [script[:1]], [self._arena.fd])
            script = script[1:]
        theirs.sendall(script)
        theirs.shutdown(socket.SHUT_WR)
        channels = [Channel(ours)]

        def dial() -> Channel:
            if not channels:
                raise TransportError("hung up")
            return channels.pop()

        config = ClientConfig(transport="shm" if shared else "tcp", deadline_s=5 * ANSWER_S)
        with contextlib.closing(theirs), Client(config, dial) as client:
            client.announces = False
            METHODS[how % len(METHODS)](client)
        return True


def join_reply(shared: bool) -> bytes:
    """A sound answer to Join."""
    reply = pb.JoinReply(protocol=PROTOCOL, alignment=64, lease_s=30, limits=LIMITS, server_id=bytes(16))
    reply.arena_nbytes = ARENA_NBYTES if shared else 0
    body = reply.SerializeToString()
    return pack_prelude(Op.JOIN, 1, len(body)) + body


def _script(replies: list[_Reply]) -> bytes:
    """What the server says, in one conversation."""
    pieces = [Piece(op, number + 1, reply.SerializeToString(), 0, rest) for number, (op, reply, rest) in
              enumerate(replies)]  # fmt: skip
    counted = []
    number = 0
    for piece in pieces:
        number += piece.op != Op.PUT_DONE  # it answers the Reserve again
        counted.append(_mended(piece, number))
    return pack(b"", counted)


def _mended(piece: Piece, request_id: int) -> Piece:
    """The reply with the id its request has, announcing the payload that it lists if it is that of an Acquire."""
    if piece.op != Op.ACQUIRE or not piece.rest:
        return piece._replace(request_id=request_id)
    reply = pb.AcquireReply()
    with contextlib.suppress(Exception):
        reply.ParseFromString(piece.body)
        places = list(PLACE.iter_unpack(reply.places))
        start = 0
        fixed = []
        for offset, nbytes, header_nbytes, _ in places:
            fixed.append(
                PLACE.pack(offset, nbytes, header_nbytes, piece.rest[start + 32 : start + 48].ljust(16, b"\0"))
            )
            start += nbytes
        reply.places = b"".join(fixed)
        total = min(sum(place[1] for place in places), (1 << 64) - 1)
        return piece._replace(request_id=request_id, body=reply.SerializeToString(), payload_nbytes=total)
    return piece._replace(request_id=request_id)
