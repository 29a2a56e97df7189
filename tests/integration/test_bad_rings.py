"""Peers that abuse file descriptors and write rings: nothing unsound is mapped, and no note can reach past its slot."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator

import numpy as np
import pytest
import xxhash

import mmcache
from mmcache.client.blocking import Client
from mmcache.frame import sum_of_sums
from mmcache.keyset import Keys
from mmcache.pb import cache_pb2 as pb
from mmcache.testing.process import ServerProcess
from mmcache.transport.base import PROTOCOL, SLOT_NOTE, Op, pack_prelude
from mmcache.transport.shm import Ring
from tests.integration.support import Raw, eventually, frame_bytes, keys_of, reserve_request


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    process = ServerProcess("16MiB").start()
    yield process
    assert process.stop() == 0
    assert process.said == ""  # no traceback, no internal error


@pytest.fixture(scope="module")
def bystander(server: ServerProcess) -> Iterator[Client]:
    with mmcache.connect(server.url, deadline_s=20) as client:
        yield client


def join_request() -> bytes:
    body = pb.JoinRequest(protocol=PROTOCOL).SerializeToString()
    return pack_prelude(Op.JOIN, 1, len(body)) + body


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
        assert self.reserve(keys, [nbytes], ring=True) == bytes([pb.WANTED])


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
    def holds_this_file() -> bool:
        folder = f"/proc/{server.pid}/fd"
        held = set()
        for name in os.listdir(folder):
            with contextlib.suppress(FileNotFoundError):  # closed since it was listed
                held.add(os.readlink(f"{folder}/{name}"))
        return os.path.realpath(__file__) in held

    with open(__file__) as file, Raw(server.unix_path) as raw:
        socket.send_fds(raw.sock, [join_request()], [file.fileno()] * 2)
        assert raw.answer()[0] == Op.JOIN
        eventually(lambda: not holds_this_file(), "descriptors sent with a join are closed")
        socket.send_fds(raw.sock, [pack_prelude(Op.STAT, 2, 0)], [file.fileno()] * 2)
        assert raw.answer()[0] == Op.STAT
        eventually(lambda: not holds_this_file(), "descriptors sent with another message are closed")


@pytest.mark.parametrize("note", [0, (1 << 32) - 1, 1 << 31, Ring().slot_nbytes + 1])
def test_a_slot_note_outside_its_slot_ends_the_put(server: ServerProcess, bystander: Client, note: int) -> None:
    keys = keys_of(1, f"bad note {note}")  # the one before may not have been given up yet
    with RawRing(server) as raw:
        raw.reserve_through_ring(keys, 100_000)
        raw.send(SLOT_NOTE.pack(note))
        assert "slot note" in raw.refusal().message
        assert raw.closed_by_peer()
    assert bystander.match_prefix(keys) == 0


def test_more_bytes_through_the_ring_than_the_frame_holds_end_the_put(server: ServerProcess, bystander: Client) -> None:
    keys = keys_of(1, "too much")
    frame = frame_bytes(keys, bytes(1000))
    with RawRing(server) as raw:
        raw.reserve_through_ring(keys, len(frame))
        raw.ring.slot(0)[: len(frame)] = np.frombuffer(frame, np.uint8)
        raw.send(SLOT_NOTE.pack(len(frame) + 1))
        assert "more bytes" in raw.refusal().message
    assert bystander.match_prefix(keys) == 0


def test_a_ring_is_really_used_when_it_is_sound(server: ServerProcess, bystander: Client) -> None:
    keys = keys_of(1, "sound ring")
    frame = frame_bytes(keys, bytes(1000))
    with RawRing(server) as raw:
        raw.reserve_through_ring(keys, len(frame))
        raw.ring.slot(0)[: len(frame)] = np.frombuffer(frame, np.uint8)
        raw.send(SLOT_NOTE.pack(len(frame)))
        assert raw.recv(1) == b"\x01"
        assert raw.put_done() == bytes([pb.STORED])
    assert bystander.match_prefix(keys) == 1


def reserve_sums_last(raw: Raw, keys: Keys, sizes: list[int], *, ring: bool = True) -> None:
    request = reserve_request(keys, sizes, ring=ring)
    request.sums_last = True
    raw.ask(Op.RESERVE, request)
    op, body = raw.answer()
    assert op == Op.RESERVE
    assert pb.ReserveReply.FromString(body).status == bytes([pb.WANTED]) * len(keys)


def test_checksums_that_come_last_and_are_not_the_bytes_ones_spoil_their_frame_only(
    server: ServerProcess, bystander: Client
) -> None:
    keys, values = keys_of(3, "sums last"), [bytes([number]) * 1000 for number in range(3)]
    frames = [frame_bytes(keys[at : at + 1], value) for at, value in enumerate(values)]
    sums = [sum_of_sums([xxhash.xxh3_128_digest(value)]) for value in values]
    with RawRing(server) as raw:
        reserve_sums_last(raw, keys, [len(frame) for frame in frames])
        stream = frames[0] + sums[0] + frames[1] + bytes(16) + frames[2] + sums[2]
        raw.ring.slot(0)[: len(stream)] = np.frombuffer(stream, np.uint8)
        raw.send(SLOT_NOTE.pack(len(stream)))
        assert raw.recv(1) == b"\x01"
        assert raw.put_done() == bytes([pb.STORED, pb.BAD_FRAME, pb.STORED])
    assert bystander.contains(keys) == [True, False, True]
    into = [bytearray(1000) for _ in keys]
    assert [bool(one) for one in bystander.get_into(keys, into)] == [True, False, True]
    assert (bytes(into[0]), bytes(into[2])) == (values[0], values[2])


def test_a_frame_that_is_no_frame_is_followed_by_the_next_one_all_the_same(
    server: ServerProcess, bystander: Client
) -> None:
    keys = keys_of(2, "sums last, no frame")
    frame = frame_bytes(keys[1:], bytes(1000))
    with RawRing(server) as raw:
        reserve_sums_last(raw, keys, [500, len(frame)])
        stream = bytes(500 + 16) + frame + sum_of_sums([xxhash.xxh3_128_digest(bytes(1000))])
        half = 508  # within the first frame's checksums
        raw.ring.slot(0)[:half] = np.frombuffer(stream[:half], np.uint8)
        raw.send(SLOT_NOTE.pack(half))
        assert raw.recv(1) == b"\x01"
        raw.ring.slot(1)[: len(stream) - half] = np.frombuffer(stream[half:], np.uint8)
        raw.send(SLOT_NOTE.pack(len(stream) - half))
        assert raw.recv(1) == b"\x01"
        assert raw.put_done() == bytes([pb.BAD_FRAME, pb.STORED])
    assert bystander.contains(keys) == [False, True]


@pytest.mark.parametrize("step", [1 << 20, 16 << 10, 4099])
def test_over_a_socket_too_each_frame_stands_for_itself_wherever_the_stream_is_cut(
    server: ServerProcess, bystander: Client, step: int
) -> None:
    keys, value = keys_of(4, f"sums last, socket, {step}"), bytes(300_000)
    sums = sum_of_sums([xxhash.xxh3_128_digest(value)])
    frames = [frame_bytes(keys[at : at + 1], value) for at in range(4)]
    frames[0] = bytes(len(frames[0]))
    stream = b"".join(frame + (bytes(16) if at == 2 else sums) for at, frame in enumerate(frames))
    with Raw(server) as raw:
        raw.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        assert raw.join().protocol == 1
        reserve_sums_last(raw, keys, [len(frame) for frame in frames], ring=False)
        for start in range(0, len(stream), step):
            raw.send(stream[start : start + step])
        assert raw.put_done() == bytes([pb.BAD_FRAME, pb.STORED, pb.BAD_FRAME, pb.STORED])
        assert raw.reserve(keys[1:2], [len(frames[1])]) == bytes([pb.PRESENT]), "the connection goes on"
    assert bystander.contains(keys) == [False, True, False, True]
    into = [bytearray(b"?" * len(value)) for _ in keys]
    assert [bool(one) for one in bystander.get_into(keys, into)] == [False, True, False, True]
    assert (bytes(into[1]), bytes(into[3])) == (value, value)
