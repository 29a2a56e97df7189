"""The same requests, simulated: what they would have found, with the same kill at the same request, or with none.

Clients are real `Conduct`s with real breakers, one for each process of the load; shards are sets of keys that never
evict. Steps come in the order, and at the times, in which the real ones began. What was answered then is not looked at.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.cluster.load import Served
from mmcache.client.cluster_steps import Ask, Conduct, Replies, Steps, T
from mmcache.client.plan import Breaker
from mmcache.cluster.placement import View
from mmcache.cluster.settings import ClusterConfig
from mmcache.keyset import Keys
from mmcache.testing.simulator.scale import STORED, Shard
from mmcache.transport.base import HIT, MISS, Outcome, Result

SILENT = Result(Outcome.UNAVAILABLE, "it is dead")
LOOKUP, READ, STORE = range(3)


@dataclass(frozen=True)
class Outage:
    """A shard is killed, and comes back with nothing at `back_s`, if ever."""

    shard: str
    killed_s: float
    back_s: float = float("inf")


@dataclass
class Predicted:
    """By number: how many leading blocks are found, and who is asked for lookups and puts; `held`: blocks of the
    newest member after each request; `copied`: blocks copied between shards, by number; `homes`: of each block that is
    stored, the home under which it first was."""

    found: list[int]
    lookups: list[tuple[str, ...]]
    puts: list[tuple[str, ...]]
    held: list[int]
    copied: Counter[int] = field(default_factory=Counter)
    homes: dict[bytes, bytes] = field(default_factory=dict)


class Caller:
    """One client."""

    def __init__(self, view: View, config: ClusterConfig, now: float, draw: Callable[[], float]) -> None:
        self._breakers: dict[str, Breaker] = {}
        self.now, self._draw = now, draw
        self.conduct = Conduct(
            view, config.replicas, self.open_to, draw=0, now=now, ramp_s=config.ramp_s, absent_s=config.absent_s
        )

    def open_to(self, name: str) -> bool:
        """Whether it may be asked now."""
        return self.breaker(name).allows(self.now)

    def breaker(self, name: str) -> Breaker:
        """Of one shard."""
        return self._breakers.setdefault(name, Breaker(draw=self._draw))


class Replay:
    """See the module's text. `views`: by how many members they have; a client takes the one it had then. `seed`: for
    what is chance, when a client asks a shard again that did not answer."""

    def __init__(
        self,
        asked: Sequence[Keys],
        served: Sequence[Served],
        views: Mapping[int, View],
        config: ClusterConfig,
        nbytes: int,
        outage: Outage | None = None,
        seed: int = 0,
    ) -> None:
        self._asked, self._served, self._views, self._outage = asked, served, views, outage
        self._nbytes = nbytes
        old = {member.id for member in views[min(views)].members}
        self._newest = [member.id for member in views[max(views)].members if member.id not in old]
        self.shards = {member.id: Shard() for view in views.values() for member in view.members}
        began_s = served[0].times[0]
        first = views[served[0].view]
        draw = random.Random(seed).random
        self.callers = {worker: Caller(first, config, began_s, draw) for worker in {one.worker for one in served}}
        count = len(asked)
        self.out = Predicted([0] * count, [()] * count, [()] * count, [0] * count)
        self._is_down = ""
        self._wiped = False
        self._asking: list[str] = []

    def run(self) -> Predicted:
        """All requests."""
        events = []
        for one in self._served:
            lookup_s, read_s, _, _, end_s = one.times
            events += [(lookup_s, LOOKUP, one), (read_s, READ, one), (end_s, STORE, one)]
        for now, kind, one in sorted(events, key=lambda event: event[:2]):
            caller = self.callers[one.worker]
            caller.now = now
            self._pass(now)
            (self._lookup, self._read, self._store)[kind](caller, one)
        return self.out

    def _pass(self, now: float) -> None:
        """What has happened to a shard until now."""
        outage = self._outage
        if outage is None or now < outage.killed_s:
            return
        self._is_down = outage.shard if now < outage.back_s else ""
        if not self._wiped:
            self._wiped = True
            self.shards[outage.shard] = Shard()

    # ------------------------------------------------------------------ the steps of a request

    def _lookup(self, caller: Caller, one: Served) -> None:
        view = self._views[one.view]
        if view is not caller.conduct.router.view:
            caller.conduct.take(view, caller.now)
        keys = self._asked[one.number]
        steps = caller.conduct.leading(keys, caller.now, caller.now + 1.0)
        self.out.found[one.number] = self._run(caller, steps, keys, _count, lambda rows: None)
        self.out.lookups[one.number] = self._told()

    def _read(self, caller: Caller, one: Served) -> None:
        keys = self._asked[one.number][: self.out.found[one.number]]
        if not keys:
            return
        steps = caller.conduct.read(keys, caller.now, caller.now + 1.0)
        read = self._run(caller, steps, keys, _read, _silent)
        flags = [bool(result) for result in read.results]
        self.out.found[one.number] = flags.index(False) if False in flags else len(flags)
        for (_, target), picked in caller.conduct.copies(read, [self._nbytes] * len(keys), 1.0).items():
            if target != self._is_down and caller.open_to(target):
                for row in picked:
                    self.shards[target].store(keys.digests[row], keys.parents[row])
                caller.conduct.copied(keys, picked, target)
                self.out.copied[one.number] += len(picked)
        self._told()

    def _store(self, caller: Caller, one: Served) -> None:
        keys = self._asked[one.number][self.out.found[one.number] :]
        if keys:
            for digest, home in zip(keys.digests, caller.conduct.router.forks.homes(keys, caller.now), strict=True):
                self.out.homes.setdefault(digest, home)
            self._run(caller, caller.conduct.store(keys, caller.now, caller.now + 1.0), keys, _store, _silent)
        self.out.puts[one.number] = self._told()
        self.out.held[one.number] = sum(len(self.shards[name].keys) for name in self._newest)

    # ------------------------------------------------------------------ rounds

    def _told(self) -> tuple[str, ...]:
        asked, self._asking = self._asking, []
        return tuple(asked)

    def _run(
        self,
        caller: Caller,
        steps: Steps[T],
        rows: Keys,
        answer: Callable[[Shard, Keys, Sequence[int]], Any],
        silence: Callable[[Sequence[int]], Any],
    ) -> T:
        replies: Replies | None = None
        try:
            while True:
                asks = next(steps) if replies is None else steps.send(replies)
                replies = self._round(caller, asks, rows, answer, silence)
        except StopIteration as end:
            result: T = end.value
            return result

    def _round(self, caller: Caller, asks: Mapping[str, Ask], rows: Keys, answer: Any, silence: Any) -> Replies:
        answers, told = {}, set[bytes]()
        self._asking += asks
        for name, one in asks.items():
            breaker = caller.breaker(name)
            if not breaker.allows(caller.now):
                answers[name] = silence(one.rows)
            elif name == self._is_down:
                breaker.failed(caller.now)
                answers[name] = silence(one.rows)
            else:
                breaker.succeeded()
                shard = self.shards[name]
                answers[name] = answer(shard, rows, one.rows)
                told |= shard.forks.intersection([rows.digests[row] for row in one.rows])
        return Replies(caller.now, answers, told)


def _count(shard: Shard, rows: Keys, wanted: Sequence[int]) -> int:
    return next((n for n, row in enumerate(wanted) if rows.digests[row] not in shard.keys), len(wanted))


def _read(shard: Shard, rows: Keys, wanted: Sequence[int]) -> list[Result]:
    return [HIT if rows.digests[row] in shard.keys else MISS for row in wanted]


def _store(shard: Shard, rows: Keys, wanted: Sequence[int]) -> list[Result]:
    for row in wanted:
        shard.store(rows.digests[row], rows.parents[row])
    return [STORED] * len(wanted)


def _silent(wanted: Sequence[int]) -> list[Result]:
    return [SILENT] * len(wanted)
