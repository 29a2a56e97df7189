"""What a cluster's client knows and does between its calls: the view, the shards, and rounds of asking them.

Where a call goes is decided in mmcache.cluster (routes, search); here it is carried out, on one thread a shard where
several are asked. A view that has changed is taken at the start of a call. As with one shard, whatever happens to the
shards comes back as outcomes, within the call's deadline.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, TypeVar

import xxhash
from google.protobuf.message import Message

from mmcache.client.blocking import Client
from mmcache.client.cluster_answers import answered, merged, stat_of
from mmcache.client.cluster_shard import Shard, Shards
from mmcache.client.core import ClientCore
from mmcache.client.lease import LeasedFrames
from mmcache.client.pin import Pinned
from mmcache.cluster.absent import Absent
from mmcache.cluster.membership import Membership
from mmcache.cluster.routes import Router
from mmcache.cluster.search import Search
from mmcache.cluster.settings import ClusterConfig
from mmcache.errors import MMCacheError, TransportError, UsageError
from mmcache.keyset import Keys
from mmcache.pb import cache_pb2 as pb
from mmcache.transport.base import Op, Outcome, Result
from mmcache.transport.beside import beside
from mmcache.transport.shm import ArenaMap

T = TypeVar("T")
M = TypeVar("M", bound=Message)
MOST_BESIDE: Final = 32  # threads of one call


class ClusterCore(Client):
    """The part of `ClusterClient` that is not about keys and values."""

    def __init__(self, config: ClusterConfig, membership: Membership) -> None:
        ClientCore.__init__(self, config.client)
        self._membership = membership
        now = time.monotonic()
        self._router = Router(membership.view(), config.replicas, _draw(), now, config.ramp_s)
        self._absent = Absent(config.absent_s)
        self._news = 0  # how often a fork was heard of that was not known
        self._shards = Shards(config.settings, self._count, self._renew_lock)
        self._shards.take(self._router.view)
        self.announces = True

    def __repr__(self) -> str:
        shards = len(self._router.view.members)
        return f"<ClusterClient of {shards} shards{' closed' if self._closed else ''}>"

    def _renew_lock(self) -> None:
        super()._renew_lock()
        self._deciding = threading.Lock()

    # ------------------------------------------------------------------ what holds for all shards together

    @property
    def _closed(self) -> bool:
        return self._shards.closed

    @property
    def announces(self) -> bool:
        """As `Client.announces`, of every shard."""
        return self._shards.announces

    @announces.setter
    def announces(self, value: bool) -> None:
        if hasattr(self, "_shards"):
            self._shards.announce(value)

    @property
    def answering(self) -> bool:
        """False while no shard answers."""
        return any(map(self._shards.open_to, self._router.ids))

    @property
    def _arena(self) -> ArenaMap | None:
        """A client of one host's only shard maps its memory; of several there is no one memory to speak of."""
        shards = self._shards.opened()
        return shards[0]._arena if len(shards) == 1 == len(self._router.ids) else None

    @property
    def maps_memory(self) -> bool:
        """Whether the bytes of any shard are moved in its memory."""
        return any(shard.maps_memory for shard in self._shards.opened())

    # ------------------------------------------------------------------ administration: these raise TransportError

    def stat(self) -> dict[str, Any]:
        """As `Client.stat`, added up; `shards` has each one's. Raises TransportError if none answers."""
        self._look()
        return stat_of(self.each(Shard.stat))

    def ask(self, op: Op, request: Message, reply: M) -> M:
        """As `Client.ask`, of every shard. For MODE, EXPLAIN and RECENT; raises UsageError for others, and
        TransportError if a mode did not reach all."""
        self._look()
        merged(op, request, [reply])  # whether that can be asked of several
        answers = self.each(lambda shard: shard.ask(op, request, type(reply)()))
        good = answered(answers)
        if op is Op.MODE and len(good) < len(answers):
            lost = "; ".join(f"{name}: {answer}" for name, answer in answers.items() if name not in good)
            raise TransportError(f"{len(answers) - len(good)} of {len(answers)} shards could not be asked ({lost})")
        replies: list[M] = list(good.values())
        return merged(op, request, replies)

    def inspect(self, digest: bytes) -> pb.InspectReply:
        """As `Client.inspect`, of whichever shard has it."""
        self._look()
        replies = answered(self.each(lambda shard: shard.inspect(digest))).values()
        return next((reply for reply in replies if reply.found), pb.InspectReply())

    def close(self) -> None:
        """Close every shard's client, and stop following the membership."""
        self._shards.close()
        self._membership.close()

    # ------------------------------------------------------------------ how a call is carried out

    def each(self, ask: Callable[[Shard], T]) -> dict[str, T | MMCacheError | OSError]:
        """What every shard answers, by member, or the error that came instead."""

        def answer(shard: Shard) -> T | MMCacheError | OSError:
            try:
                return ask(shard)
            except (MMCacheError, OSError) as error:
                return error

        shards = self._shards.all()
        answers = at_once([partial(answer, shard) for shard in shards])
        return {shard.member.id: one for shard, one in zip(shards, answers, strict=True)}

    def _look(self) -> None:
        """Take the view as it is now."""
        if self._closed:
            raise UsageError("this client is closed; connect again")
        view = self._membership.view()
        if view is not self._router.view:
            with self._deciding:
                if view is not self._router.view:
                    self._router.take(view, time.monotonic())
                    self._absent.keep(self._router.ids)
                    self._shards.take(view)

    def _routes(self, rows: Keys, *, counts: bool = False) -> list[Any]:
        self._look()
        with self._deciding:
            return self._router.routes(rows, time.monotonic(), counts=counts)

    def _search(self, rows: Keys, found: bytes = b"") -> Search:
        routes = self._routes(rows, counts=not found)
        now, digests, absent = time.monotonic(), rows.digests, self._absent

        def lacks(member: str, row: int, last: bool) -> bool:
            return absent(member, digests[row], now, last=last)

        search = Search(routes, self._shards.open_to, lacks)
        if found:
            search.found[:] = found
        return search

    def _leading(self, rows: Keys, ask: Callable[[Shard, Sequence[bytes], float], int | None]) -> int:
        deadline, found, again = self._deadline(), b"", True
        while True:
            search = self._search(rows, found)
            news = self._news
            while asks := search.asks(prefix=True):
                for member, wanted, count in self._round(rows, search, asks, deadline, ask):
                    if count is None:
                        self._fail(search, member, wanted)
                    elif (row := search.leading(wanted, count)) is not None:
                        self._absent.note(member, rows.digests[row], time.monotonic())
            # A fork that was heard of just now says where the rest may lie: worth one more look.
            if not again or self._news == news or search.prefix == len(rows):
                return search.prefix
            found, again = bytes(search.found), False

    def _round(
        self,
        rows: Keys,
        search: Search,
        asks: Mapping[str, Sequence[int]],
        deadline: float,
        ask: Callable[[Shard, Any, float], T],
        parts: Mapping[str, Any] | None = None,
    ) -> list[tuple[str, Sequence[int], T | None]]:
        """Ask each shard for its rows, or part, at the same time; (member, rows, answer). Each has its share of the
        time that is left, so that a shard that hangs leaves enough for those that are asked after it."""
        now = time.monotonic()
        shards: list[tuple[str, Shard]] = []
        calls: list[Callable[[], T]] = []
        for name, wanted in asks.items():
            shard = self._shards.get(name)
            if shard is not None and now < deadline:
                shards.append((name, shard))
                until = now + (deadline - now) / search.tries(wanted)
                part = parts[name] if parts is not None else [rows.digests[row] for row in wanted]
                calls.append(partial(ask, shard, part, until))
        answers: dict[str, T] = dict(zip((name for name, _ in shards), at_once(calls), strict=True))
        for name in asks.keys() - answers.keys():
            for row in asks[name]:
                search.fail(row)
        self._hear(rows, list(answers))
        return [(name, asks[name], answer) for name, answer in answers.items()]

    def _mark(
        self,
        rows: Keys,
        search: Search,
        member: str,
        wanted: Sequence[int],
        flags: Sequence[bool] | None,
        *,
        note: bool = True,
    ) -> None:
        if flags is None:
            self._fail(search, member, wanted)
            return
        now = time.monotonic()
        for row, there in zip(wanted, flags, strict=True):
            if there:
                search.hit(row)
            else:
                search.miss(row)
                if note:
                    self._absent.note(member, rows.digests[row], now)

    def _mark_results(
        self, rows: Keys, search: Search, member: str, wanted: Sequence[int], results: Sequence[Result]
    ) -> None:
        now, failed, rescued = time.monotonic(), False, 0
        for row, result in zip(wanted, results, strict=True):
            if result.outcome is Outcome.MISS:
                search.miss(row)
                self._absent.note(member, rows.digests[row], now)
            elif result.outcome in (Outcome.UNAVAILABLE, Outcome.CORRUPT):
                failed |= result.outcome is Outcome.UNAVAILABLE
                search.fail(row)
            else:
                rescued += search.is_troubled(row)
                search.hit(row)
        if failed:
            self._note_failures((member,))
        if rescued:
            self._count({"failovers": rescued})

    def _fail(self, search: Search, member: str, wanted: Sequence[int]) -> None:
        for row in wanted:
            search.fail(row)
        self._note_failures((member,))

    def _note_failures(self, members: Any) -> None:
        now = time.monotonic()
        with self._deciding:
            for member in set(members):
                self._router.failed(member, now)

    def _hear(self, rows: Keys, members: Sequence[str]) -> None:
        """Take note of the forks that shards told of in their replies."""
        shards = [shard for name in members if (shard := self._shards.get(name)) is not None]
        told = set().union(*[shard.forks() for shard in shards])
        if told:
            with self._deciding:
                self._news += self._router.forks.hear(rows, told, time.monotonic())


def _draw() -> int:
    """A number that the processes of one engine share, so that what one of them finds the others find there too."""
    return xxhash.xxh3_64_intdigest(f"{os.uname().nodename}/{os.getpgid(0)}".encode())


def at_once(calls: Sequence[Callable[[], T]]) -> list[T]:
    """What each call returns, in order; up to MOST_BESIDE of them at the same time."""
    if len(calls) <= MOST_BESIDE:
        return beside(calls, "mmcache-shard") if len(calls) > 1 else [call() for call in calls]

    def several(start: int) -> list[T]:
        return [call() for call in calls[start::MOST_BESIDE]]

    columns = beside([partial(several, start) for start in range(MOST_BESIDE)], "mmcache-shard")
    return [columns[place % MOST_BESIDE][place // MOST_BESIDE] for place in range(len(calls))]


def all_of(held: Sequence[Pinned] | Sequence[LeasedFrames]) -> bool:
    """Give all leases back; True if every one was held until now."""
    lost = sum(not lease.release() for lease in held)
    return not lost
