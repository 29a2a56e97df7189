"""One run: steady traffic, then trouble, then none; and what must hold all the time.

Engines behave as engines do: they ask how much of a prompt is stored, read that, compute the rest, and store it.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Final

from mmcache.cluster.placement import View
from mmcache.keyset import Keys
from mmcache.testing.simulator.client import Client
from mmcache.testing.simulator.faults import Faults, view_of
from mmcache.testing.simulator.node import Node
from mmcache.testing.simulator.setting import Setting
from mmcache.testing.simulator.traffic import Traffic
from mmcache.testing.simulator.values import MOST_CELLS, Values
from mmcache.testing.simulator.world import FOUND, LATE, RAISES, RECOVERED, Violation, World
from mmcache.transport.base import HIT, Result

AUDIT_EVERY: Final = 400  # events
SETTLE_S: Final = 5.0  # after the last fault: breakers are closed, what was under way has ended
WARM_PASSES: Final = 2
HEAL_PASSES: Final = 8  # at most: a shard that came back empty finds its forks anew, tail by tail
HOLD_SHARE: Final = 0.25  # of reads: leased, and looked at later
AGAIN_SHARE: Final = 0.2  # of lookups: asked twice
WORKER_SHARE: Final = 0.3  # of what is stored: not by who looked it up
THINK_S: Final = 0.05
ROUND_S: Final = 0.25  # more than a round takes while nothing fails: what is absent is noted when all have answered
LEAST_BEFORE: Final = 0.98
MOST_LOST: Final = 0.02
HUNG_S: Final = 10_000.0  # of one phase


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a run came to: hit rates before and after the trouble, in it, and what was violated, if anything."""

    seed: int
    events: int
    simulated_s: float
    before: float
    trouble: float
    after: float
    passes: int  # over all that is asked for, until the hit rate was back
    invariant: str = ""
    detail: str = ""

    def __bool__(self) -> bool:
        return not self.invariant


class Run:
    """See the module's text."""

    def __init__(self, seed: int, events: int, trace: Callable[[str], None] | None = None) -> None:
        self.seed, self.budget = seed, events
        self.world = World(seed, trace)
        self.setting = Setting.draw(self.world.random)
        self.traffic = Traffic(self.world.random)
        self.values = Values()
        names = [f"s{number}" for number in range(self.setting.shards)]
        self.cells = self._cells_needed(view_of(names))
        self.nodes = {name: self._node(name) for name in names}
        self.clients = [self._client(number, view_of(names)) for number in range(self.setting.clients)]
        self.faults = Faults(self.world, self.nodes, self.clients, self._node, self._replace)
        self.quiet_since = 0.0
        self.rates = {"before": 0.0, "trouble": 0.0, "after": 0.0}
        self.passes = 0
        self._found = self._wanted = 0
        self._work: Iterator[Keys] = iter(())
        self._audited = 0

    def _cells_needed(self, view: View) -> int:
        """What the fullest shard has of the steady traffic, and some room."""
        load = dict.fromkeys(range(len(view.members)), 0)
        pairs = {pair for keys in self.traffic.steady for pair in zip(keys.digests, keys.homes, strict=True)}
        for digest, home in sorted(pairs):
            for owner in view.owners(home, self.setting.replicas):
                load[owner] += self.values.cells(digest)
        return int(max(load.values()) * self.setting.room) + 10 * MOST_CELLS

    def _node(self, name: str) -> Node:
        setting = self.setting
        return Node(
            self.world,
            self.values,
            name,
            cells=self.cells,
            entries=setting.entries,
            lease_s=setting.lease_s,
            policy=setting.policy,
        )

    def _client(self, number: int, view: View) -> Client:
        return Client(self.world, self.values, self.nodes, f"c{number}", view, self.setting)

    def _replace(self, number: int, view: View) -> None:
        """A client's process ends, and another begins."""
        self.world.say(self.clients[number].name, "is restarted")
        self.clients[number].gone = True
        self.clients[number] = self._client(number, view)
        self._next(self.clients[number])

    # ------------------------------------------------------------------ phases

    def run(self) -> Verdict:
        """All of it; whatever is violated ends it."""
        invariant = detail = ""
        try:
            self._phases()
        except Violation as violation:
            invariant, detail = violation.invariant, violation.detail
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            invariant, detail = RAISES, f"{error!r} in {where.filename.rpartition('/')[2]}:{where.lineno}"
        rates = self.rates["before"], self.rates["trouble"], self.rates["after"]
        return Verdict(self.seed, self.world.events, self.world.now, *rates, self.passes, invariant, detail)

    def _phases(self) -> None:
        steady = self.traffic.steady
        self._serve(chain.from_iterable([steady] * WARM_PASSES))
        self.rates["before"] = self._serve(iter(steady))
        if self.rates["before"] < LEAST_BEFORE:
            raise Violation(FOUND, f"hit rate {self.rates['before']:.3f} before anything failed")
        quiet_events = self.world.events
        self.quiet_since = float("inf")
        self.faults.begin()
        self.rates["trouble"] = self._serve(self._mixed(self.budget - quiet_events * 4 // 3))
        self.faults.heal()
        self.quiet_since = self.world.now + SETTLE_S
        self.world.after(SETTLE_S, lambda: None)
        while self.world.now < self.quiet_since and self.world.step():
            pass
        for self.passes in range(1, HEAL_PASSES + 1):
            self.rates["after"] = self._serve(iter(steady))
            if self.rates["after"] >= self.rates["before"] - MOST_LOST:
                break
        else:
            rates = f"{self.rates['before']:.3f} before, {self.rates['after']:.3f} after all was healed"
            raise Violation(RECOVERED, f"hit rate {rates}, {HEAL_PASSES} times all that is asked for")
        while self.world.events < self.budget:
            self._serve(iter(steady))
        for node in self.nodes.values():
            node.audit()

    def _mixed(self, until_events: int) -> Iterator[Keys]:
        random, once = self.world.random, self.traffic.once()
        while self.world.events < until_events:
            yield next(once) if random.random() < self.setting.once else random.choice(self.traffic.steady)

    def _serve(self, prompts: Iterator[Keys]) -> float:
        """All these prompts, by all clients; the share of blocks that were read."""
        self._work, self._found, self._wanted = prompts, 0, 0
        for client in self.clients:
            self._next(client)
        begun = self.world.now
        while any(client.busy for client in self.clients):
            if not self.world.step() or self.world.now > begun + HUNG_S:
                raise Violation(LATE, "a call never ends")
            if self.world.events - self._audited >= AUDIT_EVERY:
                self._audited = self.world.events
                self.world.random.choice(list(self.nodes.values())).audit()
        return self._found / max(1, self._wanted)

    # ------------------------------------------------------------------ one request

    def _next(self, client: Client) -> None:
        prompt = next(self._work, None)
        client.busy = prompt is not None
        if prompt is not None:
            self.world.after(self.world.random.expovariate(1 / THINK_S), self._begin, client, prompt)

    def _begin(self, client: Client, prompt: Keys) -> None:
        if client.gone:
            return
        sure = self._sure(client, prompt)

        def looked_up(count: int) -> None:
            if count < sure and self._sure(client, prompt[:sure]) == sure:
                raise Violation(FOUND, f"{client.name} is told of {count} leading blocks, {sure} are there")
            if count:
                self._read(client, prompt, count)
            else:
                self._store(client, prompt, 0)

        if self.world.random.random() < AGAIN_SHARE:
            client.lookup(prompt, lambda count: client.lookup(prompt, looked_up))
        else:
            client.lookup(prompt, looked_up)

    def _sure(self, client: Client, prompt: Keys) -> int:
        """How many leading blocks lie where this client looks first, if nothing has failed for a while."""
        if self.world.now < self.quiet_since:
            return 0
        latest = self.world.now - self.setting.absent_s - ROUND_S
        routes = client.conduct.router.routes(prompt, self.world.now)
        for row, (digest, route) in enumerate(zip(prompt.digests, routes, strict=True)):
            name = route.reads[0]
            if client.denied.get((name, digest), -1.0) >= latest or not self.nodes[name].has(digest):
                return row
        return len(prompt)

    def _read(self, client: Client, prompt: Keys, count: int) -> None:
        """Of what is stored an engine has the first blocks itself, now and then."""
        random = self.world.random
        start = random.randrange(count) if random.random() < 0.3 else 0

        def done(results: list[Result]) -> None:
            read = next((row for row, result in enumerate(results) if result is not HIT), len(results))
            self._store(client, prompt, start + read)

        if random.random() < HOLD_SHARE:
            client.hold(prompt[start:count], random.uniform(0.0, 1.2 * self.setting.lease_s), done)
        else:
            client.read(prompt[start:count], done)

    def _store(self, client: Client, prompt: Keys, read: int) -> None:
        self._found += read
        self._wanted += len(prompt)
        if read == len(prompt):
            self._next(client)
            return
        if self.world.random.random() < WORKER_SHARE:  # another process computes and stores it; nobody waits
            self.world.random.choice(self.clients).put(prompt[read:], lambda results: None)
            self._next(client)
        else:
            client.put(prompt[read:], lambda results: self._next(client))
