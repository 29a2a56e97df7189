"""What tests of AsyncClient share, and an AsyncClient that tests written for the blocking client can call."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Self, TypeVar

import mmcache
from mmcache.client.aio import AsyncLease
from mmcache.testing.process import ServerProcess
from tests.integration.support import PATIENCE_S

T = TypeVar("T")


@asynccontextmanager
async def reaching(server: ServerProcess, path: str = "shm", **settings: Any) -> AsyncIterator[mmcache.AsyncClient]:
    """A client of the server, and in the end nothing left behind: no task, no descriptor of ours."""
    options = "".join(f"&{name}={value}" for name, value in settings.items())
    before = set(asyncio.all_tasks())
    async with mmcache.AsyncClient(f"{server.url}?transport={path}&deadline_s=20{options}") as cache:
        assert (await cache.stat())["transport"] == path
        yield cache
        assert cache._pool.count == len(cache._pool._idle)
    assert cache._pool.count == 0
    assert set(asyncio.all_tasks()) == before


async def eventually(holds: Any, what: str) -> None:
    """Await `holds()` until it is true; fail the test naming `what` if it never is."""
    deadline = time.monotonic() + PATIENCE_S
    while not await holds():
        assert time.monotonic() < deadline, f"never happened: {what}"
        await asyncio.sleep(0.02)


class OnALoop:
    """Every call runs a loop until it is done. Has the calls of `Client`. Use as a context manager."""

    def __init__(self, client: mmcache.AsyncClient, loop: Callable[[], Any] = asyncio.new_event_loop) -> None:
        self.client, self.loop = client, loop()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.client, name)
        if not inspect.iscoroutinefunction(found):
            return found
        return lambda *words, **more: self.wait(found(*words, **more))

    def wait(self, call: Coroutine[Any, Any, T]) -> T:
        """What an asynchronous call returns."""
        result: T = self.loop.run_until_complete(call)
        return result

    def acquire(self, keys: Any) -> LeaseOnALoop:
        """As `Client.acquire`."""
        return LeaseOnALoop(self, self.client.acquire(keys))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.wait(self.client.close())
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()


class LeaseOnALoop:
    """Has what `LeasedFrames` has."""

    def __init__(self, runner: OnALoop, lease: AsyncLease) -> None:
        self._runner, self._lease = runner, lease

    @property
    def frames(self) -> Any:
        """The lease's."""
        return self._lease.frames

    def release(self) -> bool:
        """The lease's."""
        return self._runner.wait(self._lease.release())

    def __enter__(self) -> Self:
        self._runner.wait(self._lease.__aenter__())
        return self

    def __exit__(self, *error: Any) -> None:
        self._runner.wait(self._lease.__aexit__(*error))
