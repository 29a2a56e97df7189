"""The asyncio client: the calls of the blocking one, to be awaited, and many at once.

For one event loop; any number of its tasks may share a client. No thread waits for sockets: only large copies and
hashes leave the loop. Data calls raise only UsageError; whatever happens to the server comes back as outcomes. A call
that is cancelled leaves nothing behind but what ends by itself: its link is closed, its leases expire.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from mmcache.client import calls
from mmcache.client.aio_link import AsyncDialer, AsyncLink
from mmcache.client.aio_pool import AsyncPool
from mmcache.client.calls import AnyKeys, AnyMedia, Get, Put
from mmcache.client.core import ClientCore, Lent
from mmcache.client.lease import LEASE_LOST, Taken, nothing_taken, take_lease
from mmcache.client.pin import count_prefix
from mmcache.client.plan import put_batches
from mmcache.client.protocol import STOPPED_READS, STOPPED_WRITES, Flow
from mmcache.config import ClientConfig
from mmcache.errors import ConfigError, LeaseLost, MMCacheError, UsageError
from mmcache.frame_view import Frame
from mmcache.keyset import Keys
from mmcache.pb import cache_pb2 as pb
from mmcache.transport.aio import AsyncChannel
from mmcache.transport.base import Result
from mmcache.transport.shm import ArenaMap

C = TypeVar("C", Get, Put)
T = TypeVar("T")
PART_KEYS: Final = 64  # of get_many and put_many, in one conversation
PART_NBYTES: Final = 8 << 20


class AsyncLease:
    """`LeasedFrames` for asyncio: `async with` takes the lease, leaving the block gives it back."""

    def __init__(
        self, take: Callable[[], Awaitable[Taken]], release: Callable[[Sequence[int]], Awaitable[bool]]
    ) -> None:
        self.frames: list[Frame | None] = []
        self._lease_ids: list[int] = []
        self._take, self._release = take, release

    async def __aenter__(self) -> Self:
        self.frames, self._lease_ids = await self._take()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        held = await self.release()
        if not held and error is None:
            raise LeaseLost(LEASE_LOST)

    async def release(self) -> bool:
        """Give the lease back; True if everything seen under it was right until now. Safe to call twice."""
        lease_ids, self._lease_ids = self._lease_ids, []
        self.frames = [None] * len(self.frames)
        return await self._release(lease_ids) if lease_ids else True


class LoopClient(ClientCore):
    """`mmcache.AsyncClient` without the URL: from settings. Use as an asynchronous context manager, or await `close`.

    `counters` and `announces` are those of `Client`.
    """

    def __init__(self, config: ClientConfig, attach: Callable[[], AsyncChannel] | None = None) -> None:
        super().__init__(config)
        if config.transport == "grpc":
            raise ConfigError(
                "the asyncio client does not speak gRPC; use transport=tcp, or mmcache.connect and asyncio.to_thread"
            )
        self._dialer = AsyncDialer(config, attach)
        self._pool = AsyncPool(self._dialer, config.max_connections)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def _closed(self) -> bool:
        return self._pool.closed

    @property
    def _arena(self) -> ArenaMap | None:
        return self._dialer.arena

    # ------------------------------------------------------------------ data operations

    async def match_prefix(self, keys: AnyKeys) -> int:
        """How many leading keys are stored. 0 when the server cannot be asked. Nothing is pinned: they may go again."""
        rows = Keys.of(keys)
        ask = partial(count_prefix, digests=rows.digests)
        return await self._attempt(ask, lambda reason: 0) if len(rows) else 0

    async def contains(self, keys: AnyKeys) -> list[bool]:
        """Per key, whether it is stored. All False when the server cannot be asked. Nothing is pinned."""
        rows = Keys.of(keys)
        ask = partial(calls.contains, digests=rows.digests)
        return await self._attempt(ask, lambda reason: [False] * len(rows)) if len(rows) else []

    async def get_into(self, keys: AnyKeys, buffers: Sequence[Any], *, verify: bool | None = None) -> list[Result]:
        """Fill one destination per key; one Result per key, true for a hit. As `Client.get_into`.

        Once the call has ended, also by cancellation, no destination is written any more.
        """
        get = Get.of(keys, buffers, self._verifies(verify), self._copier)
        return await self._get(get, self._deadline())

    async def get_many(
        self, keys: AnyKeys, buffers: Sequence[Any], *, concurrency: int = 8, verify: bool | None = None
    ) -> list[Result]:
        """As `get_into`, in parts of at most 64 keys and 8 MiB, at most `concurrency` of them under way at once.

        Results are in the order of the keys. One deadline holds for the whole call: parts it leaves no time for are
        unavailable. More than the settings' `max_connections` parts are never under way.
        """
        get = Get.of(keys, buffers, self._verifies(verify), self._copier)
        return await self._in_parts(get, concurrency, self._get)

    async def put(
        self, keys: AnyKeys, tensors: Sequence[Any], *, ttl_s: float | None = None, media: AnyMedia = None
    ) -> list[Result]:
        """Store one value per key; one Result per key: stored, present or refused, with the reason. As `Client.put`.

        The values must not change until the call has ended.
        """
        return await self._put(Put.of(keys, tensors, ttl_s, media, self._native.hasher), self._deadline())

    async def put_many(
        self,
        keys: AnyKeys,
        tensors: Sequence[Any],
        *,
        concurrency: int = 8,
        ttl_s: float | None = None,
        media: AnyMedia = None,
    ) -> list[Result]:
        """As `put`, in parts like those of `get_many`."""
        return await self._in_parts(Put.of(keys, tensors, ttl_s, media, self._native.hasher), concurrency, self._put)

    def acquire(self, keys: AnyKeys) -> AsyncLease:
        """Pin entries and see them without a copy (same host) or received whole: use with `async with`.

        `frames[i]` is a Frame or None. Views are unverified until `frame.verify()`, and valid inside the block only:
        leaving it raises LeaseLost if the lease had expired. Never raises for a missing server: all frames are None.
        """
        rows = Keys.of(keys)

        async def take() -> Taken:
            ask = partial(take_lease, digests=rows.digests)
            return await self._attempt(ask, lambda reason: nothing_taken(len(rows))) if len(rows) else ([], [])

        return AsyncLease(take, self._release)

    async def delete(self, keys: AnyKeys) -> list[bool]:
        """Forget entries; True per key that was there. Raises TransportError when the server cannot be asked."""
        return await self._demand(partial(calls.delete, digests=Keys.of(keys).digests), self._deadline())

    # ------------------------------------------------------------------ administration: these raise TransportError

    async def stat(self) -> dict[str, Any]:
        """The server's counters and gauges, and how this client reaches it."""
        return await self._demand(calls.stat, self._deadline())

    async def inspect(self, digest: bytes) -> pb.InspectReply:
        """What is known of one stored key (32 bytes): its frame's header and its namespace's facts."""
        return await self._demand(partial(calls.inspect, digest=digest), self._deadline())

    async def close(self) -> None:
        """Close every link; those in use are closed when their call ends. Leases still held end by themselves."""
        self._pool.close()
        self._dialer.forget_arena()
        self._dialer.workers.close()

    async def _get(self, get: Get, deadline: float) -> list[Result]:
        if get.results:
            await self._attempt(get.flow, get.fail, deadline)
        counts = get.counts()
        self._count(counts)
        if counts["verify_failures"]:  # the reads are done: nothing depends on the answer
            with contextlib.suppress(MMCacheError, OSError):
                await self._demand(partial(calls.recheck, digests=get.corrupt()), deadline)
        return get.results

    async def _put(self, put: Put, deadline: float) -> list[Result]:
        if put.results:
            await self._attempt(put.flow, put.fail, deadline, STOPPED_WRITES)
        self._count(put.counts())
        return put.results

    async def _in_parts(self, whole: C, concurrency: int, run: Callable[[C, float], Any]) -> list[Result]:
        """Run a call part by part, `concurrency` parts at once; the results in order."""
        if not isinstance(concurrency, int) or concurrency < 1:
            raise UsageError(f"concurrency is {concurrency!r}; give a whole number of parts, 1 or more")
        deadline = self._deadline()
        left: Iterator[range] = put_batches(whole.sizes(), PART_KEYS, PART_NBYTES)

        async def work() -> None:
            for keys in left:
                whole.results[keys.start : keys.stop] = await run(whole.part(keys), deadline)

        parts = min(concurrency, self.config.max_connections, len(whole.results))
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(parts):
                    group.create_task(work())
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return whole.results

    async def _demand(self, ask: Callable[[AsyncLink], Flow[T]], deadline: float) -> T:
        """Run a flow on a link; one more try on a fresh link if a kept one turns out to be dead."""
        pool = self._pool
        while True:
            link = await pool.borrow(deadline)
            with Lent(pool, link, deadline):
                result = await link.run(ask(link), deadline)
                self._heard(link)
                return result

    async def _attempt(
        self,
        ask: Callable[[AsyncLink], Flow[T]],
        fail: Callable[[str], T],
        deadline: float | None = None,
        needs: int = STOPPED_READS,
    ) -> T:
        """As `_demand`, but a failure becomes `fail(reason)`; a server that just failed is left alone for a while."""
        if reason := self._resting(needs):
            return fail(reason)
        failures, begun_s = self._breaker.failures, time.monotonic()
        try:
            result = await self._demand(ask, self._deadline() if deadline is None else deadline)
        except UsageError:
            raise
        except Exception as error:
            return fail(self._failed(error, begun_s))
        self._succeeded(failures)
        return result

    async def _release(self, lease_ids: Sequence[int]) -> bool:
        """Give leases back, all within one deadline; True if they were held until now. A failure counts as lost."""
        return await self._attempt(partial(calls.give_back, lease_ids=lease_ids), lambda reason: False, needs=0)
