"""AsyncClient in trouble: a lease that is lost, a server that is killed, stopped, or was never there."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time

import pytest

import mmcache
from mmcache.errors import LeaseLost, TransportError
from mmcache.testing.process import ServerProcess
from tests.integration.on_a_loop import eventually, reaching
from tests.integration.support import MiB, blanks, keys_of, reserved_address, suspend, values_of

LEASE_S = 0.8


def test_a_lease_that_expired_is_told_on_leaving_and_after_an_error_only_the_error_is() -> None:
    keys = keys_of(1, "lost")

    async def hold(cache: mmcache.AsyncClient, error: Exception | None) -> None:
        async with cache.acquire(keys) as lease:
            assert lease.frames[0] is not None
            await asyncio.sleep(1.3 * LEASE_S)
            if error is not None:
                raise error

    async def main() -> None:
        with ServerProcess("64MiB", "--lease-s", str(LEASE_S)) as server:
            async with reaching(server) as cache:
                assert all(await cache.put(keys, values_of(keys, 5000)))
                with pytest.raises(LeaseLost, match="expired"):
                    await hold(cache, None)
                with pytest.raises(ZeroDivisionError):
                    await hold(cache, ZeroDivisionError())

                async def holds() -> bool:  # a machine that stands still may lose one lease, not all
                    async with cache.acquire(keys) as lease:
                        assert lease.frames[0] is not None
                        lease.frames[0].verify()
                        return await lease.release()

                await eventually(holds, "a lease is given back in time")
                assert (await cache.stat())["counters"]["leases"] == 0

    asyncio.run(main())


@pytest.mark.parametrize(("end", "path"), [("killed", "shm"), ("killed", "tcp"), ("stopped", "shm")])
def test_a_server_that_dies_under_many_tasks_is_misses_in_time_and_answers_when_it_is_back(
    end: str, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "mmcache.client")
    with reserved_address() as listen:
        dies_under_many_tasks(end, path, listen)
    told = [record.message for record in caplog.records if "answer" in record.message]
    assert len(told) == 2
    assert "does not answer" in told[0]
    assert "answers again" in told[1]


def dies_under_many_tasks(end: str, path: str, listen: str) -> None:
    server = ServerProcess("64MiB", listen=listen).start()
    servers = [server]
    keys = keys_of(4, "dying")
    values, deadline_s = values_of(keys, MiB), 8.0
    read = 0

    async def read_until_it_fails(cache: mmcache.AsyncClient) -> float:
        """How long the longest call took."""
        nonlocal read
        longest_s = 0.0
        while True:
            start = time.monotonic()
            outcomes = {str(result.outcome) for result in await cache.get_into(keys, blanks(4, MiB))}
            longest_s = max(longest_s, time.monotonic() - start)
            if outcomes != {"hit"}:
                assert outcomes in ({"unavailable"}, {"hit", "unavailable"})
                return longest_s
            read += 1

    async def main() -> None:
        async with mmcache.AsyncClient(f"mmcache://{listen}?transport={path}&deadline_s={deadline_s}") as cache:
            assert all(await cache.put(keys, values))
            readers = [asyncio.ensure_future(read_until_it_fails(cache)) for _ in range(12)]
            await eventually(lambda: asyncio.sleep(0, read > 24), "much is read")
            if end == "killed":
                server.stop(signal.SIGKILL)
            else:
                suspend(server.pid)
            assert max(await asyncio.gather(*readers)) < 1.8 * deadline_s  # never two of them
            assert cache._breaker.pause_s > 0
            with pytest.raises(TransportError):
                await cache.stat()
            if end == "stopped":
                os.kill(server.pid, signal.SIGCONT)
            else:
                servers.append(ServerProcess("64MiB", listen=listen).start())
            await eventually(lambda: stores(cache), "it answers again")
            assert all(await cache.get_into(keys, blanks(4, MiB)))
            assert cache._pool.count == len(cache._pool._idle)

    async def stores(cache: mmcache.AsyncClient) -> bool:
        return all(await cache.put(keys, values))

    try:
        asyncio.run(main())
    finally:
        for started in servers:
            started.stop()


def test_without_a_server_opening_raises_and_a_lazy_client_misses() -> None:
    async def main() -> None:
        with pytest.raises(TransportError, match="mmcache serve"):
            async with mmcache.AsyncClient("mmcache://127.0.0.1:1"):
                pass
        async with mmcache.AsyncClient("mmcache://127.0.0.1:1", lazy=True) as nobody:
            keys = keys_of(100, "nobody")
            assert await nobody.match_prefix(keys) == 0
            assert await nobody.contains(keys) == [False] * 100
            got, put = await nobody.get_many(keys, blanks(100, 8)), await nobody.put_many(keys, blanks(100, 8))
            assert {str(result.outcome) for result in got + put} == {"unavailable"}
            async with nobody.acquire(keys) as lease:
                assert lease.frames == [None] * 100
            for call in (nobody.delete(keys), nobody.stat(), nobody.inspect(keys.digests[0])):
                with pytest.raises(TransportError):
                    await call

    asyncio.run(main())
