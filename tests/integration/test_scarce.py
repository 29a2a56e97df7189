"""A server short of descriptors, clients that send or take a byte at a time, memory that is not what it should be."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import mmcache
from mmcache.client.blocking import Client
from mmcache.pb import cache_pb2 as pb
from mmcache.testing.process import ServerProcess
from mmcache.transport.base import PRELUDE_NBYTES, PROTOCOL, Op, pack_prelude
from tests.integration.support import (
    ROOT,
    MiB,
    Raw,
    blanks,
    eventually,
    frame_bytes,
    keys_of,
    reserve_request,
    values_of,
)

IO_TIMEOUT_S = 3.0
SLACK_S = 3.0
STORED, NBYTES = 4, 20_000


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    process = ServerProcess("64MiB", environment={"MMCACHE_IO_TIMEOUT_S": str(IO_TIMEOUT_S)}).start()
    yield process
    assert process.stop() == 0
    assert process.said == ""  # no traceback, no internal error


@pytest.fixture(scope="module")
def bystander(server: ServerProcess) -> Iterator[Client]:
    with mmcache.connect(server.url, deadline_s=7) as client:
        assert all(client.put(keys_of(STORED, "kept"), values_of(keys_of(STORED, "kept"), NBYTES)))
        yield client


def is_served(client: Client) -> bool:
    keys, buffers = keys_of(STORED, "kept"), blanks(STORED, NBYTES)
    return all(client.get_into(keys, buffers)) and all(map(np.array_equal, buffers, values_of(keys, NBYTES)))


# ------------------------------------------------------------------------------------------- descriptors
def numbers(pid: int) -> set[int]:
    return set(map(int, os.listdir(f"/proc/{pid}/fd")))


def settled_numbers(pid: int) -> set[int]:
    """The descriptors when those of connections that have ended are closed too: unchanged for half a second."""
    found, since = numbers(pid), time.monotonic()
    while time.monotonic() < since + 0.5:
        time.sleep(0.01)
        if numbers(pid) != found:
            found, since = numbers(pid), time.monotonic()
    return found


def limit_with_free(count: int, taken: set[int]) -> int:
    """The limit is one of numbers, not of how many there are: between those in use there are free ones."""
    return sorted(set(range(max(taken) + count + 2)) - taken)[count]


def test_a_server_out_of_descriptors_serves_who_is_connected_and_later_the_others(
    server: ServerProcess, bystander: Client
) -> None:
    usual = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (limit_with_free(6, settled_numbers(server.pid)), usual[1]))
    try:
        with contextlib.ExitStack() as stack:
            answered = 0
            with contextlib.suppress(TimeoutError):
                while answered < 12:  # more than there are descriptors: who comes last waits, unanswered
                    raw = stack.enter_context(Raw(server))
                    raw.sock.settimeout(5.0)
                    raw.join()
                    answered += 1
            assert 0 < answered < 12
            assert is_served(bystander)
            late = stack.enter_context(mmcache.connect(server.url, deadline_s=0.3, lazy=True))
            began = time.monotonic()
            assert not any(late.get_into(keys_of(1, "kept"), blanks(1, NBYTES)))
            assert time.monotonic() - began < 0.3 + SLACK_S
        with mmcache.connect(server.url, deadline_s=7, lazy=True) as cache:
            eventually(lambda: is_served(cache), "another client is served once some have left")
    finally:
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, usual)


def test_a_server_with_no_descriptor_left_for_a_ring_says_so_and_goes_on(
    server: ServerProcess, bystander: Client
) -> None:
    usual = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
    assert is_served(bystander)
    eventually(lambda: bystander.stat()["counters"]["connections"] == 1, "connections of other tests ended")
    # One for the connection: the descriptor that comes beside Join, or its map's own, has no place.
    limit = limit_with_free(1, settled_numbers(server.pid))
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (limit, usual[1]))
    try:
        url = f"mmcache+unix://{server.unix_path}"
        with mmcache.connect(url, deadline_s=2, lazy=True) as cache:
            assert not any(cache.put(keys_of(1, "no ring"), values_of(keys_of(1, "no ring"), 100)))
        assert is_served(bystander)
    finally:
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, usual)
    with mmcache.connect(url, deadline_s=7) as cache:
        assert is_served(cache)


# ------------------------------------------------------------------------------------------- a byte at a time
def trickle(raw: Raw, data: bytes) -> float:
    """Send a byte every 100 ms until the server has had enough; how long that took."""
    began = time.monotonic()
    raw.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with contextlib.suppress(ConnectionError):
        for byte in data:
            raw.send(bytes([byte]))
            raw.sock.settimeout(0.1)
            try:
                while raw.sock.recv(4096):
                    pass
                break
            except TimeoutError:
                pass
    return time.monotonic() - began


def test_clients_that_send_a_byte_at_a_time_are_dropped_and_hold_nothing(
    server: ServerProcess, bystander: Client
) -> None:
    keys = keys_of(4, "trickle")  # so many that to send the body takes longer than it may
    frame = frame_bytes(keys, bytes(5000))
    body = reserve_request(keys, [len(frame)] * len(keys)).SerializeToString()
    reserve = pack_prelude(Op.RESERVE, 2, len(body)) + body
    took: dict[str, float] = {}

    def slow(where: str) -> None:
        with Raw(server) as raw:
            if where == "the first message":
                took[where] = trickle(raw, pack_prelude(Op.JOIN, 1, 200) + bytes(200))
                return
            raw.join()
            if where == "a body":
                raw.send(reserve[:PRELUDE_NBYTES])
                took[where] = trickle(raw, body)
                return
            raw.send(reserve)
            assert raw.answer()[0] == Op.RESERVE
            took[where] = trickle(raw, frame)

    places = ["the first message", "a body", "a payload"]
    threads = [threading.Thread(target=slow, args=(where,)) for where in places]
    for thread in threads:
        thread.start()
    time.sleep(IO_TIMEOUT_S / 2)
    assert is_served(bystander)
    others = keys_of(3, "beside a trickle")
    assert all(bystander.put(others, values_of(others, MiB)))
    for thread in threads:
        thread.join()
    assert sorted(took) == sorted(places)
    assert all(took_s < 2 * IO_TIMEOUT_S + SLACK_S for took_s in took.values()), took
    eventually(
        lambda: (now := bystander.stat()["counters"])["reservations"] == now["inflight_bytes"] == 0,
        "nothing of theirs stays",
    )


def test_a_client_that_takes_a_byte_at_a_time_does_not_pin_memory(server: ServerProcess, bystander: Client) -> None:
    keys = keys_of(2, "slow reader")
    assert all(bystander.put(keys, values_of(keys, 4 * MiB)))
    with Raw(server) as raw:
        raw.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.join()
        raw.ask(Op.ACQUIRE, pb.AcquireRequest(keys=b"".join(keys.digests), inline=True))
        began = time.monotonic()
        raw.recv(1)
        assert bystander.stat()["counters"]["held_bytes"] > 8 * MiB  # while it is being sent
        while bystander.stat()["counters"]["held_bytes"] > 8 * MiB:  # the bystander's last lease rides on its next get
            raw.recv(1)
            time.sleep(0.05)
            assert time.monotonic() - began < IO_TIMEOUT_S + 8 / 4 + SLACK_S  # 4 MiB/s are the least
    assert is_served(bystander)


# ------------------------------------------------------------------------------------------- memory
def offering(listener: socket.socket, arena_fd: int, nbytes: int) -> None:
    """Joins like a server that offers this memory as its arena."""
    peer, _ = listener.accept()
    with peer:
        _, fds, _, _ = socket.recv_fds(peer, PRELUDE_NBYTES, 2)
        for fd in fds:
            os.close(fd)
        limits = pb.Limits(batch_keys=100, inline_nbytes=MiB)
        body = pb.JoinReply(protocol=PROTOCOL, alignment=64, lease_s=60, limits=limits, arena_nbytes=nbytes)
        answer = body.SerializeToString()
        socket.send_fds(peer, [pack_prelude(Op.JOIN, 1, len(answer)) + answer], [arena_fd])
        while peer.recv(4096):
            pass


@pytest.mark.parametrize(("sealed", "short"), [(False, 0), (True, 4096)], ids=["unsealed", "shorter than said"])
def test_an_arena_that_could_vanish_under_a_reader_is_not_mapped(tmp_path: Path, sealed: bool, short: int) -> None:
    fd = os.memfd_create("arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, MiB - short)
    if sealed:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    path = str(tmp_path / "lying.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        thread = threading.Thread(target=offering, args=(listener, fd, MiB), daemon=True)
        thread.start()
        with mmcache.connect(f"mmcache+unix://{path}", deadline_s=20, lazy=True) as cache:
            (result,) = cache.get_into(keys_of(1, "offered"), blanks(1, 100))
        assert "was not mapped" in result.reason
        thread.join(5)
    os.close(fd)


# A process of its own, where no other test's maps and descriptors come and go.
CLOSED = """
import gc, json, os, sys
import mmcache
def held():
    with open("/proc/self/maps") as file:
        return sum("mmcache-arena" in line for line in file), len(os.listdir("/proc/self/fd"))
mmcache.connect(sys.argv[1], deadline_s=20).close()  # what is taken once, with the first use, is no leak
gc.collect()
gc.disable()
before = held()
cache = mmcache.connect(sys.argv[1], deadline_s=20)
during = held()
cache.close()
print(json.dumps([before, during, held()]))
"""


def test_a_closed_client_does_not_hold_the_servers_memory_until_it_is_collected(server: ServerProcess) -> None:
    """Engines freeze the collector: what waits for it stays for ever, and with it the memory of a server that ended."""
    command = [sys.executable, "-c", CLOSED, f"{server.url}?transport=shm"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    before, during, after = json.loads(ended.stdout)
    assert during[0] == before[0] + 1
    assert after == before
