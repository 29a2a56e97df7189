"""Peers that break the rules: each gets a clear answer or is dropped, the others are served, nothing stored changes."""

from __future__ import annotations

import fcntl
import http.client
import os
import socket
import struct
from collections.abc import Iterator
from itertools import count

import numpy as np
import pytest

import mmcache
from mmcache.client.blocking import Client
from mmcache.frame import SUM_OFFSET
from mmcache.keyset import Keys
from mmcache.pb import cache_pb2 as pb
from mmcache.testing.process import ServerProcess
from mmcache.transport.base import PROTOCOL, SLOT_NOTE, Op, pack_prelude
from mmcache.transport.shm import Ring
from tests.integration.support import Raw, blanks, eventually, frame_bytes, keys_of, values_of

BATCH_KEYS = 64
BODY_NBYTES = 16384
STORED, NBYTES = 4, 20_000
_fresh = count()


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    limits = {
        "MMCACHE_IO_TIMEOUT_S": "1.5",
        "MMCACHE_MAX_BATCH_KEYS": str(BATCH_KEYS),
        "MMCACHE_MAX_BODY_NBYTES": str(BODY_NBYTES),
    }
    process = ServerProcess("16MiB", environment=limits).start()
    yield process
    assert process.stop() == 0
    assert process.said == ""  # no traceback, no internal error


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
        lambda: (now := bystander.stat()["counters"])["reservations"] == now["inflight_bytes"] == now["leases"] == 0,
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
        raw.sock.settimeout(1.0)  # not only when the server's patience ends
        assert raw.recv(12) == b"HTTP/1.1 400"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"SSH-2.0-OpenSSH_9.6\r\n" + b"z" * 100, "is this an mmcache port"),
        (bytes(range(256)), "is this an mmcache port"),
        (b"MMC1" + bytes([PROTOCOL + 1]) + bytes(19), f"this release speaks {PROTOCOL}"),
        (b"MMC1" + bytes([PROTOCOL, 200]) + bytes(18), "operation 200"),
        (b"MMC1" + bytes([PROTOCOL, Op.STAT, 1, 0]) + bytes(16), "flags 1"),
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
        assert "must be JOIN" in raw.refusal().message
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
REFUSED = [
    (Op.CONTAINS, pb.ContainsRequest(keys=ANY_KEY[:31]), "keys have 32 bytes"),
    (Op.ACQUIRE, pb.AcquireRequest(keys=ANY_KEY * 2 + b"\0"), "keys have 32 bytes"),
    (Op.DELETE, pb.DeleteRequest(keys=ANY_KEY + bytes(32) + bytes(8)), "keys have 32 bytes"),
    (Op.RECHECK, pb.RecheckRequest(keys=bytes(64)[:63]), "keys have 32 bytes"),
    (Op.INSPECT, pb.InspectRequest(key=b"short"), "keys have 32 bytes"),
    (Op.INSPECT, pb.InspectRequest(key=ANY_KEY * 2), "one key"),
    (Op.RESERVE, pb.ReserveRequest(keys=ANY_KEY[:20], parents=bytes(32), frame_nbytes=[1000]), "keys have 32 bytes"),
    (Op.RESERVE, pb.ReserveRequest(keys=ANY_KEY, parents=b"", frame_nbytes=[1000]), "send one of each per key"),
    (Op.RESERVE, pb.ReserveRequest(keys=ANY_KEY, parents=bytes(32), frame_nbytes=[1, 2]), "send one of each per key"),
    (Op.RESERVE, pb.ReserveRequest(keys=ANY_KEY, parents=bytes(32), frame_nbytes=[9], ring=True), "has none"),
    (Op.CONTAINS, pb.ContainsRequest(keys=ANY_KEY * (BATCH_KEYS + 1)), f"limit is {BATCH_KEYS}"),
    (Op.ACQUIRE, pb.AcquireRequest(keys=ANY_KEY * (BATCH_KEYS + 1)), "split it"),
    (Op.DELETE, pb.DeleteRequest(keys=ANY_KEY * (BATCH_KEYS + 1)), f"limit is {BATCH_KEYS}"),
    (Op.RECHECK, pb.RecheckRequest(keys=ANY_KEY * (BATCH_KEYS + 1)), f"limit is {BATCH_KEYS}"),
    (Op.DECLARE, pb.DeclareRequest(namespace=ANY_KEY, kind="kv", facts={"model": "m"}), "not the digest"),
    (Op.DECLARE, pb.DeclareRequest(namespace=b"", kind="no such kind"), "not the digest"),
    (Op.JOIN, pb.JoinRequest(protocol=1, ring_slots=4, ring_slot_nbytes=1 << 17), "file descriptor"),
    (Op.PUT_DONE, pb.PutReply(status=b"\1"), "not a request"),
    (Op.ERROR, pb.ErrorReply(message="no, you"), "not a request"),
]


@pytest.mark.parametrize(("op", "message", "says"), REFUSED)
def test_a_request_that_cannot_be_met_is_refused_and_the_connection_goes_on(
    server: ServerProcess, op: Op, message: object, says: str
) -> None:
    with Raw(server) as raw:
        raw.join()
        raw.ask(op, message)  # type: ignore[arg-type]
        assert says in raw.refusal().message
        raw.ask(Op.STAT, pb.StatRequest())
        assert raw.answer()[0] == Op.STAT


@pytest.mark.parametrize("op", [op for op in Op if op not in (Op.ERROR, Op.PUT_DONE)])
def test_a_body_that_is_no_message_is_refused(server: ServerProcess, op: Op) -> None:
    with Raw(server) as raw:
        raw.join()
        raw.send(pack_prelude(op, 1, 5) + b"\xff\xff\xff\xff\xff")
        assert "cannot be read" in raw.refusal().message
        raw.ask(Op.STAT, pb.StatRequest())
        assert raw.answer()[0] == Op.STAT


@pytest.mark.parametrize("nbytes", [1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_impossible_sizes_are_refused_key_by_key(server: ServerProcess, nbytes: int) -> None:
    with Raw(server) as raw:
        raw.join()
        assert raw.reserve(keys_of(2, "impossible"), [nbytes, 0]) == bytes([pb.TOO_LARGE, pb.BAD_FRAME])


def half_a_message(where: str, keys: Keys) -> list[bytes]:
    reserve = pb.ReserveRequest(
        keys=b"".join(keys.digests),
        parents=b"".join(keys.parents),
        frame_nbytes=[len(frame_bytes(keys, [bytes(9000)]))],
    ).SerializeToString()
    asked = pack_prelude(Op.RESERVE, 2, len(reserve)) + reserve
    return {
        "before anything": [b""],
        "in the first prelude": [b"MMC1\x01"],
        "in a later prelude": [join_request(), b"MMC1\x01"],
        "in a body": [join_request(), asked[:-10]],
        "before the payload": [join_request(), asked],
        "in the payload": [join_request(), asked, frame_bytes(keys, [bytes(9000)])[:5000]],
    }[where]


WHERE = ["before anything", "in the first prelude", "in a later prelude", "in a body", "before the payload",
         "in the payload"]  # fmt: skip


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
def test_a_client_that_stops_mid_message_is_dropped_in_time(
    server: ServerProcess, bystander: Client, where: str, unix: bool
) -> None:
    with Raw(server.unix_path if unix else server) as raw:
        for piece in half_a_message(where, keys_of(1, f"half/{unix}")):
            raw.send(piece)
        assert bystander.match_prefix(keys_of(STORED, "kept")) == STORED  # the others are served meanwhile
        try:
            while raw.sock.recv(4096):  # replies so far, then the end
                pass
        except ConnectionError:
            pass
    assert bystander.match_prefix(keys_of(1, f"half/{unix}")) == 0


@pytest.mark.parametrize("where", WHERE)
def test_a_client_that_goes_away_mid_message_leaves_nothing(server: ServerProcess, where: str) -> None:
    with Raw(server) as raw:
        for piece in half_a_message(where, keys_of(1, "gone")):
            raw.send(piece)
        raw.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, not a goodbye


def lies(keys: Keys) -> dict[str, bytes]:
    """Frames of one size that are not the frame of `keys[0]`, each in another way."""
    good = frame_bytes(keys, [bytes(9000)])
    sizes = len(good)
    bad_sum = bytearray(good)
    bad_sum[SUM_OFFSET] ^= 1
    bad_payload = bytearray(good)
    bad_payload[-1] ^= 1
    child = Keys.of([mmcache.opaque_key(_namespace(), b"child", index=1)])
    return {
        "another key's frame": frame_bytes(keys_of(1, "somebody else"), [bytes(9000)]),
        "another tensor's checksum": bytes(bad_payload),
        "a wrong header checksum": bytes(bad_sum),
        "no frame at all": bytes(sizes),
        "random bytes": np.random.default_rng(1).bytes(sizes),
        "a shorter frame and more": frame_bytes(keys, [bytes(8000)]).ljust(sizes, b"\0"),
        "a longer frame cut short": frame_bytes(keys, [bytes(10_000)])[:sizes],
        "another order of its halves": good[sizes // 2 :] + good[: sizes // 2],
        "another chain": frame_bytes(child, [bytes(9000)]),
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


def test_a_parent_other_than_the_announced_one_is_refused(server: ServerProcess, bystander: Client) -> None:
    keys = keys_of(1, "orphan")
    frame = frame_bytes(keys, [bytes(500)])
    with Raw(server) as raw:
        raw.join()
        request = pb.ReserveRequest(keys=keys.digests[0], parents=ANY_KEY, frame_nbytes=[len(frame)])
        raw.ask(Op.RESERVE, request)
        assert raw.answer()[0] == Op.RESERVE
        raw.send(frame)
        assert raw.put_done() == bytes([pb.BAD_FRAME])
    assert bystander.match_prefix(keys) == 0


def test_one_lying_frame_of_a_batch_costs_the_others_nothing(server: ServerProcess, bystander: Client) -> None:
    keys = keys_of(3, "batch of lies")
    frames = [frame_bytes(keys, [bytes(3000)] * 3, position) for position in range(3)]
    with Raw(server) as raw:
        raw.join()
        assert raw.reserve(keys, list(map(len, frames))) == bytes([pb.WANTED] * 3)
        raw.send(frames[0] + bytes(len(frames[1])) + frames[2])
        assert raw.put_done() == bytes([pb.STORED, pb.BAD_FRAME, pb.STORED])
    buffers = blanks(3, 3000)
    assert [str(result.outcome) for result in bystander.get_into(keys, buffers)] == ["hit", "miss", "hit"]


class RawRing(Raw):
    """A raw connection that joined with a ring of its own."""

    def __init__(self, server: ServerProcess) -> None:
        super().__init__(server.unix_path)
        self.ring = Ring()
        body = pb.JoinRequest(
            protocol=PROTOCOL, ring_slots=self.ring.slots, ring_slot_nbytes=self.ring.slot_nbytes
        ).SerializeToString()
        socket.send_fds(self.sock, [pack_prelude(Op.JOIN, 1, len(body)) + body], [self.ring.fd])
        assert self.answer()[0] == Op.JOIN
        self.ring.close_fd()

    def reserve_through_ring(self, keys: Keys, nbytes: int) -> None:
        request = pb.ReserveRequest(
            keys=b"".join(keys.digests), parents=b"".join(keys.parents), frame_nbytes=[nbytes], ring=True
        )
        self.ask(Op.RESERVE, request)
        op, body = self.answer()
        assert op == Op.RESERVE
        assert pb.ReserveReply.FromString(body).status == bytes([pb.WANTED])


@pytest.mark.parametrize(
    ("slots", "slot_nbytes", "seals", "file_nbytes"),
    [
        (4, 65536, 0, 4 * 65536),
        (4, 65536, fcntl.F_SEAL_GROW, 4 * 65536),
        (4, 65536, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW, 3 * 65536),
        (1, 65536, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW, 65536),
        (65, 4096, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW, 65 * 4096),
        (4, 4095, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW, 4 * 4095),
        (4, 0, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW, 0),
        (64, 0xFFFFFFFF, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW, 64 * 65536),
        (0xFFFFFFFF, 0xFFFFFFFF, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW, 65536),
    ],
)
def test_a_ring_that_could_harm_the_server_is_not_mapped(
    server: ServerProcess, slots: int, slot_nbytes: int, seals: int, file_nbytes: int
) -> None:
    fd = os.memfd_create("ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, file_nbytes)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    body = pb.JoinRequest(protocol=PROTOCOL, ring_slots=slots, ring_slot_nbytes=slot_nbytes).SerializeToString()
    with Raw(server.unix_path) as raw:
        socket.send_fds(raw.sock, [pack_prelude(Op.JOIN, 1, len(body)) + body], [fd])
        assert "ring" in raw.refusal().message
        raw.join()  # and the connection goes on
    os.close(fd)


def test_a_descriptor_that_is_no_ring_is_not_mapped(server: ServerProcess) -> None:
    body = pb.JoinRequest(protocol=PROTOCOL, ring_slots=4, ring_slot_nbytes=4096).SerializeToString()
    message = pack_prelude(Op.JOIN, 1, len(body)) + body
    with open(__file__) as file, Raw(server.unix_path) as raw:
        socket.send_fds(raw.sock, [message], [file.fileno()])
        assert "ring" in raw.refusal().message
    with Raw(server.unix_path) as raw:
        socket.send_fds(raw.sock, [message], [raw.sock.fileno()] * 2)
        assert "file descriptor" in raw.refusal().message


def test_descriptors_nobody_asked_for_are_not_kept(server: ServerProcess) -> None:
    def open_files() -> int:
        return len(os.listdir(f"/proc/{server.pid}/fd"))

    with Raw(server.unix_path) as raw:
        before = open_files()
        with open(__file__) as file:
            socket.send_fds(raw.sock, [join_request()], [file.fileno()] * 2)
            assert raw.answer()[0] == Op.JOIN
            socket.send_fds(raw.sock, [pack_prelude(Op.STAT, 2, 0)], [file.fileno()] * 2)
            assert raw.answer()[0] == Op.STAT
        assert open_files() == before


@pytest.mark.parametrize("note", [0, (1 << 32) - 1, 1 << 31, Ring().slot_nbytes + 1])
def test_a_slot_note_outside_its_slot_ends_the_put(server: ServerProcess, bystander: Client, note: int) -> None:
    keys = keys_of(1, "bad note")
    with RawRing(server) as raw:
        raw.reserve_through_ring(keys, 100_000)
        raw.send(SLOT_NOTE.pack(note))
        assert "slot note" in raw.refusal().message
        assert raw.closed_by_peer()
    assert bystander.match_prefix(keys) == 0


def test_more_bytes_through_the_ring_than_the_frame_holds_end_the_put(server: ServerProcess, bystander: Client) -> None:
    keys = keys_of(1, "too much")
    frame = frame_bytes(keys, [bytes(1000)])
    with RawRing(server) as raw:
        raw.reserve_through_ring(keys, len(frame))
        raw.ring.slot(0)[: len(frame)] = np.frombuffer(frame, np.uint8)
        raw.send(SLOT_NOTE.pack(len(frame) + 1))
        assert "more bytes" in raw.refusal().message
    assert bystander.match_prefix(keys) == 0


def test_a_ring_is_really_used_when_it_is_sound(server: ServerProcess, bystander: Client) -> None:
    keys = keys_of(1, "sound ring")
    frame = frame_bytes(keys, [bytes(1000)])
    with RawRing(server) as raw:
        raw.reserve_through_ring(keys, len(frame))
        raw.ring.slot(0)[: len(frame)] = np.frombuffer(frame, np.uint8)
        raw.send(SLOT_NOTE.pack(len(frame)))
        assert raw.recv(1) == b"\x01"
        assert raw.put_done() == bytes([pb.STORED])
    assert bystander.match_prefix(keys) == 1
