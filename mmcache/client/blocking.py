"""The blocking client engines use: every call has a deadline, and a failure is a miss.

Thread-safe (each call borrows a link) and fork-safe (links belong to a process; a child opens its own). Data calls
raise only UsageError, for arguments that can never work; whatever happens to the server comes back as outcomes.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from types import TracebackType
from typing import Any, Self, TypeVar

from mmcache.client.batch import PutBatch, described, get_run
from mmcache.client.lease import LeasedFrames
from mmcache.client.link import Dialer, Link
from mmcache.client.pin import Pinned, count_prefix, pin_prefix
from mmcache.client.plan import Breaker, batches, put_batches
from mmcache.client.pool import Pool, PoolBusy
from mmcache.config import ClientConfig
from mmcache.errors import MMCacheError, ProtocolError, RequestRefused, TransportError, UsageError
from mmcache.frame import check_specs, layout_of
from mmcache.keyset import Key, Keys
from mmcache.pb import cache_pb2 as pb
from mmcache.tensors import HostTensor, check_count, named_tensors, specs_of
from mmcache.transport.base import HIT, MISS, Op, Outcome, Result
from mmcache.transport.shm import ArenaMap, Copier
from mmcache.transport.tcp import Channel

log = logging.getLogger("mmcache.client")
T = TypeVar("T")
LONGEST_TTL_S = 1e10
RECHECK_KEYS = 64
AnyKeys = Keys | Key | Iterable[Key]


class Client:
    """A cache client. Use as a context manager, or call `close`.

    `counters` counts hits, misses, verify_failures, bytes read and written, and failures, since the start. With
    `announces`, the log says once that the server does not answer, and once that it answers again: of several clients
    that stand for one user, let one announce.
    """

    def __init__(self, config: ClientConfig, attach: Callable[[], Channel] | None = None) -> None:
        self.config = config
        self.counters: Counter[str] = Counter()
        self.announces = True
        self._breaker = Breaker()
        self._renew_lock()
        self._dialer = Dialer(config, attach)
        self._pool = Pool(self._dialer, config.max_connections, self._renew_lock)
        self._copier = Copier(config.copy_threads)

    def __repr__(self) -> str:
        config = self.config
        place = {"mmcache": f"{config.host}:{config.port}", "mmcache+unix": config.path}.get(config.scheme, "")
        return f"<{type(self).__name__} {config.scheme}://{place}{' closed' if self._pool.closed else ''}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def answering(self) -> bool:
        """False while a server that did not answer is left alone: calls made now would be misses."""
        return self._breaker.allows(time.monotonic())

    @property
    def shared_memory(self) -> ArenaMap | None:
        """The server's memory as this process maps it, to be registered with a device, say; its `data` may only be read
        under a lease. None where it is not mapped, or not all of its pages exist yet (`serve --prefault`)."""
        arena = self._dialer.arena
        return arena if arena is not None and arena.prefaulted else None

    # ------------------------------------------------------------------ data operations

    def match_prefix(self, keys: AnyKeys) -> int:
        """How many leading keys are stored. 0 when the server cannot be asked. Nothing is pinned: they may go again."""
        rows = Keys.of(keys)

        def ask(link: Link, deadline: float) -> int:
            return count_prefix(link, rows.digests, deadline)

        return self._attempt(ask, lambda reason: 0) if len(rows) else 0

    def pin_prefix(self, keys: AnyKeys) -> Pinned:
        """As `match_prefix`, but the entries are kept from eviction until `release`, or the server's lease time passes.

        For a scheduler that promises entries which another process then reads. No bytes are moved. Where no more may
        be pinned the count goes on without: the promise is then as good as `match_prefix`'s.
        """
        rows = Keys.of(keys)

        def ask(link: Link, deadline: float) -> Pinned:
            return pin_prefix(link, rows.digests, deadline, self._release)

        return self._attempt(ask, lambda reason: Pinned(0)) if len(rows) else Pinned(0)

    def contains(self, keys: AnyKeys) -> list[bool]:
        """Per key, whether it is stored. All False when the server cannot be asked. Nothing is pinned."""
        rows = Keys.of(keys)

        def ask(link: Link, deadline: float) -> list[bool]:
            def present(keys: bytes) -> bytes:
                call = link.conversation.call(Op.CONTAINS, pb.ContainsRequest(keys=keys), pb.ContainsReply())
                return link.run(call, deadline).present

            return _flags(link, rows.digests, present)

        return self._attempt(ask, lambda reason: [False] * len(rows)) if len(rows) else []

    def get_into(self, keys: AnyKeys, buffers: Sequence[Any], *, verify: bool | None = None) -> list[Result]:
        """Fill one destination per key; one Result per key, true for a hit.

        A destination is an ndarray, torch CPU tensor or writable buffer, or, for entries of several tensors, a mapping
        or list of them. Unless the result is a hit, the destination's bytes are undefined. Verified by default: the
        checksum is taken of the bytes as delivered. Raises TensorError for destinations that can never be filled.
        """
        rows = Keys.of(keys)
        check_count(rows, buffers, "destinations")
        targets = [named_tensors(buffer, writable=True) for buffer in buffers]
        check = self.config.verify if verify is None else verify
        results = [MISS] * len(rows)
        started = time.monotonic()

        def ask(link: Link, deadline: float) -> None:
            results[:] = [MISS] * len(rows)  # a second try writes the destinations anew
            for run in batches(len(rows), link.joined.limits.batch_keys):
                position = run.start
                while position < run.stop:
                    position = get_run(
                        link, self._copier, rows.digests, targets, results, range(position, run.stop), check, deadline
                    )

        def fail(reason: str) -> None:
            lost = Result(Outcome.UNAVAILABLE, reason)
            results[:] = [lost if result is MISS else result for result in results]

        if len(rows):
            self._attempt(ask, fail)
        self._count_reads(targets, results)
        corrupt = [key for key, result in zip(rows.digests, results, strict=True) if result[0] is Outcome.CORRUPT]
        if corrupt:
            self._recheck(list(dict.fromkeys(corrupt)), started + self.config.deadline_s)
        return results

    def put(self, keys: AnyKeys, tensors: Sequence[Any], *, ttl_s: float | None = None) -> list[Result]:
        """Store one value per key; one Result per key: stored, present (costs no payload) or refused, with the reason.

        A value is a tensor or buffer, or a mapping or list of them. It must not change during the call.
        Raises TensorError for values that cannot be stored, UsageError for a `ttl_s` that is not above 0.
        """
        if ttl_s is not None and not (isinstance(ttl_s, Real) and 0 < ttl_s < LONGEST_TTL_S):
            raise UsageError(f"ttl_s is {ttl_s!r}; give seconds, above 0 and below {LONGEST_TTL_S:g}, or None")
        rows = Keys.of(keys)
        check_count(rows, tensors, "tensors")
        values = [named_tensors(value) for value in tensors]
        for value in values:
            check_specs(specs_of(value))
        namespaces = {described(namespace) for namespace in rows.namespaces}
        results = [Result(Outcome.UNAVAILABLE)] * len(rows)

        def ask(link: Link, deadline: float) -> None:
            for namespace in namespaces - link.declared:
                request = pb.DeclareRequest(namespace=namespace, kind=namespace.kind, facts=namespace.facts)
                link.run(link.conversation.call(Op.DECLARE, request, pb.DeclareReply()), deadline)
                link.declared.add(namespace)
            alignment = link.joined.alignment
            sizes = [layout_of([t.data.nbytes for t in value.values()], alignment).frame_nbytes for value in values]
            limits = link.joined.limits
            for run in put_batches(sizes, limits.batch_keys, limits.inline_nbytes):
                batch = PutBatch(rows, values, sizes, run, alignment, ttl_s)
                results[run.start : run.stop] = batch.send(link, deadline)

        def fail(reason: str) -> None:
            lost = Result(Outcome.UNAVAILABLE, reason)
            results[:] = [lost if result.outcome is Outcome.UNAVAILABLE else result for result in results]

        if len(rows):
            self._attempt(ask, fail)
        counts = Counter(f"put_{result.outcome}" for result in results)
        stored = [value for value, result in zip(values, results, strict=True) if result.outcome is Outcome.STORED]
        counts["bytes_written"] = sum(tensor.data.nbytes for value in stored for tensor in value.values())
        self._count(**counts)
        return results

    def acquire(self, keys: AnyKeys) -> LeasedFrames:
        """Pin entries and see them without a copy (same host) or received whole; use as a context manager.

        `frames[i]` is a Frame or None. Views are unverified until `frame.verify()`, and valid inside the `with` only:
        leaving it raises LeaseLost if the lease had expired. Never raises for a missing server: all frames are None.
        """
        rows = Keys.of(keys)

        def ask(link: Link, deadline: float) -> LeasedFrames:
            return LeasedFrames.take(link, rows.digests, deadline, self._release)

        if not len(rows):
            return LeasedFrames([])
        return self._attempt(ask, lambda reason: LeasedFrames([None] * len(rows)))

    def delete(self, keys: AnyKeys) -> list[bool]:
        """Forget entries; True per key that was there. Raises TransportError when the server cannot be asked."""
        rows = Keys.of(keys)

        def ask(link: Link, deadline: float) -> list[bool]:
            def deleted(keys: bytes) -> bytes:
                call = link.conversation.call(Op.DELETE, pb.DeleteRequest(keys=keys), pb.DeleteReply())
                return link.run(call, deadline).deleted

            return _flags(link, rows.digests, deleted)

        return self._demand(ask)

    # ------------------------------------------------------------------ administration: these raise TransportError

    def stat(self) -> dict[str, Any]:
        """The server's counters and gauges, and how this client reaches it."""

        def ask(link: Link, deadline: float) -> dict[str, Any]:
            reply = link.run(link.conversation.call(Op.STAT, pb.StatRequest(), pb.StatReply()), deadline)
            return {
                "server": reply.server,
                "server_id": reply.server_id.hex(),
                "uptime_s": reply.uptime_s,
                "transport": link.path,
                "counters": dict(sorted(reply.counters.items())),
            }

        return self._demand(ask)

    def inspect(self, digest: bytes) -> pb.InspectReply:
        """What is known of one stored key (32 bytes): its frame's header and its namespace's facts."""

        def ask(link: Link, deadline: float) -> pb.InspectReply:
            return link.run(
                link.conversation.call(Op.INSPECT, pb.InspectRequest(key=digest), pb.InspectReply()), deadline
            )

        return self._demand(ask)

    def close(self) -> None:
        """Close every link of this process, and let go of the server's memory. Leases still held end by themselves."""
        self._pool.close()
        self._dialer.forget_arena()

    def _demand(self, ask: Callable[[Link, float], T], deadline: float | None = None) -> T:
        """Run `ask` on a link; one more try on a fresh link if a kept one turns out to be dead."""
        deadline = time.monotonic() + self.config.deadline_s if deadline is None else deadline
        pool = self._pool
        while True:
            link = pool.borrow(deadline)
            usable = False
            try:
                result = ask(link, deadline)
                usable = True
                return result
            except RequestRefused:
                usable = True
                raise
            except TransportError:
                kept, link.kept = link.kept, False
                if not kept or time.monotonic() >= deadline:
                    raise
                pool.forget()
            finally:
                link.kept = usable
                if usable:
                    pool.give_back(link)
                else:
                    pool.drop(link)

    def _attempt(self, ask: Callable[[Link, float], T], fail: Callable[[str], T]) -> T:
        """As `_demand`, but a failure becomes `fail(reason)`; a server that just failed is left alone for a while."""
        if not self._pool.closed and not self._breaker.allows(time.monotonic()):
            self._count(skipped=1)
            return fail("the server did not answer a moment ago; it is asked again shortly")
        try:
            result = self._demand(ask)
        except UsageError:
            raise
        except Exception as error:
            self._count(failures=1)
            if isinstance(error, (RequestRefused, PoolBusy)):  # the server is there
                return fail(str(error))
            if not isinstance(error, (MMCacheError, OSError)):
                log.exception("an operation failed inside the client; it counts as a miss")
            with self._counting:
                first = self._breaker.failed(time.monotonic())
            if first and self.announces:
                log.warning("%r does not answer: everything is a miss until it does (%s)", self, error)
            return fail(str(error))
        if self._breaker.pause_s:
            with self._counting:
                first = self._breaker.succeeded()
            if first and self.announces:
                log.warning("%r answers again", self)
        return result

    def _release(self, lease_ids: Sequence[int]) -> bool:
        """Give leases back, all within one deadline; True if they were held until now. A failure counts as lost."""

        def ask(link: Link, deadline: float) -> bool:
            requests = (pb.FinishRequest(lease_id=lease_id) for lease_id in lease_ids)
            finish = link.conversation.call
            held = [link.run(finish(Op.FINISH, request, pb.FinishReply()), deadline).held for request in requests]
            return all(held)

        return self._attempt(ask, lambda reason: False)

    def _recheck(self, digests: Sequence[bytes], deadline: float) -> None:
        """Have the server look at entries that read as corrupt. The reads are done: nothing depends on the answer."""

        def ask(link: Link, deadline: float) -> None:
            request = pb.RecheckRequest(keys=b"".join(digests[:RECHECK_KEYS]))
            link.run(link.conversation.call(Op.RECHECK, request, pb.RecheckReply()), deadline)

        with contextlib.suppress(MMCacheError, OSError):
            self._demand(ask, deadline)

    def _renew_lock(self) -> None:
        """Also in a forked child, where another thread may have held the old one."""
        self._counting = threading.Lock()

    def _count(self, **amounts: int) -> None:
        with self._counting:
            for name, amount in amounts.items():
                self.counters[name] += amount

    def _count_reads(self, targets: Sequence[Mapping[str, HostTensor]], results: Sequence[Result]) -> None:
        hits = nbytes = corrupt = 0
        for target, result in zip(targets, results, strict=True):
            if result is HIT:
                hits += 1
                for tensor in target.values():
                    nbytes += tensor.data.nbytes
            elif result.outcome is Outcome.CORRUPT:
                corrupt += 1
        self._count(hits=hits, misses=len(results) - hits, verify_failures=corrupt, bytes_read=nbytes)


def _flags(link: Link, digests: Sequence[bytes], ask: Callable[[bytes], bytes]) -> list[bool]:
    """One bool a key, from `ask`, which answers a batch of keys with one byte each."""
    flags = bytearray()
    for run in batches(len(digests), link.joined.limits.batch_keys):
        flags += ask(b"".join(digests[run.start : run.stop]))
    if len(flags) != len(digests):
        raise ProtocolError(f"the server answered {len(flags)} of {len(digests)} keys")
    return [bool(flag) for flag in flags]
