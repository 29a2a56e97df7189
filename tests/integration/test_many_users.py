"""Forked and spawned children and many threads: connections stay in step, whoever uses the client when."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

import mmcache
from mmcache.client.blocking import Client
from mmcache.testing.process import ServerProcess
from mmcache.transport.base import Outcome
from tests.integration.support import PATIENCE_S, blanks, child, keys_of, values_of

pytestmark = pytest.mark.alone

COUNT, NBYTES = 8, 50_000


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess("256MiB") as process:
        yield process


@pytest.fixture(params=["shm", "tcp"])
def cache(request: pytest.FixtureRequest, server: ServerProcess) -> Iterator[Client]:
    with mmcache.connect(f"{server.url}?transport={request.param}", deadline_s=20) as client:
        yield client


def right(cache: Client, label: str) -> bool:
    """Put (if it is not there) and get this label's values: all there, all right."""
    keys = keys_of(COUNT, label)
    values, buffers = values_of(keys, NBYTES), blanks(COUNT, NBYTES)
    return (
        all(cache.put(keys, values))
        and all(cache.get_into(keys, buffers))
        and all(map(np.array_equal, values, buffers))
    )


def exits_with(process: multiprocessing.context.ForkProcess) -> int | None:
    process.join(PATIENCE_S)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode


def fork(cache: Client, label: str, rounds: int = 3) -> multiprocessing.context.ForkProcess:
    def run() -> None:
        os._exit(0 if all(right(cache, f"{label}/{i}") for i in range(rounds)) else 1)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def test_a_forked_child_and_its_parent_both_go_on(cache: Client) -> None:
    assert right(cache, "before")  # the parent has a connection to inherit
    children = [fork(cache, f"fork/{i}") for i in range(3)]
    for i in range(10):
        assert right(cache, f"parent/{i}")
    assert [exits_with(process) for process in children] == [0, 0, 0]
    assert right(cache, "after")
    assert cache.counters["failures"] == 0


def test_a_child_that_closes_the_inherited_client_does_not_cut_the_parent_off(cache: Client) -> None:
    assert right(cache, "shared")

    def run() -> None:
        cache.close()
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    assert exits_with(process) == 0
    assert right(cache, "shared")
    assert cache.counters["failures"] == 0


def test_a_fork_while_other_threads_are_calling_hangs_nobody(cache: Client) -> None:
    done, failed = threading.Event(), []

    def busy(number: int) -> None:
        while not done.is_set():
            if not right(cache, f"busy/{number}"):
                failed.append(number)

    threads = [threading.Thread(target=busy, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        codes = [exits_with(fork(cache, f"amid/{i}", rounds=1)) for i in range(5)]
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert codes == [0] * 5
    assert failed == []


def test_a_lease_taken_before_a_fork_stays_the_parents(cache: Client) -> None:
    keys = keys_of(2, "leased across")
    cache.put(keys, values_of(keys, NBYTES))
    with cache.acquire(keys) as lease:
        assert exits_with(fork(cache, "beside a lease", rounds=1)) == 0
        for frame in lease.frames:
            assert frame is not None
            frame.verify()


def test_spawned_children_share_what_the_parent_stored(server: ServerProcess, cache: Client) -> None:
    assert right(cache, "spawn")
    with (
        child("round_trip", server.url, "spawn", str(COUNT), str(NBYTES)) as first,
        child("round_trip", f"{server.url}?transport=tcp", "spawn", str(COUNT), str(NBYTES)) as second,
    ):
        for spawned in (first, second):
            assert spawned.hear() == {"stored": True, "hit": True, "right": True}
            assert spawned.end() == 0


def test_an_embedded_cache_stays_in_its_process() -> None:
    with mmcache.connect("embedded://?memory=4MiB") as cache:
        keys = keys_of(1, "embedded")
        assert all(cache.put(keys, values_of(keys, 100)))

        def run() -> None:
            (result,) = cache.get_into(keys, blanks(1, 100))
            cache.close()
            os._exit(0 if result.outcome is Outcome.UNAVAILABLE and "mmcache serve" in result.reason else 1)

        process = multiprocessing.get_context("fork").Process(target=run)
        process.start()
        assert exits_with(process) == 0
        assert all(cache.get_into(keys, blanks(1, 100)))


@pytest.mark.parametrize("threads", [4, 24])
def test_many_threads_share_one_client(cache: Client, threads: int) -> None:
    failed: list[str] = []

    def work(number: int) -> None:
        for turn in range(6):
            label = f"thread/{threads}/{(number + turn) % 5}"  # they meet at the same keys
            keys = keys_of(COUNT, label)
            values, buffers = values_of(keys, NBYTES), blanks(COUNT, NBYTES)
            busy = {"another client is writing this key"}
            if not all(result or result.reason in busy for result in cache.put(keys, values)):
                failed.append(f"{label}: put")
            for result, value, buffer in zip(cache.get_into(keys, buffers), values, buffers, strict=True):
                if not (np.array_equal(value, buffer) if result else result.outcome is Outcome.MISS):
                    failed.append(f"{label}: {result}")
            with cache.acquire(keys) as lease:
                for frame in lease.frames:
                    if frame is not None:
                        frame.verify()

    running = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert failed == []
    assert cache.counters["failures"] == 0
    assert right(cache, f"thread/{threads}/0")


def test_a_child_killed_in_the_middle_of_its_calls_disturbs_nobody(server: ServerProcess, cache: Client) -> None:
    started = multiprocessing.get_context("fork").Event()

    def run() -> None:
        number = 0
        while True:
            right(cache, f"doomed/{number}")
            started.set()
            number += 1

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    assert started.wait(PATIENCE_S)
    time.sleep(0.05)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    assert exits_with(process) == -signal.SIGKILL
    assert right(cache, "survivor")
    assert cache.counters["verify_failures"] == 0
