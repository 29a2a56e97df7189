"""Peers that break the rules: each gets a clear answer or is dropped, the others are served, nothing stored changes."""

from __future__ import annotations

import contextlib
import http.client
import socket
import struct
from collections.abc import Iterator
from itertools import count
from typing import Any

import numpy as np
import pytest

import mmcache
from mmcache.client.blocking import Client
from mmcache.frame import SUM_OFFSET, Kind
from mmcache.keyset import Keys
from mmcache.pb import cache_pb2 as pb
from mmcache.testing.process import ServerProcess
from mmcache.transport.base import PRELUDE_VERSION, PROTOCOL, Op, pack_prelude
from tests.integration.support import Raw, blanks, eventually, frame_bytes, keys_of, reserve_request, values_of

BATCH_KEYS = 64
BODY_NBYTES = 16384
STORED, NBYTES = 4, 20_000
_fresh = count()


def quiet(**more: str) -> Iterator[ServerProcess]:
    limits = {"MMCACHE_MAX_BATCH_KEYS": str(BATCH_KEYS), "MMCACHE_MAX_BODY_NBYTES": str(BODY_NBYTES)}
    process = ServerProcess("16MiB", environment=limits | more).start()
    yield process
    assert process.stop() == 0
    assert process.said == ""  # no traceback, no internal error


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    yield from quiet()


@pytest.fixture(scope="module")
def impatient() -> Iterator[ServerProcess]:
    """Drops soon who stops in a message: also who is only slow, so other tests have one that waits."""
    yield from quiet(MMCACHE_IO_TIMEOUT_S="1.5")


@pytest.fixture(scope="module")
def bystander(server: ServerProcess) -> Iterator[Client]:
    with mmcache.connect(server.url, deadline_s=20) as client:
        assert all(client.put(keys_of(STORED, "kept"), values_of(keys_of(STORED, "kept"), NBYTES)))
        yield client


@pytest.fixture(autouse=True)
def unharmed(bystander: Client) -> Iterator[None]:
    """After each abuse: nothing stored is lost or changed, nothing stays reserved, and others can still write."""
    yield
    keys, buffers = keys_of(STORED, "kept"), blanks(STORED, NBYTES)
    assert all(bystander.get_into(keys, buffers))
    assert all(map(np.array_equal, buffers, values_of(keys, NBYTES)))
    fresh = keys_of(1, f"bystander/{next(_fresh)}")
    assert all(bystander.put(fresh, values_of(fresh, 100)))
    eventually(
        lambda: (now := bystander.stat()["counters"])["reservations"] == now["inflight_bytes"] == 0,
        "what the abuser held is given back",
    )


def join_request() -> bytes:
    body = pb.JoinRequest(protocol=PROTOCOL).SerializeToString()
    return pack_prelude(Op.JOIN, 1, len(body)) + body


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "OPTIONS"])
def test_an_http_client_gets_a_readable_400(server: ServerProcess, method: str) -> None:
    host, _, port = server.url.removeprefix("mmcache://").rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=10)
    body = b"x" * 3000 if method in ("POST", "PUT") else None
    connection.request(method, "/metrics?a=" + "b" * 500, body, headers={"Accept": "*/*"})
    answer = connection.getresponse()
    assert answer.status == 400
    assert b"not HTTP" in answer.read()
    connection.close()


def test_the_shortest_http_request_is_answered_too(server: ServerProcess) -> None:
    with Raw(server) as raw:
        raw.send(b"GET / HTTP/1.0\r\n\r\n")
        assert raw.recv(12) == b"HTTP/1.1 400"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"SSH-2.0-OpenSSH_9.6\r\n" + b"z" * 100, "is this an mmcache port"),
        (bytes(range(256)), "is this an mmcache port"),
        (b"MMC1" + bytes([PRELUDE_VERSION + 1]) + bytes(19), f"this release reads {PRELUDE_VERSION}"),
        (b"MMC1" + bytes([PRELUDE_VERSION, 200]) + bytes(18), "operation 200"),
        (b"MMC1" + bytes([PRELUDE_VERSION, Op.STAT, 1, 0]) + bytes(16), "flags 1"),
        (pack_prelude(Op.JOIN, 1, BODY_NBYTES + 1), f"limit of {BODY_NBYTES}"),
        (pack_prelude(Op.JOIN, 1, 0xFFFFFFFF), "send fewer keys"),
        (pack_prelude(Op.JOIN, 1, 0, 1), "announces payload"),
        (pack_prelude(Op.STAT, 1, 0, 1 << 63), "announces payload"),
        (pack_prelude(Op.RESERVE, 1, 0, 0xFFFF_FFFF_FFFF_FFFF), "announces payload"),
    ],
)
@pytest.mark.parametrize("joined", [False, True])
def test_garbage_is_answered_with_the_reason_and_dropped(
    server: ServerProcess, data: bytes, says: str, joined: bool
) -> None:
    with Raw(server) as raw:
        if joined:
            raw.join()
        raw.send(data)
        assert says in raw.refusal().message
        assert raw.closed_by_peer()


@pytest.mark.parametrize("op", [Op.STAT, Op.ACQUIRE, Op.RESERVE, Op.DELETE])
def test_nothing_is_served_before_join(server: ServerProcess, op: Op) -> None:
    with Raw(server) as raw:
        raw.send(pack_prelude(op, 1, 0))
        assert "JOIN must be the first message" in raw.refusal().message
        raw.join()


def test_another_protocol_is_refused_with_the_remedy(server: ServerProcess) -> None:
    with Raw(server) as raw:
        raw.ask(Op.JOIN, pb.JoinRequest(protocol=0))
        refusal = raw.refusal()
        assert refusal.code == pb.ErrorReply.UNSUPPORTED
        assert "upgrade the client" in refusal.message
        raw.ask(Op.JOIN, pb.JoinRequest(protocol=PROTOCOL + 5))
        op, body = raw.answer()
        assert op == Op.JOIN
        assert pb.JoinReply.FromString(body).protocol == PROTOCOL


ANY_KEY = bytes(range(32))


def reserve_of(**changes: Any) -> pb.ReserveRequest:
    return pb.ReserveRequest(
        **({"keys": ANY_KEY, "parents": bytes(32), "frame_nbytes": [1000], "kinds": b"\1"} | changes)
    )


REFUSED = [
    (Op.CONTAINS, pb.ContainsRequest(keys=ANY_KEY[:31]), "keys have 32 bytes"),
    (Op.ACQUIRE, pb.AcquireRequest(keys=ANY_KEY * 2 + b"\0"), "keys have 32 bytes"),
    (Op.DELETE, pb.DeleteRequest(keys=ANY_KEY + bytes(32) + bytes(8)), "keys have 32 bytes"),
    (Op.RECHECK, pb.RecheckRequest(keys=bytes(64)[:63]), "keys have 32 bytes"),
    (Op.INSPECT, pb.InspectRequest(key=b"short"), "keys have 32 bytes"),
    (Op.INSPECT, pb.InspectRequest(key=ANY_KEY * 2), "one key"),
    (
        Op.RESERVE,
        reserve_of(keys=ANY_KEY[:20]),
        "keys have 32 bytes",
    ),
    (
        Op.RESERVE,
        reserve_of(parents=b""),
        "send one of each per key",
    ),
    (Op.RESERVE, reserve_of(frame_nbytes=[1, 2]), "send one of each per key"),
    (Op.RESERVE, reserve_of(kinds=b""), "send one of each per key"),
    (Op.RESERVE, reserve_of(ring=True), "has none"),
    (Op.CONTAINS, pb.ContainsRequest(keys=ANY_KEY * (BATCH_KEYS + 1)), f"limit is {BATCH_KEYS}"),
    (Op.ACQUIRE, pb.AcquireRequest(keys=ANY_KEY * (BATCH_KEYS + 1)), "split it"),
    (Op.DELETE, pb.DeleteRequest(keys=ANY_KEY * (BATCH_KEYS + 1)), f"limit is {BATCH_KEYS}"),
    (Op.RECHECK, pb.RecheckRequest(keys=ANY_KEY * (BATCH_KEYS + 1)), f"limit is {BATCH_KEYS}"),
    (Op.DECLARE, pb.DeclareRequest(namespace=ANY_KEY, kind="kv", facts={"model": "m"}), "not the digest"),
    (Op.DECLARE, pb.DeclareRequest(namespace=b"", kind="no such kind"), "is unknown"),
    (Op.JOIN, pb.JoinRequest(protocol=1, ring_slots=4, ring_slot_nbytes=1 << 17), "file descriptor"),
    (Op.PUT_DONE, pb.PutReply(status=b"\1"), "not a request"),
    (Op.ERROR, pb.ErrorReply(message="no, you"), "not a request"),
]


@pytest.mark.parametrize(("op", "message", "says"), REFUSED)
def test_a_request_that_cannot_be_met_is_refused_and_the_connection_goes_on(
    server: ServerProcess, op: Op, message: object, says: str
) -> None:
    with Raw(server) as raw:
        if op is not Op.JOIN:
            raw.join()
        raw.ask(op, message)  # type: ignore[arg-type]
        assert says in raw.refusal().message
        if op is Op.JOIN:
            raw.join()
        raw.ask(Op.STAT, pb.StatRequest())
        assert raw.answer()[0] == Op.STAT


@pytest.mark.parametrize("op", [op for op in Op if op not in (Op.ERROR, Op.PUT_DONE)])
def test_a_body_that_is_no_message_is_refused(server: ServerProcess, op: Op) -> None:
    with Raw(server) as raw:
        if op is not Op.JOIN:
            raw.join()
        raw.send(pack_prelude(op, 1, 5) + b"\xff\xff\xff\xff\xff")
        assert "cannot be read" in raw.refusal().message
        if op is Op.JOIN:
            raw.join()
        raw.ask(Op.STAT, pb.StatRequest())
        assert raw.answer()[0] == Op.STAT


@pytest.mark.parametrize("nbytes", [1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_impossible_sizes_are_refused_key_by_key(server: ServerProcess, nbytes: int) -> None:
    with Raw(server) as raw:
        raw.join()
        assert raw.reserve(keys_of(2, "impossible"), [nbytes, 0]) == bytes([pb.TOO_LARGE, pb.BAD_FRAME])


def half_a_message(where: str, keys: Keys) -> list[bytes]:
    frame = frame_bytes(keys, bytes(9000))
    reserve = reserve_request(keys, [len(frame)]).SerializeToString()
    asked = pack_prelude(Op.RESERVE, 2, len(reserve)) + reserve
    return {
        "before anything": [b""],
        "in the first prelude": [b"MMC1\x01"],
        "in a later prelude": [join_request(), b"MMC1\x01"],
        "in a body": [join_request(), asked[:-10]],
        "before the payload": [join_request(), asked],
        "in the payload": [join_request(), asked, frame[:5000]],
    }[where]


WHERE = ["before anything", "in the first prelude", "in a later prelude", "in a body", "before the payload",
         "in the payload"]  # fmt: skip


@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
def test_clients_that_stop_mid_message_are_dropped_in_time(impatient: ServerProcess, unix: bool) -> None:
    with contextlib.ExitStack() as stack:
        bystander = stack.enter_context(mmcache.connect(impatient.url, deadline_s=20))
        kept = keys_of(STORED, "kept")
        eventually(lambda: all(bystander.put(kept, values_of(kept, NBYTES))), "not too slow for a moment")
        stopped = [stack.enter_context(Raw(impatient.unix_path if unix else impatient)) for _ in WHERE]
        for raw, where in zip(stopped, WHERE, strict=True):
            with contextlib.suppress(ConnectionError):  # dropped already, as it took this process so long
                for piece in half_a_message(where, keys_of(1, f"half/{where}/{unix}")):
                    raw.send(piece)
        assert bystander.match_prefix(kept) == STORED  # the others are served meanwhile
        for raw in stopped:
            with contextlib.suppress(ConnectionError):
                while raw.sock.recv(4096):  # replies so far, then the end
                    pass
        for where in WHERE:
            assert bystander.match_prefix(keys_of(1, f"half/{where}/{unix}")) == 0
        eventually(lambda: not bystander.stat()["counters"]["reservations"], "what they held is given back")


@pytest.mark.parametrize("where", WHERE)
def test_a_client_that_goes_away_mid_message_leaves_nothing(server: ServerProcess, where: str) -> None:
    with Raw(server) as raw:
        for piece in half_a_message(where, keys_of(1, "gone")):
            raw.send(piece)
        raw.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, not a goodbye


def lies(keys: Keys) -> dict[str, bytes]:
    """Frames of one size that are not the frame of `keys[0]`, each in another way."""
    good = frame_bytes(keys, bytes(9000))
    sizes = len(good)
    bad_sum = bytearray(good)
    bad_sum[SUM_OFFSET] ^= 1
    bad_payload = bytearray(good)
    bad_payload[-1] ^= 1
    child = Keys.of([mmcache.opaque_key(_namespace(), b"child", index=1)])
    return {
        "another key's frame": frame_bytes(keys_of(1, "somebody else"), bytes(9000)),
        "another tensor's checksum": bytes(bad_payload),
        "a wrong header checksum": bytes(bad_sum),
        "no frame at all": bytes(sizes),
        "random bytes": np.random.default_rng(1).bytes(sizes),
        "a shorter frame and more": frame_bytes(keys, bytes(8000)).ljust(sizes, b"\0"),
        "a longer frame cut short": frame_bytes(keys, bytes(10_000))[:sizes],
        "another order of its halves": good[sizes // 2 :] + good[: sizes // 2],
        "another chain": frame_bytes(child, bytes(9000)),
    }


def _namespace() -> mmcache.Namespace:
    return mmcache.Namespace(kind="kv", model="other/model", dtype="uint8", layout="LBHNC", block_size=16)


@pytest.mark.parametrize("lie", list(lies(keys_of(1, "lie"))))
def test_a_frame_that_lies_is_refused_and_not_stored(server: ServerProcess, bystander: Client, lie: str) -> None:
    keys = keys_of(1, "lie")
    frame = lies(keys)[lie]
    before = bystander.stat()["counters"]
    with Raw(server) as raw:
        raw.join()
        assert raw.reserve(keys, [len(frame)]) == bytes([pb.WANTED])
        raw.send(frame)
        assert raw.put_done() == bytes([pb.BAD_FRAME])
        raw.ask(Op.STAT, pb.StatRequest())
        assert raw.answer()[0] == Op.STAT
    after = bystander.stat()["counters"]
    assert (after["entries"], after["bytes_used"]) == (before["entries"], before["bytes_used"])
    assert bystander.match_prefix(keys) == 0
    assert bystander.match_prefix(keys_of(1, "somebody else")) == 0


@pytest.mark.parametrize("what", ["parent", "kind"])
def test_a_parent_or_kind_other_than_the_announced_one_is_refused(
    server: ServerProcess, bystander: Client, what: str
) -> None:
    keys = keys_of(1, "orphan")
    frame = frame_bytes(keys, bytes(500))
    request = reserve_request(keys, [len(frame)], kind=Kind.LATENT if what == "kind" else Kind.KV)
    if what == "parent":
        request.parents = ANY_KEY
    with Raw(server) as raw:
        raw.join()
        raw.ask(Op.RESERVE, request)
        assert raw.answer()[0] == Op.RESERVE
        raw.send(frame)
        assert raw.put_done() == bytes([pb.BAD_FRAME])
    assert bystander.match_prefix(keys) == 0


def test_kinds_nobody_knows_are_refused_key_by_key(server: ServerProcess) -> None:
    request = reserve_request(keys_of(2, "kinds"), [1000, 1000])
    request.kinds = b"\0\xff"
    with Raw(server) as raw:
        raw.join()
        raw.ask(Op.RESERVE, request)
        assert pb.ReserveReply.FromString(raw.answer()[1]).status == bytes([pb.BAD_FRAME] * 2)


def test_one_lying_frame_of_a_batch_costs_the_others_nothing(server: ServerProcess, bystander: Client) -> None:
    keys = keys_of(3, "batch of lies")
    frames = [frame_bytes(keys, bytes(3000), position) for position in range(3)]
    with Raw(server) as raw:
        raw.join()
        assert raw.reserve(keys, list(map(len, frames))) == bytes([pb.WANTED] * 3)
        raw.send(frames[0] + bytes(len(frames[1])) + frames[2])
        assert raw.put_done() == bytes([pb.STORED, pb.BAD_FRAME, pb.STORED])
    buffers = blanks(3, 3000)
    assert [str(result.outcome) for result in bystander.get_into(keys, buffers)] == ["hit", "miss", "hit"]
