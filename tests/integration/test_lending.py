"""Puts out of memory that a client lends: taken from where it lies, verified, and never from where nothing was lent."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import xxhash

import mmcache
from mmcache.client.blocking import Client
from mmcache.errors import UsageError
from mmcache.frame import sum_of_sums
from mmcache.pb import cache_pb2 as pb
from mmcache.tensors import Bytes
from mmcache.testing.process import ServerProcess
from mmcache.transport.base import LENT_MEMORIES, LENT_PIECE, MAX_FOLLOWING_NBYTES, Op
from mmcache.transport.lent import MAX_VIEWS, shared_buffer
from tests.integration.support import eventually, frame_bytes, keys_of, reserve_request
from tests.integration.test_bad_rings import RawRing

NBYTES = 1 << 20
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    process = ServerProcess("64MiB").start()
    yield process
    assert process.stop() == 0
    assert process.said == ""


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Client]:
    with mmcache.connect(server.url, deadline_s=20) as made:
        yield made


def filled(nbytes: int, seed: int) -> Bytes:
    buffer = shared_buffer(nbytes)
    buffer[:] = np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)
    return buffer


def maps_what_is_lent(server: ServerProcess) -> bool:
    """Whether the server maps memory of any client's: of a connection that ended, until it has noticed."""
    with open(f"/proc/{server.pid}/maps") as file:
        return any(name in line for line in file for name in ("memfd:mmcache-shared", "memfd:lent"))


def lent(client: Client) -> int:
    return int(client.stat()["counters"]["bytes_lent"])


def test_values_in_a_shared_buffer_are_taken_from_there(client: Client) -> None:
    buffer, other = filled(NBYTES, 0), filled(4096, 1)
    values: list[Any] = [
        buffer[:100],
        {"one": buffer[5:77].view(np.int8), "two": other, "none": np.empty((0, 3), np.float32)},
        buffer[4096:].view(np.float16).reshape(-1, 32),
    ]
    keys, before = keys_of(3, "lent"), lent(client)
    assert [result.outcome for result in client.put(keys, values)] == ["stored"] * 3
    assert lent(client) - before == 100 + 72 + 4096 + NBYTES - 4096
    into: list[Any] = [np.empty(100, np.uint8), {"one": np.empty(72, np.int8), "two": np.empty(4096, np.uint8),
            "none": np.empty((0, 3), np.float32)}, np.empty_like(values[2])]  # fmt: skip
    assert all(client.get_into(keys, into))
    assert into[0].tobytes() == buffer[:100].tobytes()
    assert into[1]["one"].tobytes() == buffer[5:77].tobytes()
    assert into[1]["two"].tobytes() == other.tobytes()
    assert into[2].tobytes() == buffer[4096:].tobytes()
    assert [result.outcome for result in client.put(keys, values)] == ["present"] * 3


def test_one_tensor_elsewhere_sends_a_batch_through_the_ring(client: Client) -> None:
    buffer, keys, before = filled(4096, 2), keys_of(2, "mixed"), lent(client)
    assert all(client.put(keys, [buffer, buffer.copy()]))
    assert lent(client) == before
    into = [np.empty(4096, np.uint8) for _ in keys]
    assert all(client.get_into(keys, into))
    assert all(one.tobytes() == buffer.tobytes() for one in into)


def test_over_tcp_nothing_is_lent(server: ServerProcess) -> None:
    with mmcache.connect(f"{server.url}?transport=tcp", deadline_s=20) as client:
        before = lent(client)
        assert all(client.put(keys_of(1, "tcp"), [filled(4096, 3)]))
        assert lent(client) == before


def test_the_asynchronous_client_lends_too(server: ServerProcess, client: Client) -> None:
    buffer, keys, before = filled(NBYTES, 4), keys_of(1, "async"), lent(client)

    async def put() -> bool:
        async with mmcache.AsyncClient(server.url, deadline_s=20) as cache:
            return all(await cache.put(keys, [buffer]))

    assert asyncio.run(put())
    assert lent(client) - before == NBYTES
    into = np.empty(NBYTES, np.uint8)
    assert all(client.get_into(keys, [into]))
    assert into.tobytes() == buffer.tobytes()


def test_many_buffers_come_and_go(client: Client) -> None:
    """More than a connection may have at a time: those that are gone make room, and more go through the ring."""
    before = lent(client)
    for number in range(2 * LENT_MEMORIES):
        assert all(client.put(keys_of(1, f"gone {number}"), [filled(4096, number)]))
        gc.collect()
    assert lent(client) - before == 2 * LENT_MEMORIES * 4096
    kept = [filled(4096, number) for number in range(2 * LENT_MEMORIES)]
    before = lent(client)
    for number, buffer in enumerate(kept):
        assert all(client.put(keys_of(1, f"kept {number}"), [buffer]))
    assert lent(client) - before == LENT_MEMORIES * 4096


def test_what_changes_during_a_put_is_never_stored_wrong(client: Client) -> None:
    """A thread scribbles on; what is stored was the same for both who read it, or it is not stored."""
    buffer, over = filled(NBYTES, 5), threading.Event()

    def scribble() -> None:
        number = 0
        while not over.is_set():
            buffer[number % NBYTES :: 4099] ^= 0xFF
            number += 1

    thread = threading.Thread(target=scribble)
    thread.start()
    outcomes: list[str] = []
    try:
        until = time.monotonic() + 20
        while outcomes.count("refused") < 5 and time.monotonic() < until:
            keys = keys_of(1, f"scribbled {len(outcomes)}")
            (result,) = client.put(keys, [buffer])
            outcomes.append(str(result.outcome))
            (found,) = client.get_into(keys, [np.empty(NBYTES, np.uint8)])
            assert bool(found) == bool(result)
    finally:
        over.set()
        thread.join()
    assert outcomes.count("refused") >= 5
    assert all(client.put(keys_of(1, "afterwards"), [buffer]))


def test_memory_goes_when_its_user_does(server: ServerProcess) -> None:
    eventually(lambda: not maps_what_is_lent(server), "what earlier clients lent is unmapped")
    with mmcache.connect(server.url, deadline_s=20) as client:
        assert all(client.put(keys_of(1, "maps"), [filled(4096, 6)]))
        assert maps_what_is_lent(server)
    eventually(lambda: not maps_what_is_lent(server), "lent memory is unmapped when its connection ends")
    before = len(os.listdir("/proc/self/fd"))
    for number in range(50):
        filled(4096, number)
    gc.collect()
    eventually(lambda: len(os.listdir("/proc/self/fd")) <= before, "no descriptor stays")  # others' come and go


def test_a_child_lends_what_it_inherited(server: ServerProcess, client: Client) -> None:
    buffer, before = filled(4096, 7), lent(client)
    child = os.fork()
    if not child:
        good = False
        try:
            with mmcache.connect(server.url, deadline_s=20) as mine:
                good = all(mine.put(keys_of(1, "child"), [buffer]))
        finally:
            os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert lent(client) - before == 4096


def test_values_without_a_byte_are_stored(client: Client) -> None:
    kept = filled(4096, 8)
    empty = np.empty((0, 3), np.float32)
    assert all(client.put(keys_of(2, "empty"), [empty, {}]))
    many: dict[str, Any] = {f"{number}": empty for number in range(1000)}
    keys = keys_of(4, "many empty")
    assert all(client.put(keys, [many | {"last": kept}] * 4))
    into = {name: np.empty_like(value) for name, value in (many | {"last": kept}).items()}
    assert all(client.get_into(keys[:1], [into]))
    assert into["last"].tobytes() == kept.tobytes()


def test_buffers_may_be_collected_anywhere(client: Client) -> None:
    """In cycles, by a collector that runs all the time: also inside of what makes new ones."""
    script = """
import gc
from mmcache.transport.lent import shared_buffer
gc.set_threshold(1)
for number in range(500):
    cycle = {"buffer": shared_buffer(4096)}
    cycle["self"] = cycle
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.mark.parametrize("nbytes", [0, -1])
def test_a_buffer_of_nothing_is_refused(nbytes: int) -> None:
    with pytest.raises(UsageError, match="ask for 1 or more"):
        shared_buffer(nbytes)


# ---------------------------------------------------------------------- peers that abuse it
def memfd(nbytes: int, seals: int = SEALS) -> int:
    fd = os.memfd_create("lent", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, nbytes)
    os.pwrite(fd, bytes(nbytes), 0)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


class Lender(RawRing):
    """A raw connection that lends."""

    def lend(self, fds: list[int], nbytes: int, number: int = 0) -> str:
        """Why not; empty if the server mapped it."""
        self.ask(Op.LEND, pb.LendRequest(number=number, nbytes=nbytes))
        op, _ = self.answer()
        assert op == Op.LEND
        socket.send_fds(self.sock, [b"\0"], fds)
        op, body = self.answer()
        assert op == Op.LEND
        return pb.LendReply.FromString(body).why

    def reserve_lent(self, label: str, nbytes: int) -> None:
        request = reserve_request(keys_of(1, label), [nbytes])
        request.sums_last = request.lent = True
        self.ask(Op.RESERVE, request)
        op, body = self.answer()
        assert op == Op.RESERVE
        assert pb.ReserveReply.FromString(body).status == bytes([pb.WANTED])


@pytest.mark.parametrize(
    ("nbytes", "said", "seals"),
    [
        (8192, 8192, 0),
        (8192, 8192, fcntl.F_SEAL_GROW),
        (8192, 4096, SEALS),
        (8192, 1 << 63, SEALS),
        (0, 0, SEALS),
    ],
)
def test_memory_that_could_harm_the_server_is_not_mapped(
    server: ServerProcess, nbytes: int, said: int, seals: int
) -> None:
    fd = memfd(nbytes, seals)
    with Lender(server) as raw:
        assert "memory lent" in raw.lend([fd], said)
        os.close(fd)
        sound = memfd(8192)
        assert raw.lend([sound], 8192) == ""  # and the connection goes on
        os.close(sound)


def test_memory_with_holes_is_not_mapped(server: ServerProcess) -> None:
    fd = os.memfd_create("holes", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 1 << 40)
    os.pwrite(fd, b"x" * 4096, 0)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    with Lender(server) as raw:
        assert "has holes" in raw.lend([fd], 1 << 40)
    os.close(fd)


def test_a_server_maps_only_so_many(server: ServerProcess) -> None:
    eventually(lambda: not maps_what_is_lent(server), "what earlier clients lent is unmapped")
    lenders = [Lender(server) for _ in range(MAX_VIEWS // LENT_MEMORIES + 1)]
    said = []
    for raw in lenders:
        for number in range(LENT_MEMORIES):
            fd = memfd(4096)
            said.append(raw.lend([fd], 4096, number))
            os.close(fd)
    assert said[:MAX_VIEWS] == [""] * MAX_VIEWS
    assert all("lent to this server already" in why for why in said[MAX_VIEWS:])
    for raw in lenders:
        raw.sock.close()
    eventually(lambda: not maps_what_is_lent(server), "there is room for the next tests")


def test_what_is_no_memfd_is_not_mapped(server: ServerProcess) -> None:
    with open(__file__) as file, Lender(server) as raw:
        assert "memory lent" in raw.lend([file.fileno()], os.path.getsize(__file__))
        assert "memory lent" in raw.lend([raw.sock.fileno()], 4096)


def test_lending_without_a_descriptor_ends_the_connection(server: ServerProcess) -> None:
    for count in (0, 2):
        with Lender(server) as raw:
            raw.ask(Op.LEND, pb.LendRequest(nbytes=4096))
            assert raw.answer()[0] == Op.LEND
            socket.send_fds(raw.sock, [b"\0"], [raw.sock.fileno()] * count)
            assert "file descriptor" in raw.refusal().message
            assert raw.closed_by_peer()


def test_what_may_not_lend_is_told_so(server: ServerProcess) -> None:
    with Lender(server) as raw:
        raw.ask(Op.LEND, pb.LendRequest(number=LENT_MEMORIES, nbytes=4096))
        assert "cannot be lent" in raw.refusal().message
        request = reserve_request(keys_of(1, "none lent"), [4096])
        request.sums_last = request.lent = True
        raw.ask(Op.RESERVE, request)
        assert "none was lent" in raw.refusal().message


@pytest.mark.parametrize(
    "record",
    [
        LENT_PIECE.pack(0, 0, 8192, 1),
        LENT_PIECE.pack(0, 0, 0, 8193),
        LENT_PIECE.pack(0, 0, (1 << 64) - 1, 1),
        LENT_PIECE.pack(0, 0, 1, (1 << 64) - 1),
        LENT_PIECE.pack(0, 1, 0, 1),
        LENT_PIECE.pack(0, 0xFFFFFFFF, 0, 1),
        LENT_PIECE.pack(0, 0, 0, 0),
        LENT_PIECE.pack(MAX_FOLLOWING_NBYTES + 1, 0, 0, 0),
    ],
)
def test_a_record_outside_lent_memory_ends_the_put(server: ServerProcess, client: Client, record: bytes) -> None:
    fd = memfd(8192)
    with Lender(server) as raw:
        assert raw.lend([fd], 8192) == ""
        os.close(fd)
        raw.reserve_lent("outside", 4096)
        raw.send(record)
        assert "lent memory" in raw.refusal().message
        assert raw.closed_by_peer()
    assert client.match_prefix(keys_of(1, "outside")) == 0


@pytest.mark.parametrize("right", [True, False])
def test_records_are_what_the_format_says(server: ServerProcess, client: Client, right: bool) -> None:
    """A frame of 1,000 bytes by hand, its tensor in two parts; with another sum than the bytes' it is not stored."""
    label = f"by hand {right}"
    value = bytes(range(250)) * 4
    frame = frame_bytes(keys_of(1, label), value)
    head = frame[: len(frame) - len(value)]
    fd = memfd(8192)
    os.pwrite(fd, value, 100)
    with Lender(server) as raw:
        assert raw.lend([fd], 8192) == ""
        os.close(fd)
        raw.reserve_lent(label, len(frame))
        total = sum_of_sums([xxhash.xxh3_128_digest(value)]) if right else bytes(16)
        raw.send(LENT_PIECE.pack(len(head), 0, 100, 300) + head)
        raw.send(struct.pack("<IIQQ", 0, 0, 400, 700))
        raw.send(LENT_PIECE.pack(16, 0, 0, 0) + total)
        assert raw.put_done() == bytes([pb.STORED if right else pb.BAD_FRAME])
    assert client.match_prefix(keys_of(1, label)) == right
