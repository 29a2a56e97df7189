"""Any bytes to a server: its connection answers or ends within a second, and nobody else notices.

A real connection of a small real shard, over a socket pair or TCP. After each input the index agrees with itself,
nothing stays reserved or in flight, what was answered is well formed, every frame that was handed out is sound, and now
and then another client stores and reads back its own.
"""

from __future__ import annotations

import contextlib
import socket
import time
from random import Random
from typing import Final

import numpy as np
import xxhash
from google.protobuf.message import Message

from mmcache.client.blocking import Client
from mmcache.client.operations import Operations
from mmcache.config import ClientConfig, ServerConfig
from mmcache.frame import (
    SUM_NBYTES,
    FrameMeta,
    Kind,
    TensorSpec,
    frame_segments,
    pack_header,
    parse_header,
    sum_of_sums,
)
from mmcache.frame_view import Frame
from mmcache.keys import Namespace, opaque_key
from mmcache.keyset import Keys
from mmcache.pb import cache_pb2 as pb
from mmcache.server.serve import Server
from mmcache.transport.base import PLACE, PRELUDE_NBYTES, PROTOCOL, SLOT_DONE, SLOT_NOTE, Found, Op, parse_prelude
from mmcache.transport.shm import Ring
from mmcache.transport.tcp import Channel
from tests.fuzz.bed import ANSWER_S, Complaints, Descriptors, Mutate, in_time, resident_below
from tests.fuzz.edits import REPLIES, REQUESTS, Piece, edit_stream, pack, split

NAMESPACE: Final = Namespace(kind="kv", model="fuzz", dtype="uint8", layout="LBHNC", block_size=16)
KEYS: Final = Keys.of([opaque_key(NAMESPACE, f"{number}".encode()) for number in range(10)])
KNOWN: Final = [*KEYS.digests, bytes(32)]
VALUE: Final = np.arange(700, dtype=np.uint32).view(np.uint8)
RING_SLOTS: Final = 4
RING_SLOT_NBYTES: Final = 4096
INPUTS_A_CHECKUP: Final = 32
SETTLED_S: Final = 5 * ANSWER_S  # until what was asked in vain is over, on a machine that stands still meanwhile
ROOM_NBYTES: Final = 64 << 20  # resident, for one connection and all that it asks for, which this process holds too


def frame_of(position: int, nbytes: int = 300) -> bytes:
    """A frame for the key at this place, of some bytes of VALUE."""
    payload = VALUE.data[:nbytes]
    meta = FrameMeta(
        kind=Kind.KV,
        key=KEYS.digests[position],
        namespace=KEYS.namespaces[position],
        parent=KEYS.parents[position],
        home=KEYS.homes[position],
        chain_index=KEYS.indices[position],
        created_ms=1_700_000_000_000,
        expires_ms=0,
        writer="fuzz",
    )
    header = pack_header(meta, [TensorSpec("0", "uint8", (nbytes,))], [xxhash.xxh3_128_digest(payload)])
    return b"".join(frame_segments(header, [payload], 64))


def _piece(op: Op, message: Message, rest: bytes = b"") -> Piece:
    return Piece(op, 1, message.SerializeToString(), 0, rest)


def _reserve(*positions: int, ring: bool = False, rest: bytes | None = None, sums_last: bool = False) -> Piece:
    frames = [frame_of(position) for position in positions]
    sent = [frame + _sum_after(frame) if sums_last else frame for frame in frames]
    request = pb.ReserveRequest(
        keys=b"".join(KEYS.digests[position] for position in positions),
        parents=b"".join(KEYS.parents[position] for position in positions),
        frame_nbytes=list(map(len, frames)),
        kinds=bytes([Kind.KV] * len(positions)),
        ring=ring,
        sums_last=sums_last,
    )
    return _piece(Op.RESERVE, request, b"".join(sent) if rest is None else rest)


def _sum_after(frame: bytes) -> bytes:
    return sum_of_sums([tensor.checksum for tensor in parse_header(frame).tensors])


def _seeds() -> list[bytes]:
    join = _piece(Op.JOIN, pb.JoinRequest(protocol=PROTOCOL, client="fuzz"))
    with_ring = pb.JoinRequest(protocol=PROTOCOL, ring_slots=RING_SLOTS, ring_slot_nbytes=RING_SLOT_NBYTES)
    keys = b"".join(KEYS.digests[:3])
    note = SLOT_NOTE.pack(len(frame_of(0)))
    facts = pb.DeclareRequest(namespace=NAMESPACE.id, kind="kv", facts=NAMESPACE.id.facts)
    conversations = [
        [_piece(Op.STAT, pb.StatRequest()), _piece(Op.INSPECT, pb.InspectRequest(key=KEYS.digests[0]))],
        [_piece(Op.DECLARE, facts), _piece(Op.CONTAINS, pb.ContainsRequest(keys=keys, prefix=True))],
        [_piece(Op.ACQUIRE, pb.AcquireRequest(keys=keys)), _piece(Op.FINISH, pb.FinishRequest(lease_id=1))],
        [_piece(Op.ACQUIRE, pb.AcquireRequest(keys=keys, inline=True, max_nbytes=2000))],
        [_piece(Op.DELETE, pb.DeleteRequest(keys=keys)), _piece(Op.RECHECK, pb.RecheckRequest(keys=keys))],
        [_reserve(1), _piece(Op.INSPECT, pb.InspectRequest(key=KEYS.digests[1]))],
        [_reserve(2), _piece(Op.RECHECK, pb.RecheckRequest(keys=keys))],
        [_reserve(0), _piece(Op.ACQUIRE, pb.AcquireRequest(keys=KEYS.digests[0], inline=True))],
        [_reserve(6, sums_last=True), _piece(Op.ACQUIRE, pb.AcquireRequest(keys=KEYS.digests[6], inline=True))],
        [_reserve(7, 8, 9, sums_last=True), _reserve(7)],
        [_reserve(3, 4, 5), _piece(Op.DELETE, pb.DeleteRequest(keys=KEYS.digests[4])), _reserve(4)],
    ]
    conversations += [[_piece(op, kind())] for op, kind in REQUESTS.items()]
    streams = [pack(b"", [join, *pieces]) for pieces in conversations]
    streams.append(pack(b"", [_piece(Op.JOIN, with_ring), _reserve(0, ring=True, rest=note)]))
    note = SLOT_NOTE.pack(len(frame_of(0)) + SUM_NBYTES)
    streams.append(pack(b"", [_piece(Op.JOIN, with_ring), _reserve(0, ring=True, rest=note, sums_last=True)]))
    streams.append(pack(b"", [_piece(Op.JOIN, pb.JoinRequest(protocol=PROTOCOL, want_arena=True))]))
    return [*streams, b"GET / HTTP/1.1\r\nHost: fuzz\r\n\r\n"]


class ServerTarget:
    """See the top of this file."""

    max_nbytes = 16384

    def __init__(self) -> None:
        limits = ServerConfig(
            listen="127.0.0.1:0",
            unix_path="",
            memory_nbytes=1 << 20,
            max_entries=64,  # all of them are checked after each input
            max_batch_keys=64,
            max_body_nbytes=16384,
            lease_s=0.1,
            io_timeout_s=30 * ANSWER_S,  # so that a wait for what never comes is seen
        )
        self._complaints = Complaints()
        self._server = Server(limits)
        self._server.start()
        self._other = Client(ClientConfig(transport="tcp", deadline_s=5), self._dial)
        self._ring = Ring(RING_SLOTS, RING_SLOT_NBYTES)
        whole = frame_of(0) + _sum_after(frame_of(0))
        self._ring.data[: len(whole)] = np.frombuffer(whole, np.uint8)
        self._inputs = 0
        self._checkup()
        self._descriptors = Descriptors()

    def seeds(self) -> list[bytes]:
        """Whole conversations of every kind."""
        return _seeds()

    def mutate(self, data: bytes, random: Random, blind: Mutate) -> bytes:
        """One message of the conversation changed, its lengths right; or anything."""
        if random.random() < 0.15:
            return blind(data)
        return pack(*edit_stream(data, REQUESTS, random, blind, KNOWN, self.max_nbytes))

    def check(self, data: bytes) -> None:
        """Say it to the server, and see what became of it and of everything else."""
        answers: list[bytes] = []
        tries = 0

        def feed() -> bool:
            nonlocal tries
            tries += 1
            answers[:] = []
            return self._say(data, answers)

        with resident_below(ROOM_NBYTES):
            in_time(feed, "the end of a connection whose client had finished")
        self._complaints.check()
        read_answers(b"".join(answers))
        shard = self._server.shard
        with shard.lock:
            shard.index.check_integrity()
        # Whoever sees the end of a connection sees nothing claimed; of one that was given up, the end was not seen.
        nothing_claimed(self._server, 0.0 if tries == 1 else SETTLED_S)
        self._inputs += 1
        if self._inputs % INPUTS_A_CHECKUP == 0:
            self._checkup()
            self._descriptors.check()

    def close(self) -> None:
        """Stop the server."""
        self._other.close()
        self._server.stop()
        self._complaints.close()

    def _dial(self) -> Channel:
        ours, theirs = socket.socketpair()
        self._server.attach(theirs)
        return Channel(ours)

    def _connect(self, *, tcp: bool) -> socket.socket:
        if not tcp:
            return self._dial().sock
        assert self._server.address is not None
        return socket.create_connection(self._server.address, ANSWER_S)

    def _say(self, data: bytes, answers: list[bytes]) -> bool:
        """Send it all, then read to the end of the connection. False if that did not come."""
        _, pieces = split(data)
        with_ring = wants_ring(pieces)
        with contextlib.closing(self._connect(tcp=not with_ring and len(data) % 2 == 0)) as sock:
            sock.settimeout(ANSWER_S)
            try:
                if with_ring:
                    socket.send_fds(sock, [data[:1]], [self._ring.fd])
                    sock.sendall(data[1:])
                elif data:
                    sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
            except (BrokenPipeError, ConnectionError):
                pass  # it hung up already, and may
            with contextlib.suppress(ConnectionError):
                try:
                    while piece := sock.recv(1 << 20):
                        answers.append(piece)
                except TimeoutError:
                    return False
        return True

    def _checkup(self) -> None:
        """Another client is served, and reads what it wrote."""
        deadline = time.monotonic() + SETTLED_S
        self._server.shard.tick()
        operations = Operations(self._other)  # an input may have stopped reads and writes: that is its right here
        for rule in operations.mode().rules:
            operations.set_mode("both", rule.of)
        operations.set_mode("both")
        keys = Keys.of([opaque_key(NAMESPACE, f"other/{self._inputs}".encode())])
        assert all(result.outcome != "unavailable" for result in self._other.put(KEYS[:3], [VALUE[:300]] * 3))
        while not (written := self._other.put(keys, [VALUE])[0]):  # leases are short here, and may end meanwhile
            assert time.monotonic() < deadline, f"another client could not store: {written}"
            assert written.outcome != "unavailable"
        found = np.empty_like(VALUE)
        while not (read := self._other.get_into(keys, [found])[0]):
            assert time.monotonic() < deadline, f"another client could not read: {read}"
        assert np.array_equal(found, VALUE), "another client read wrong bytes"
        while self._server.service.connections > 1:
            assert time.monotonic() < deadline, "connections do not end"
            time.sleep(0.001)


def nothing_claimed(server: Server, patience_s: float = SETTLED_S) -> None:
    """Raise AssertionError if something stays reserved or in flight once nobody asks."""
    deadline = time.monotonic() + patience_s
    while any((claimed := server.service.counters())[name] for name in ("reservations", "inflight_bytes")):
        assert time.monotonic() < deadline, f"something stays claimed: {claimed}"
        time.sleep(0.001)


def wants_ring(pieces: list[Piece]) -> bool:
    """Whether the first message joins with a ring, which has to be sent beside it."""
    if not pieces or pieces[0].op != Op.JOIN:
        return False
    request = pb.JoinRequest()
    with contextlib.suppress(Exception):
        request.ParseFromString(pieces[0].body)
    return request.ring_slots > 0


def read_answers(data: bytes) -> None:
    """Raise AssertionError unless this is what a server may say: whole, known messages, and sound frames."""
    if data.startswith(b"HTTP/1.1 400 "):
        return
    position = 0
    while position < len(data):
        if data[position : position + 1] == SLOT_DONE:
            position += 1
            continue
        prelude = parse_prelude(data[position : position + PRELUDE_NBYTES], 1 << 24)
        body_end = position + PRELUDE_NBYTES + prelude.body_nbytes
        position = body_end + prelude.payload_nbytes
        assert position <= len(data), f"the answer {prelude} breaks off"
        reply = REPLIES[prelude.op].FromString(data[body_end - prelude.body_nbytes : body_end])
        if isinstance(reply, pb.AcquireReply) and prelude.payload_nbytes:
            _check_frames(list(map(Found._make, PLACE.iter_unpack(reply.places))), data[body_end:position])


def _check_frames(places: list[Found], payload: bytes) -> None:
    start = 0
    for place in places:
        Frame.parse(payload[start : start + place.nbytes], checksum=place.header_sum).verify()
        start += place.nbytes
    assert start == len(payload), "the frames are not as long as their answer says"
