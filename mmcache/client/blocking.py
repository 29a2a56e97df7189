"""The blocking client engines use: every call has a deadline, and a failure is a miss.

Thread-safe (each call borrows a link) and fork-safe (links belong to a process; a child opens its own). Data calls
raise only UsageError, for arguments that can never work; whatever happens to the server comes back as outcomes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

from google.protobuf.message import Message

from mmcache.client import calls
from mmcache.client.calls import AnyKeys, AnyMedia, Get, Put
from mmcache.client.core import ClientCore, Lent
from mmcache.client.lease import LeasedFrames, nothing_taken, take_lease
from mmcache.client.link import Dialer, Dials, Link
from mmcache.client.pin import Pinned, count_prefix, pin_prefix
from mmcache.client.plan import shares
from mmcache.client.pool import Pool
from mmcache.client.protocol import STOPPED_READS, STOPPED_WRITES, Flow
from mmcache.client.rpc_link import RpcDialer
from mmcache.config import ClientConfig
from mmcache.errors import MMCacheError, UsageError
from mmcache.keyset import Keys
from mmcache.pb import cache_pb2 as pb
from mmcache.transport.base import Op, Result
from mmcache.transport.beside import beside
from mmcache.transport.shm import ArenaMap
from mmcache.transport.tcp import Channel

T = TypeVar("T")
M = TypeVar("M", bound=Message)


class Client(ClientCore):
    """A cache client. Use as a context manager, or call `close`.

    `counters` counts hits, misses, verify_failures, bytes read and written, and failures, since the start. With
    `announces`, the log says once that the server does not answer, and once that it answers again: of several clients
    that stand for one user, let one announce.
    """

    def __init__(self, config: ClientConfig, attach: Callable[[], Channel] | None = None) -> None:
        super().__init__(config)
        self._dialer: Dials = RpcDialer(config) if config.transport == "grpc" else Dialer(config, attach)
        self._pool = Pool(self._dialer, config.max_connections, self._renew_lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _closed(self) -> bool:
        return self._pool.closed

    @property
    def _arena(self) -> ArenaMap | None:
        return self._dialer.arena

    # ------------------------------------------------------------------ data operations

    def match_prefix(self, keys: AnyKeys) -> int:
        """How many leading keys are stored. 0 when the server cannot be asked. Nothing is pinned: they may go again."""
        rows = Keys.of(keys)
        ask = partial(count_prefix, digests=rows.digests)
        return self._attempt(ask, lambda reason: 0) if len(rows) else 0

    def pin_prefix(self, keys: AnyKeys) -> Pinned:
        """As `match_prefix`, but the entries are kept from eviction until `release`, or the server's lease time passes.

        For a scheduler that promises entries which another process then reads. No bytes are moved. Where no more may
        be pinned the count goes on without: the promise is then as good as `match_prefix`'s.
        """
        rows = Keys.of(keys)
        if not len(rows):
            return Pinned(0)
        count, lease_ids = self._attempt(partial(pin_prefix, digests=rows.digests), lambda reason: (0, []))
        return Pinned(count, lease_ids, self._release)

    def contains(self, keys: AnyKeys) -> list[bool]:
        """Per key, whether it is stored. All False when the server cannot be asked. Nothing is pinned."""
        rows = Keys.of(keys)
        ask = partial(calls.contains, digests=rows.digests)
        return self._attempt(ask, lambda reason: [False] * len(rows)) if len(rows) else []

    def get_into(self, keys: AnyKeys, buffers: Sequence[Any], *, verify: bool | None = None) -> list[Result]:
        """Fill one destination per key; one Result per key, true for a hit.

        A destination is an ndarray, torch CPU tensor or writable buffer, or, for entries of several tensors, a mapping
        or list of them. Unless the result is a hit, the destination's bytes are undefined. Verified by default: the
        checksum is taken of the bytes as delivered; for `Pieces` out of shared memory where they lie, under a lease
        that outlived their copying. Raises TensorError for destinations that can never be filled.
        """
        get = Get.of(keys, buffers, self._verifies(verify), self._copier)
        deadline = self._deadline()
        if get.results:
            self._carry(get, deadline, STOPPED_READS, streams=1 if self.maps_memory else self.config.streams)
        counts = get.counts()
        self._count(counts)
        if counts["verify_failures"]:  # the reads are done: nothing depends on the answer
            with contextlib.suppress(MMCacheError, OSError):
                self._demand(partial(calls.recheck, digests=get.corrupt()), deadline)
        return get.results

    def put(
        self, keys: AnyKeys, tensors: Sequence[Any], *, ttl_s: float | None = None, media: AnyMedia = None
    ) -> list[Result]:
        """Store one value per key; one Result per key: stored, present (costs no payload) or refused, with the reason.

        A value is a tensor or buffer, or a mapping or list of them. It must not change during the call.
        `media` says what the values were computed from, for the server's metrics: one Media, or one or None a key.
        Raises TensorError for values that cannot be stored, UsageError for a `ttl_s` that is not above 0.
        """
        put = Put.of(keys, tensors, ttl_s, media, self._native.hasher)
        if put.results:
            self._carry(put, self._deadline(), STOPPED_WRITES, streams=self.config.streams)
        self._count(put.counts())
        return put.results

    def acquire(self, keys: AnyKeys) -> LeasedFrames:
        """Pin entries and see them without a copy (same host) or received whole; use as a context manager.

        `frames[i]` is a Frame or None. Views are unverified until `frame.verify()`, and valid inside the `with` only:
        leaving it raises LeaseLost if the lease had expired. Never raises for a missing server: all frames are None.
        """
        rows = Keys.of(keys)
        if not len(rows):
            return LeasedFrames([])
        ask = partial(take_lease, digests=rows.digests)
        frames, lease_ids = self._attempt(ask, lambda reason: nothing_taken(len(rows)))
        return LeasedFrames(frames, lease_ids, self._release)

    def delete(self, keys: AnyKeys) -> list[bool]:
        """Forget entries; True per key that was there. Raises TransportError when the server cannot be asked."""
        return self._demand(partial(calls.delete, digests=Keys.of(keys).digests))

    # ------------------------------------------------------------------ administration: these raise TransportError

    def stat(self) -> dict[str, Any]:
        """The server's counters and gauges, and how this client reaches it."""
        return self._demand(calls.stat)

    def ask(self, op: Op, request: Message, reply: M) -> M:
        """One request without payload, as operations.py makes them, and its reply."""
        return self._demand(lambda session: session.conversation.call(op, request, reply))

    def servers(self) -> Mapping[str, Client | MMCacheError]:
        """The clients of the servers behind this one, which close with it: itself alone, unless it is a cluster's; then
        one a member, or why there can be none."""
        return {"": self}

    def inspect(self, digest: bytes) -> pb.InspectReply:
        """What is known of one stored key (32 bytes): its frame's header and its namespace's facts."""
        return self._demand(partial(calls.inspect, digest=digest))

    def close(self) -> None:
        """Close every link of this process, and let go of the server's memory. Leases still held end by themselves."""
        self._pool.close()
        self._dialer.forget_arena()

    def _demand(self, ask: Callable[[Link], Flow[T]], deadline: float | None = None) -> T:
        """Run a flow on a link; one more try on a fresh link if a kept one turns out to be dead."""
        deadline = self._deadline() if deadline is None else deadline
        pool = self._pool
        while True:
            link = pool.borrow(deadline)
            with Lent(pool, link, deadline):
                result = link.run(ask(link), deadline)
                self._heard(link)
                return result

    def _attempt(
        self,
        ask: Callable[[Link], Flow[T]],
        fail: Callable[[str], T],
        deadline: float | None = None,
        needs: int = STOPPED_READS,
    ) -> T:
        """As `_demand`, but a failure becomes `fail(reason)`; a server that just failed is left alone for a while."""
        if reason := self._resting(needs):
            return fail(reason)
        failures, begun_s = self._breaker.failures, time.monotonic()
        try:
            result = self._demand(ask, deadline)
        except UsageError:
            raise
        except Exception as error:
            return fail(self._failed(error, begun_s))
        self._succeeded(failures)
        return result

    def _carry(self, call: Get | Put, deadline: float, needs: int, *, streams: int) -> None:
        """Attempt a call that moves values; a large one as several at once, each on a link of its own."""
        runs = shares(call.sizes(), streams) if streams > 1 else []
        if len(runs) < 2:
            self._attempt(call.flow, call.fail, deadline, needs)
            return

        def carry(run: range) -> list[Result]:
            part = call.part(run)
            self._attempt(part.flow, part.fail, deadline, needs)
            return part.results

        for run, results in zip(runs, beside([partial(carry, run) for run in runs], "mmcache-stream"), strict=True):
            call.results[run.start : run.stop] = results

    def _release(self, lease_ids: Sequence[int]) -> bool:
        """Give leases back, all within one deadline; True if they were held until now. A failure counts as lost."""
        return self._attempt(partial(calls.give_back, lease_ids=lease_ids), lambda reason: False, needs=0)
