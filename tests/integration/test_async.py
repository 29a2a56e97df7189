"""AsyncClient beyond what both clients do alike: cancellation, many tasks, bounds, loops, a dead server."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
import threading
import time
from collections.abc import Awaitable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest

import mmcache
from mmcache.client.aio_link import INLINE_NBYTES, Workers, drive_async
from mmcache.client.protocol import Effect, Flow, Work
from mmcache.config import ClientConfig
from mmcache.errors import UsageError
from mmcache.testing.process import ServerProcess
from mmcache.transport.base import Outcome
from tests.integration.on_a_loop import OnALoop, eventually, reaching
from tests.integration.support import PATIENCE_S, Bytes, MiB, blanks, in_time, keys_of, value_of, values_of
from tests.integration.support import eventually as wait_until

LEASE_S = 6.0  # reservations end with it too: a machine that stands still for seconds loses none
LARGE_NBYTES = 8 * MiB
PATHS = pytest.mark.parametrize("path", ["shm", "tcp"])


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess("512MiB", "--lease-s", str(LEASE_S)) as process:
        yield process


async def connections(observer: mmcache.AsyncClient) -> int:
    """How many connections the server has, the observer's own not counted."""
    counters: dict[str, int] = (await observer.stat())["counters"]
    return counters["connections"] - 1


async def worst_lag_s(work: Awaitable[Any]) -> float:
    """How late the loop was at worst while this ran."""
    task = asyncio.ensure_future(work)
    worst = 0.0
    while not task.done():
        start = time.monotonic()
        await asyncio.sleep(0.001)
        worst = max(worst, time.monotonic() - start)
    await task
    return worst


# ------------------------------------------------------------------------------------------ many at once
@PATHS
def test_a_hundred_tasks_share_a_few_connections(server: ServerProcess, path: str) -> None:
    async def one(cache: mmcache.AsyncClient, label: str) -> bool:
        keys, nbytes = keys_of(3, label), 20_000
        values, buffers = values_of(keys, nbytes), blanks(3, nbytes)
        stored = all(await cache.put(keys, values))
        matched = await cache.match_prefix(keys) == 3 and all(await cache.contains(keys))
        read = all(await cache.get_into(keys, buffers)) and all(map(np.array_equal, buffers, values))
        return stored and matched and read

    async def main() -> None:
        async with reaching(server, path, max_connections=3) as cache:
            assert all(await asyncio.gather(*(one(cache, f"hundred/{path}/{i}") for i in range(100))))
            assert cache._pool.count == 3
            assert cache.counters["failures"] == 0

    asyncio.run(main())


@PATHS
@pytest.mark.parametrize(("concurrency", "allowed", "used"), [(1, 8, 1), (3, 8, 3), (50, 4, 4)])
def test_many_is_as_concurrent_as_it_is_told_to_be(
    server: ServerProcess, path: str, concurrency: int, allowed: int, used: int
) -> None:
    keys = keys_of(30, f"bounded/{path}/{concurrency}")
    values, buffers = values_of(keys, MiB), blanks(30, MiB)

    async def main() -> None:
        async with reaching(server) as observer:

            async def alone() -> bool:
                return await connections(observer) == 0

            async def as_told() -> bool:
                return await connections(observer) == used

            await eventually(alone, "the connections of earlier tests ended")
            async with reaching(server, path, max_connections=allowed) as cache:
                stored = await cache.put_many(keys, values, concurrency=concurrency)
                assert [result.outcome for result in stored] == ["stored"] * 30
                await eventually(as_told, f"{used} connections, and none left over from finding the shortest path")
            await eventually(alone, "the connections end with the client")
            async with reaching(server, path, max_connections=allowed) as cache:
                assert all(await cache.get_many(keys, buffers, concurrency=concurrency))
                await eventually(as_told, f"{used} connections stay")
                assert cache.counters["hits"] == 30

    asyncio.run(main())
    assert all(map(np.array_equal, buffers, values))


def test_many_answers_in_order_with_one_result_a_key(server: ServerProcess) -> None:
    keys = keys_of(500, "order")
    held = keys[::3]
    nbytes = 3000

    async def main() -> None:
        async with reaching(server) as cache:
            assert all(await cache.put_many(held, values_of(held, nbytes)))
            buffers: list[Any] = blanks(500, nbytes)
            buffers[6] = np.zeros(7, np.uint8)
            results = await cache.get_many(keys, buffers)
            wanted = ["hit" if row % 3 == 0 else "miss" for row in range(500)]
            wanted[6] = "mismatch"
            assert [result.outcome for result in results] == wanted
            right = [
                np.array_equal(buffer, value_of(k, nbytes)) for buffer, k in zip(buffers, keys.digests, strict=True)
            ]
            assert right == [outcome == "hit" for outcome in wanted]
            assert await cache.get_many([], []) == await cache.put_many([], []) == []
            with pytest.raises(UsageError, match="concurrency is 0"):
                await cache.get_many(keys, blanks(500, 1), concurrency=0)
            with pytest.raises(UsageError, match="500 keys but 1"):
                await cache.put_many(keys, blanks(1, 1))

    asyncio.run(main())


def test_who_waits_for_a_connection_until_the_deadline_misses_and_the_server_is_not_blamed(
    server: ServerProcess,
) -> None:
    async def main() -> None:
        async with reaching(server, max_connections=1) as cache:
            cache.config = ClientConfig(deadline_s=0.2)
            link = await cache._pool.borrow(time.monotonic() + 1)
            waiting = asyncio.gather(*(cache.get_into(keys_of(1, "busy"), blanks(1, 8)) for _ in range(5)))
            results = [result for (result,) in await waiting]
            assert {result.outcome for result in results} == {Outcome.UNAVAILABLE}
            assert all("raise max_connections" in result.reason for result in results)
            assert cache.answering
            cache.config = ClientConfig(deadline_s=20)
            given_up = asyncio.ensure_future(cache.match_prefix(keys_of(1, "busy")))
            last = asyncio.ensure_future(cache.get_into(keys_of(1, "busy"), blanks(1, 8)))
            await asyncio.sleep(0.01)
            cache._pool.give_back(link)
            given_up.cancel()  # it has been handed the link already, and passes it on
            assert (await last)[0].outcome is Outcome.MISS

    asyncio.run(main())


# ------------------------------------------------------------------------------------------ cancellation
@PATHS
def test_calls_cancelled_anywhere_leave_a_client_that_works_and_nothing_held(server: ServerProcess, path: str) -> None:
    keys, nbytes = keys_of(6, f"cancelled/{path}"), LARGE_NBYTES // 2
    values, chance = values_of(keys, nbytes), random.Random(7)

    async def one(cache: mmcache.AsyncClient, number: int) -> None:
        if number % 2:
            await cache.get_into(keys[:3], blanks(3, nbytes))
        else:
            fresh = keys_of(1, f"cancelled/{path}/{number}")
            await cache.put(fresh, values[:1])

    async def main() -> None:
        async with reaching(server, path) as cache:
            assert all(await cache.put(keys, values))
            for _ in range(2):
                tasks = [asyncio.ensure_future(one(cache, number)) for number in range(50)]
                for task in tasks:
                    await asyncio.sleep(chance.random() * 0.004)
                    task.cancel()
                ended = await asyncio.gather(*tasks, return_exceptions=True)
                assert any(isinstance(end, asyncio.CancelledError) for end in ended)
                assert all(end is None or isinstance(end, asyncio.CancelledError) for end in ended)
                assert cache._pool.count == len(cache._pool._idle)
                del tasks, task, ended
            buffers = blanks(6, nbytes)
            assert all(await cache.get_many(keys, buffers))
            assert all(map(np.array_equal, buffers, values))

            async def nothing_held() -> bool:
                counters = (await cache.stat())["counters"]
                return not any(counters[name] for name in ("leases", "reservations", "held_bytes", "inflight_bytes"))

            await eventually(nothing_held, "leases and reservations of cancelled calls ended")
            assert cache.counters["failures"] == 0

    def open_fds() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    fds = open_fds()
    asyncio.run(main())
    # Earlier tests' threads may still close some of their own.
    wait_until(lambda: open_fds() <= fds, "no more files are open")


@PATHS
def test_nothing_is_written_after_a_cancelled_read(server: ServerProcess, path: str) -> None:
    keys = keys_of(1, f"after/{path}")

    async def main() -> int:
        interrupted = 0
        async with reaching(server, path) as cache:
            assert all(await cache.put(keys, values_of(keys, 4 * LARGE_NBYTES)))
            for step in range(12):
                buffer = np.zeros(4 * LARGE_NBYTES, np.uint8)
                task = asyncio.ensure_future(cache.get_into(keys, [buffer]))
                await asyncio.sleep(0.001 * step)
                task.cancel()
                await asyncio.wait([task])
                interrupted += task.cancelled()
                before = buffer.copy()
                await asyncio.sleep(0.01)
                assert np.array_equal(before, buffer)
        return interrupted

    assert asyncio.run(main())


def test_cancelling_waits_for_work_that_has_begun_and_drops_what_has_not() -> None:
    ran: list[str] = []
    began, go_on = threading.Event(), threading.Event()

    def work(label: str) -> None:
        began.set()
        assert go_on.wait(PATIENCE_S)
        ran.append(label)

    async def main() -> None:
        workers = Workers(1)

        def started(label: str) -> asyncio.Task[Any]:
            return asyncio.ensure_future(workers.run(Work(partial(work, label), 2 * INLINE_NBYTES)))

        tasks = [started(label) for label in ("begun", "queued")]
        await eventually(lambda: asyncio.sleep(0, began.is_set()), "the first has begun")
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks[1:])
        await asyncio.sleep(0.05)
        assert not tasks[0].done()
        go_on.set()
        await asyncio.wait(tasks)
        assert all(task.cancelled() for task in tasks)
        assert ran == ["begun"]
        await started("next")  # the one thread would do what is queued first
        assert ran == ["begun", "next"]
        workers.close()

    asyncio.run(main())


# ------------------------------------------------------------------------------------------ the loop
def test_a_flow_that_never_has_to_wait_still_gives_other_tasks_their_turns() -> None:
    def flow() -> Flow[str]:
        for _ in range(20):
            yield Work(partial(time.sleep, 0.002), 1)
        return "done"

    async def main() -> int:
        workers, turns = Workers(1), 0

        async def perform(work: Effect) -> None:
            assert isinstance(work, Work)
            await workers.run(work)

        driven = asyncio.ensure_future(drive_async(flow(), perform))
        while not driven.done():
            await asyncio.sleep(0)
            turns += 1
        assert driven.result() == "done"
        workers.close()
        return turns

    assert asyncio.run(main()) > 15


@PATHS
def test_the_loop_goes_on_while_much_is_read_and_written(server: ServerProcess, path: str) -> None:
    keys, nbytes = keys_of(1, f"lag/{path}"), 64 * MiB
    value = np.resize(value_of(keys.digests[0], MiB), nbytes)

    async def main() -> float:
        buffer: Bytes = np.zeros(nbytes, np.uint8)
        async with reaching(server, path) as cache:
            await cache.delete(keys)
            written = await worst_lag_s(cache.put(keys, [value]))
            read = await worst_lag_s(cache.get_into(keys, [buffer]))
        assert np.array_equal(buffer, value)
        return max(written, read)

    in_time(lambda: asyncio.run(main()), 0.25, tries=12)


def test_a_client_is_one_loops_until_that_is_closed(server: ServerProcess) -> None:
    cache = mmcache.AsyncClient(f"{server.url}?deadline_s=20")
    first, second = asyncio.new_event_loop(), asyncio.new_event_loop()
    assert first.run_until_complete(cache.match_prefix(keys_of(1, "nothing"))) == 0
    with pytest.raises(UsageError, match="another event loop"):
        second.run_until_complete(cache.match_prefix(keys_of(1, "nothing")))
    first.close()
    assert second.run_until_complete(cache.stat())["transport"] == "shm"
    second.run_until_complete(cache.close())
    with pytest.raises(UsageError, match="closed"):
        second.run_until_complete(cache.get_into(keys_of(1, "nothing"), blanks(1, 8)))
    second.close()


def test_a_forked_child_is_told_to_make_its_own_and_the_parents_connection_ends_with_the_parents_close(
    server: ServerProcess,
) -> None:
    with mmcache.connect(server.url) as observer, OnALoop(mmcache.AsyncClient(server.url)) as cache:
        assert cache.stat()["transport"] == "shm"
        both = observer.stat()["counters"]["connections"]
        pid = os.fork()
        if pid == 0:
            loop = asyncio.new_event_loop()
            try:
                loop.run_until_complete(cache.client.stat())
            except UsageError:
                time.sleep(30)
            os._exit(1)
        try:
            cache.close()
            deadline = time.monotonic() + PATIENCE_S
            while observer.stat()["counters"]["connections"] == both and time.monotonic() < deadline:
                time.sleep(0.02)
            assert observer.stat()["counters"]["connections"] < both
            assert os.waitpid(pid, os.WNOHANG) == (0, 0)  # it did hear UsageError
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def test_closing_tells_those_who_wait_and_lets_those_under_way_end(server: ServerProcess) -> None:
    keys = keys_of(1, "closing")

    async def main() -> None:
        cache = await mmcache.AsyncClient(f"{server.url}?max_connections=1").open()
        assert all(await cache.put(keys, values_of(keys, LARGE_NBYTES)))
        buffers = blanks(1, LARGE_NBYTES)
        under_way = asyncio.ensure_future(cache.get_into(keys, buffers))
        waiting = asyncio.ensure_future(cache.match_prefix(keys))
        await asyncio.sleep(0)
        await cache.close()
        assert all(await under_way)
        with pytest.raises(UsageError, match="closed"):
            await waiting
        assert cache._pool.count == 0
        assert repr(cache).endswith(" closed>")

    asyncio.run(main())


def test_the_whole_client_runs_on_uvloop_where_that_is_installed(server: ServerProcess) -> None:
    uvloop = pytest.importorskip("uvloop")
    keys = keys_of(4, "uvloop")
    values, buffers = values_of(keys, LARGE_NBYTES), blanks(4, LARGE_NBYTES)
    for path in ("shm", "tcp"):
        url = f"{server.url}?transport={path}&deadline_s=20"
        with OnALoop(mmcache.AsyncClient(url), uvloop.new_event_loop) as cache:
            cache.delete(keys)
            assert all(cache.put_many(keys, values))
            assert all(cache.get_many(keys, buffers))
            assert all(map(np.array_equal, buffers, values))
