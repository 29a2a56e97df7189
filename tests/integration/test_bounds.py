"""Bounds that hold whatever the peer does: deadlines of connects and reads, memory, bytes in flight, batches, forks."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import mmcache
from mmcache.client.link import SocketLink
from mmcache.config import ServerConfig
from mmcache.errors import DeadlineExceeded, TransportError
from mmcache.keys import namespace_id
from mmcache.pb import cache_pb2 as pb
from mmcache.store import namespaces as namespaces_module
from mmcache.store.shard import Shard
from mmcache.testing.process import ServerProcess
from mmcache.transport.base import PLACE, PRELUDE_NBYTES, Op, pack_prelude, parse_prelude
from mmcache.transport.resolve import resolve
from mmcache.transport.tcp import Channel, connect_tcp
from tests.integration.support import MiB, Raw, blanks, eventually, in_time, keys_of, suspend, values_of


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess("64MiB") as running:
        yield running


SLACK_S = 2.0  # what a busy machine may add


# ------------------------------------------------------------------------------------------- time
def took_s(work: object, *arguments: object) -> float:
    start = time.monotonic()
    with pytest.raises(TransportError):
        work(*arguments)  # type: ignore[operator]
    return time.monotonic() - start


@contextlib.contextmanager
def silent_channel() -> Iterator[Channel]:
    """A new one, whose peer neither says nor takes anything."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Channel(ours)


def test_a_receive_ends_at_its_deadline_not_before_and_not_much_later() -> None:
    def late_s() -> float:
        worst = 0.0
        with silent_channel() as channel:
            channel.spin_s = 0.0
            for seconds in (0.2, 0.19, 0.5):  # the kernel's timeout stays from one to the next where it fits
                deadline = time.monotonic() + seconds
                took_s(channel.recv, 10, deadline)
                late = time.monotonic() - deadline
                assert late >= -0.01 * seconds
                worst = max(worst, late)
        return worst

    in_time(late_s, SLACK_S)


def test_several_silent_addresses_share_one_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        address = listener.getsockname()
        waiting = [socket.socket() for _ in range(4)]  # more than the backlog: further connects get no answer
        for sock in waiting:
            sock.setblocking(False)
            sock.connect_ex(address)
        addresses = [(socket.AF_INET, address)] * 3
        in_time(lambda: took_s(connect_tcp, addresses, 5.0, time.monotonic() + 0.4), 0.4 + SLACK_S)
        for sock in waiting:
            sock.close()


def test_a_resolver_that_hangs_does_not_hang_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: release.wait(10))
    with pytest.raises(DeadlineExceeded, match="not resolved in time"):
        resolve("cache.example", 7600, time.monotonic() + 0.2)
    release.set()


def test_signals_do_not_put_a_deadline_off() -> None:
    data = bytes(64 * MiB)

    def receives_s() -> float:
        with silent_channel() as channel:
            return took_s(channel.recv, 10, time.monotonic() + 0.4)

    def sends_s() -> float:
        with silent_channel() as channel:
            return took_s(channel.send, [data], time.monotonic() + 0.4)

    before = signal.signal(signal.SIGALRM, lambda number, frame: None)
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    try:
        in_time(receives_s, 0.4 + SLACK_S)
        in_time(sends_s, 0.4 + SLACK_S)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_an_address_of_a_family_this_host_lacks_is_passed_over() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        addresses = [(9999, ("nowhere", 1)), (socket.AF_INET, listener.getsockname())]
        connect_tcp(addresses, 20.0, time.monotonic() + 20).close()


def test_a_name_that_cannot_be_one_is_said_at_once() -> None:
    with pytest.raises(TransportError, match="cannot be resolved"):
        resolve("x" * 70 + ".example", 7600, time.monotonic() + 5)


def test_many_leases_are_given_back_within_one_deadline() -> None:
    environment = {"MMCACHE_MAX_INLINE_NBYTES": "2MiB"}
    with (
        ServerProcess("64MiB", environment=environment) as stopped,
        mmcache.connect(stopped.url + "?deadline_s=20") as patient,
        mmcache.connect(stopped.url + "?deadline_s=8") as cache,
    ):
        keys = keys_of(60, "many leases")
        assert all(patient.put(keys, values_of(keys, MiB // 2)))
        leased = cache.acquire(keys)
        assert len(leased._lease_ids) > 10
        suspend(stopped.pid)
        try:
            start = time.monotonic()
            assert not leased.release()
            assert time.monotonic() - start < 14.4  # never two of them
        finally:
            os.kill(stopped.pid, signal.SIGCONT)


# ------------------------------------------------------------------------------------------- memory
def lying_server(listener: socket.socket, announced_nbytes: int) -> None:
    """Joins like a server, then announces one frame of that size and sends nothing."""
    peer, _ = listener.accept()
    with peer, contextlib.suppress(ConnectionError):  # a client that waits no longer
        while True:
            head = peer.recv(PRELUDE_NBYTES, socket.MSG_WAITALL)
            if len(head) < PRELUDE_NBYTES:
                return
            prelude = parse_prelude(head, 1 << 20)
            peer.recv(prelude.body_nbytes, socket.MSG_WAITALL)
            if prelude.op == Op.JOIN:
                limits = pb.Limits(batch_keys=100, inline_nbytes=MiB)
                body = pb.JoinReply(protocol=1, alignment=64, lease_s=60, limits=limits).SerializeToString()
                payload = 0
            else:
                place = PLACE.pack(0, announced_nbytes, 448, bytes(16))
                body = pb.AcquireReply(status=bytes([pb.FOUND]), places=place).SerializeToString()
                payload = announced_nbytes
            peer.sendall(pack_prelude(prelude.op, prelude.request_id, len(body), payload) + body)


def rss_nbytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_announced_bytes_that_never_come_cost_no_memory_and_no_time() -> None:
    def waits_s() -> float:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            thread = threading.Thread(target=lying_server, args=(listener, 1 << 30), daemon=True)
            thread.start()
            url = f"mmcache://127.0.0.1:{listener.getsockname()[1]}?transport=tcp&deadline_s=0.5"
            with mmcache.connect(url, lazy=True) as cache:
                before, start = rss_nbytes(), time.monotonic()
                leased = cache.acquire(keys_of(1, "announced"))
                took = time.monotonic() - start
                assert leased.frames == [None]
                assert rss_nbytes() - before < 64 * MiB
            thread.join(5)
        return took

    in_time(waits_s, 0.5 + SLACK_S)


def test_facts_of_namespaces_are_kept_within_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namespaces_module, "MAX_FACTS_NBYTES", 2500)
    shard = Shard(ServerConfig(memory_nbytes=MiB))
    facts = [{"model": f"m{i}", "text": "x" * 1000} for i in range(4)]
    ids = [namespace_id("kv", one) for one in facts]
    for namespace, one in zip(ids, facts, strict=True):
        shard.declare(0, namespace, "kv", one)
    assert [shard.declared(0, namespace) is not None for namespace in ids] == [False, False, True, True]
    assert shard.stat()["namespaces_forgotten"] == 2
    shard.close()


# ------------------------------------------------------------------------------------------- batches
def test_one_request_reserves_no_more_than_a_batch_may(server: ServerProcess) -> None:
    with Raw(server) as raw:
        joined = raw.join()
        limit = joined.limits.inline_nbytes
        assert limit == 16 * MiB
        status = raw.reserve(keys_of(24, "greedy"), [MiB] * 24)
        assert status == bytes([pb.WANTED] * 16 + [pb.OVERLOADED] * 8)


def test_what_is_not_wanted_is_not_in_flight(server: ServerProcess) -> None:
    """One key asked for many times over: only the first is wanted, so others are not kept from writing."""
    with Raw(server) as raw, mmcache.connect(server.url) as cache:
        raw.join()
        (key,) = keys_of(1, "again and again")
        status = raw.reserve(mmcache.Keys.of([key] * 2000), [1024] + [12 * MiB] * 1999)
        assert status == bytes([pb.WANTED] + [pb.BUSY] * 1999)
        keys = keys_of(2, "meanwhile")
        assert [result.outcome for result in cache.put(keys, values_of(keys, MiB))] == ["stored", "stored"]


def test_views_of_more_than_a_batch_are_leased_in_several(server: ServerProcess) -> None:
    with mmcache.connect(server.url) as cache:
        keys = keys_of(20, "views")
        assert all(cache.put(keys, values_of(keys, MiB)))
        with cache.acquire(keys) as leased:
            frames = [frame for frame in leased.frames if frame is not None]
            assert len(frames) == 20
            for frame in frames:
                frame.verify()
        assert eventually(lambda: cache.stat()["counters"]["leases"] == 0, "all leases were given back")


# ------------------------------------------------------------------------------------------- forks
def in_child(work: object) -> int:
    """Run `work` in a forked child; its exit code (1 after an exception), or a failure if it hangs."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()  # type: ignore[operator]
            code = 0
        finally:
            os._exit(code)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    pytest.fail("the child hung")


def test_a_child_may_close_a_client_whose_lock_was_taken_at_the_fork(server: ServerProcess) -> None:
    with mmcache.connect(server.url) as cache, cache._pool._changed:
        assert in_child(cache.close) == 0


def test_a_child_that_never_uses_the_client_does_not_hold_its_connections(server: ServerProcess) -> None:
    with mmcache.connect(server.url) as observer:
        eventually(lambda: observer.stat()["counters"]["connections"] == 1, "connections of earlier tests ended")
        cache = mmcache.connect(server.url)
        try:
            eventually(lambda: observer.stat()["counters"]["connections"] == 2, "no other connection is left")
        except BaseException:
            cache.close()
            raise
        pid = os.fork()
        if pid == 0:
            time.sleep(30)
            os._exit(0)
        try:
            cache.close()
            eventually(lambda: observer.stat()["counters"]["connections"] == 1, "the connection ended")
        finally:
            os.kill(pid, 9)
            os.waitpid(pid, 0)


def test_a_child_may_count_though_the_counting_lock_was_taken_at_the_fork(server: ServerProcess) -> None:
    with mmcache.connect(server.url) as cache, cache._counting:
        assert in_child(lambda: cache.get_into(keys_of(1, "nothing"), blanks(1, 8))) == 0


def test_a_link_in_use_at_a_fork_is_closed_in_the_child(server: ServerProcess) -> None:
    with mmcache.connect(server.url) as cache:
        link = cache._pool.borrow(time.monotonic() + 5)
        assert isinstance(link, SocketLink)
        fd = link.channel.sock.fileno()
        assert fd >= 0

        def closed() -> None:
            assert link.channel.sock.fileno() == -1

        assert in_child(closed) == 0
        assert link.channel.sock.fileno() == fd
        cache._pool.give_back(link)


def test_a_child_copies_large_batches_too(server: ServerProcess) -> None:
    with mmcache.connect(server.url) as cache:
        keys = keys_of(12, "large in the child")
        values = values_of(keys, MiB)
        assert all(cache.put(keys, values))
        targets = blanks(12, MiB)
        assert all(cache.get_into(keys, targets))

        def read_again() -> None:
            again = blanks(12, MiB)
            assert all(cache.get_into(keys, again))
            assert all(map(np.array_equal, again, values))

        assert in_child(read_again) == 0
