"""Protocol N talks to N-1: the previous release's client and server are played to this one's server and client.

scripts/golden_conversations.py records them. A reply may say more than it did, never something else.
"""

from __future__ import annotations

import importlib.util
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from google.protobuf.message import Message

from mmcache.config import ServerConfig
from mmcache.pb import cache_pb2 as pb
from mmcache.server.serve import Server
from mmcache.transport.base import MAGIC, MAX_BODY_NBYTES, PRELUDE_NBYTES, PROTOCOL, Op, pack_prelude, parse_prelude
from mmcache.transport.tcp import Channel

HERE = Path(__file__).parent
RECORDED = json.loads((HERE / "conversations_v1.json").read_text())
TURNS = [(who, bytes.fromhex(text)) for who, text in RECORDED["turns"]]
REPLIES: dict[Op, type[Message]] = {
    Op.JOIN: pb.JoinReply,
    Op.DECLARE: pb.DeclareReply,
    Op.CONTAINS: pb.ContainsReply,
    Op.ACQUIRE: pb.AcquireReply,
    Op.RESERVE: pb.ReserveReply,
    Op.PUT_DONE: pb.PutReply,
    Op.FINISH: pb.FinishReply,
    Op.DELETE: pb.DeleteReply,
    Op.INSPECT: pb.InspectReply,
    Op.STAT: pb.StatReply,
}
CHANGES_EACH_TIME = ("server", "server_id", "lease_id", "uptime_s", "counters")


class Said(NamedTuple):
    """One message, or, where `op` is None, the raw payload of a put."""

    op: Op | None
    request_id: int
    body: bytes
    payload: bytes


def said(turn: bytes) -> Iterator[Said]:
    """What one side said before the other answered."""
    while turn:
        if turn[:4] != MAGIC:
            yield Said(None, 0, b"", turn)
            return
        op, request_id, body_nbytes, payload_nbytes = parse_prelude(turn[:PRELUDE_NBYTES], MAX_BODY_NBYTES)
        body_end = PRELUDE_NBYTES + body_nbytes
        end = body_end + payload_nbytes
        assert end <= len(turn), "a recorded message is cut"
        yield Said(op, request_id, turn[PRELUDE_NBYTES:body_end], turn[body_end:end])
        turn = turn[end:]


def hear(channel: Channel, deadline: float) -> Said:
    """The next message of a peer."""
    op, request_id, body_nbytes, payload_nbytes = parse_prelude(channel.recv(PRELUDE_NBYTES, deadline), MAX_BODY_NBYTES)
    body = channel.recv(body_nbytes, deadline) if body_nbytes else b""
    payload = bytearray(payload_nbytes)
    channel.recv_into([memoryview(payload)], deadline)
    return Said(op, request_id, body, bytes(payload))


def settled(op: Op, body: bytes) -> Message:
    """A reply without what changes from run to run."""
    reply = REPLIES[op].FromString(body)
    for name in CHANGES_EACH_TIME:
        if name in reply.DESCRIPTOR.fields_by_name:
            reply.ClearField(name)
    return reply


def with_leases(one: Said, leases: dict[int, int]) -> bytes:
    """A client's message again, with the lease ids this server gave out in place of the recorded ones."""
    if one.op is None:
        return one.payload
    body = one.body
    if one.op == Op.FINISH:
        finish = pb.FinishRequest.FromString(body)
        finish.lease_id = leases.get(finish.lease_id, finish.lease_id)
        body = finish.SerializeToString()
    elif one.op == Op.ACQUIRE:
        acquire = pb.AcquireRequest.FromString(body)
        acquire.release = leases.get(acquire.release, acquire.release)
        body = acquire.SerializeToString()
    return pack_prelude(one.op, one.request_id, len(body)) + body


def test_this_server_answers_the_previous_releases_client_as_that_server_did() -> None:
    assert RECORDED["protocol"] == PROTOCOL - 1, "record the previous release's conversations when the protocol grows"
    server = Server(ServerConfig(listen="127.0.0.1:0", unix_path="", memory_nbytes=1 << 20))
    server.start()
    assert server.address is not None
    channel = Channel(socket.create_connection(server.address))
    deadline = time.monotonic() + 30
    leases: dict[int, int] = {}
    answered = 0
    try:
        for who, turn in TURNS:
            for one in said(turn):
                if who == "client":
                    channel.send([with_leases(one, leases)], deadline)
                    continue
                heard = hear(channel, deadline)
                assert one.op is not None
                assert (heard.op, heard.request_id) == (one.op, one.request_id)
                assert settled(one.op, heard.body) == settled(one.op, one.body)
                assert heard.payload == one.payload
                if one.op == Op.ACQUIRE:
                    old, new = (pb.AcquireReply.FromString(body).lease_id for body in (one.body, heard.body))
                    leases[old] = new
                    assert bool(old) == bool(new)
                answered += 1
    finally:
        channel.close()
        server.stop()
    assert answered > 10


class OldServer:
    """Says what the previous release's server said, whatever exactly this client asks."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"mmcache://127.0.0.1:{self._listener.getsockname()[1]}?transport=tcp"
        self.trouble: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            channel = Channel(self._listener.accept()[0])
            try:
                self._speak(channel)
            finally:
                channel.close()
        except BaseException as error:
            self.trouble.append(error)

    def _speak(self, channel: Channel) -> None:
        deadline = time.monotonic() + 30
        ids: dict[int, int] = {}
        for who, turn in TURNS:
            for one in said(turn):
                if who == "client":
                    if one.op is None:
                        channel.recv_into([memoryview(bytearray(len(one.payload)))], deadline)
                        continue
                    heard = hear(channel, deadline)
                    assert heard.op == one.op, f"the client asked {heard.op}, as protocol 1 it asked {one.op}"
                    ids[one.request_id] = heard.request_id
                else:
                    assert one.op is not None
                    sizes = len(one.body), len(one.payload)
                    prelude = pack_prelude(one.op, ids[one.request_id], *sizes)
                    channel.send([prelude + one.body, one.payload], deadline)

    def close(self) -> None:
        self._listener.close()
        self._thread.join(10)


def test_this_client_understands_the_previous_releases_server() -> None:
    spec = importlib.util.spec_from_file_location("talk", HERE.parents[1] / "scripts" / "golden_conversations.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    server = OldServer()
    try:
        heard = module.talk(server.url)
    finally:
        server.close()
    assert server.trouble == []
    assert heard == RECORDED["heard"]


@pytest.mark.parametrize("turn", [b"MMC1" + bytes(4), TURNS[0][1][:-1]])
def test_a_cut_recording_is_noticed(turn: bytes) -> None:
    with pytest.raises(Exception, match=r"."):
        list(said(turn))
