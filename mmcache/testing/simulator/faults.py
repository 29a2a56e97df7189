"""What goes wrong: one thing after the other, each for a while, until all is healed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from mmcache.cluster.placement import Member, View
from mmcache.testing.simulator.client import Client
from mmcache.testing.simulator.node import Node
from mmcache.testing.simulator.world import SLOW, SLOWEST, World

EVERY_S: Final = 0.8  # the mean time from one fault to the next
LONGEST_S: Final = 6.0  # of one: longer than a lease lasts
QUICK_S: Final = 0.5  # a supervisor's restart


class Faults:
    """Makes trouble for nodes and clients, and ends it. `make` makes a new shard, `replace` a client anew."""

    def __init__(
        self,
        world: World,
        nodes: dict[str, Node],
        clients: list[Client],
        make: Callable[[str], Node],
        replace: Callable[[int, View], None],
    ) -> None:
        self.world, self.nodes, self.clients, self._make, self._replace = world, nodes, clients, make, replace
        self.at_first = self.view = view_of(list(nodes))
        self.active = False
        self._joined = 0
        self._pending: list[list[object]] = []
        self._kinds = (
            self._kill, self._kill, self._stop, self._cut_pair, self._cut_shard, self._lose, self._leave, self._join,
            self._restart_client,
        )  # fmt: skip

    def begin(self) -> None:
        """From now on things go wrong."""
        self.active = True
        self.world.slow = SLOWEST
        self.world.after(0.0, self._next)

    def heal(self) -> None:
        """Everything works again, and everybody knows the members that there were at first."""
        self.active = False
        self.world.say("all is healed")
        self.world.cut.clear()
        self.world.loss = 0.0
        self.world.slow = SLOW
        for node in self.nodes.values():
            node.stopped_until = 0.0
            if not node.up:
                node.start(warm=self.world.random.random() < 0.5)
        for event in self._pending:
            self.world.cancel(event)
        self.view = self.at_first
        for client in self.clients:
            self.world.after(self.world.random.random(), client.take, self.view)

    def _next(self) -> None:
        if self.active:
            self.world.random.choice(self._kinds)()
            self.world.after(self.world.random.expovariate(1 / EVERY_S), self._next)

    def _later(self, act: Callable[..., None], *arguments: object, most_s: float = LONGEST_S) -> None:
        """The end of a fault, unless everything was healed before."""

        def end() -> None:
            if self.active:
                act(*arguments)

        self.world.after(self.world.random.uniform(0.05, most_s), end)

    def _node(self) -> Node:
        return self.world.random.choice(list(self.nodes.values()))

    def _kill(self) -> None:
        node = self._node()
        if node.up:
            node.kill()
            quickly = self.world.random.random() < 0.5
            self._later(self._start, node, self.world.random.random() < 0.6, most_s=QUICK_S if quickly else LONGEST_S)

    def _start(self, node: Node, warm: bool) -> None:
        if not node.up:
            node.start(warm=warm)

    def _stop(self) -> None:
        node = self._node()
        node.stopped_until = self.world.now + self.world.random.uniform(0.05, LONGEST_S)
        self.world.say(node.name, "is stopped until", f"{node.stopped_until:.3f}")

    def _cut(self, pairs: set[tuple[str, str]]) -> None:
        self.world.say("cut", *sorted(pairs))
        self.world.cut |= pairs
        self._later(self.world.cut.difference_update, pairs)

    def _cut_pair(self) -> None:
        self._cut({(self.world.random.choice(self.clients).name, self._node().name)})

    def _cut_shard(self) -> None:
        node = self._node()
        self._cut({(client.name, node.name) for client in self.clients})

    def _lose(self) -> None:
        self.world.loss = self.world.random.choice((0.02, 0.1, 0.3))
        self.world.say("loss", self.world.loss)
        self._later(setattr, self.world, "loss", 0.0)

    def _leave(self) -> None:
        """A member leaves the view, alive or not; it may come back."""
        members = [member.id for member in self.view.members]
        if len(members) > 2:
            gone = self.world.random.choice(members)
            self._announce([name for name in members if name != gone])
            self._later(self._come_back, gone)

    def _come_back(self, name: str) -> None:
        self._announce(sorted({member.id for member in self.view.members} | {name}))

    def _join(self) -> None:
        """A new shard."""
        if self._joined < 3:
            self._joined += 1
            name = f"new{self._joined}"
            self.nodes[name] = self._make(name)
            self._come_back(name)

    def _announce(self, names: list[str]) -> None:
        """Everybody hears of a view, some later, some never; what is said later may be heard first."""
        self.view = view_of(names)
        self.world.say("view", *names)
        for client in self.clients:
            if self.world.random.random() < 0.9:
                self._pending.append(self.world.after(self.world.random.uniform(0.0, 3.0), client.take, self.view))

    def _restart_client(self) -> None:
        self._replace(self.world.random.randrange(len(self.clients)), self.view)


def view_of(names: list[str]) -> View:
    """Of shards with these names."""
    return View(tuple(Member(name, f"mmcache://{name}:7600") for name in names))
