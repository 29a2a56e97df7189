"""What a cluster's client knows and does between its calls: the view, the shards, and rounds of asking them.

Where a call goes is decided in cluster_steps.py and mmcache.cluster (routes, search); here it is carried out, on one
thread a shard where several are asked. A view that has changed is taken at the start of a call. As with one shard,
whatever happens to the shards comes back as outcomes, within the call's deadline.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, TypeVar

import xxhash
from google.protobuf.message import Message

from mmcache.client.blocking import Client
from mmcache.client.cluster_answers import answered, stat_of
from mmcache.client.cluster_shard import AGAIN_S, Shard, Shards
from mmcache.client.cluster_steps import Conduct, Replies, Round, Steps
from mmcache.client.core import ClientCore
from mmcache.cluster.membership import Membership
from mmcache.cluster.routes import Router
from mmcache.cluster.settings import ClusterConfig
from mmcache.errors import MMCacheError, UsageError
from mmcache.pb import cache_pb2 as pb
from mmcache.transport.base import Op
from mmcache.transport.beside import beside
from mmcache.transport.shm import ArenaMap

T = TypeVar("T")
M = TypeVar("M", bound=Message)
Held = tuple[Shard, Sequence[int]]  # leases of one shard
MOST_BESIDE: Final = 32  # threads of one call


class ClusterCore(Client):
    """The part of `ClusterClient` that is not about keys and values."""

    def __init__(self, config: ClusterConfig, membership: Membership) -> None:
        ClientCore.__init__(self, config.client)
        self._membership = membership
        self._shards = Shards(config.settings, self._count, self._renew_lock)
        self._conduct = Conduct(
            membership.view(),
            config.replicas,
            self._shards.open_to,
            draw=_draw(),
            now=time.monotonic(),
            ramp_s=config.ramp_s,
            absent_s=config.absent_s,
        )
        self._shards.take(self._router.view)
        self.announces = True

    def __repr__(self) -> str:
        shards = len(self._router.view.members)
        return f"<ClusterClient of {shards} shards{' closed' if self._closed else ''}>"

    def _renew_lock(self) -> None:
        super()._renew_lock()
        self._deciding = threading.Lock()

    @property
    def _router(self) -> Router:
        return self._conduct.router

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
        """False while no shard answers; a view that no call has seen yet may have some that do."""
        self._shards.ask_again(0.0)
        return self._membership.view() is not self._router.view or any(map(self._shards.open_to, self._router.ids))

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
        """Raises UsageError: that is asked of one server, one of `servers()`, as `Operations` does."""
        raise UsageError(f"{op.name} goes to one server at a time: ask each of `servers()`")

    def servers(self) -> dict[str, Shard | MMCacheError]:
        """As `Client.servers`: of every shard, by the member's id."""
        self._look()
        return self._shards.every()

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

        def answer(shard: Shard | MMCacheError) -> T | MMCacheError | OSError:
            if isinstance(shard, MMCacheError):
                return shard
            try:
                return ask(shard)
            except (MMCacheError, OSError) as error:
                return error

        shards = self._shards.every()
        answers = at_once([partial(answer, shard) for shard in shards.values()])
        return dict(zip(shards, answers, strict=True))

    def _look(self) -> None:
        """Take the view as it is now, and shards in that are back."""
        if self._closed:
            raise UsageError("this client is closed; connect again")
        view = self._membership.view()
        if view is not self._router.view:
            with self._deciding:
                if view is not self._router.view:
                    self._conduct.take(view, time.monotonic())
                    self._shards.take(view)
        self._shards.ask_again(min(AGAIN_S, self.config.deadline_s / 8))

    def _run(self, steps: Callable[[float], Steps[T]], ask: Callable[[Shard, Sequence[int], float], Any]) -> T:
        """Carry a call out, which begins at the time that `steps` is given: every round of it, and what it comes to.
        `ask` asks a shard for these rows, until then."""
        self._look()
        call = steps(time.monotonic())
        try:
            with self._deciding:
                asks = next(call)
            while True:
                replies = self._round(asks, ask)
                with self._deciding:
                    asks = call.send(replies)
        except StopIteration as end:
            result: T = end.value
            return result

    def _round(self, asks: Round, ask: Callable[[Shard, Sequence[int], float], Any]) -> Replies:
        """Ask each shard at the same time."""
        shards = {name: shard for name in asks if (shard := self._shards.get(name)) is not None}
        answers = at_once([partial(ask, shard, asks[name].rows, asks[name].until) for name, shard in shards.items()])
        told = set[bytes]().union(*[shard.forks() for shard in shards.values()])
        return Replies(time.monotonic(), dict(zip(shards, answers, strict=True)), told)


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


def give_back(held: Sequence[Held], deadline: float) -> bool:
    """Release leases, of all shards at the same time; True if every one was held until now."""
    leases: dict[Shard, list[int]] = {}
    for shard, lease_ids in held:
        leases.setdefault(shard, []).extend(lease_ids)
    return all(at_once([partial(shard.give_back, ids, deadline) for shard, ids in leases.items()]))
