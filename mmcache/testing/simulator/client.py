"""One client's calls: the real steps, and the shell that carries their rounds out over links (link.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from mmcache.client.cluster_steps import Ask, Conduct, Read, Replies, Steps
from mmcache.cluster.placement import View
from mmcache.cluster.routes import Replicas
from mmcache.keyset import Keys
from mmcache.testing.simulator.link import Answer, Links
from mmcache.testing.simulator.node import Node, Taken
from mmcache.testing.simulator.setting import Setting
from mmcache.testing.simulator.values import Values
from mmcache.testing.simulator.world import ACKNOWLEDGED, LATE, PLACED, PROMISED, WRONG, Violation, World
from mmcache.transport.base import HIT, MISS, Result

SLACK_S: Final = 1e-9
Done = Callable[[Any], None]


class Client(Links):
    """A client of the cluster, at some place of the world. `nodes` are all shards that can be reached, by name."""

    def __init__(
        self, world: World, values: Values, nodes: Mapping[str, Node], name: str, view: View, setting: Setting
    ) -> None:
        super().__init__(world, values, nodes, name)
        self.deadline_s = setting.deadline_s
        self.members = frozenset(member.id for member in view.members)
        self.conduct = Conduct(
            view,
            Replicas(setting.replicas),
            self.open_to,
            draw=world.random.getrandbits(64),
            now=world.now,
            ramp_s=setting.ramp_s,
            absent_s=setting.absent_s,
        )

    def take(self, view: View) -> None:
        """It hears of another view."""
        if self.gone or view.version == self.conduct.router.view.version:
            return
        self.world.say(self.name, "sees", *[member.id for member in view.members])
        self.conduct.take(view, self.world.now)
        self.members = frozenset(member.id for member in view.members)
        for name in self.breakers.keys() - self.members:
            del self.breakers[name]

    # ------------------------------------------------------------------ calls

    def lookup(self, rows: Keys, done: Done) -> None:
        """How many leading rows are stored."""
        said: set[bytes] = set()

        def ask(node: Node, one: Ask, answer: Answer) -> None:
            digests = [rows.digests[row] for row in one.rows]

            def heard(count: int | None) -> None:
                if count is not None:
                    said.update(digests[:count])
                    if count < len(digests):
                        self.denied[node.name, digests[count]] = self.world.now
                answer(count)

            self.ask(node, Node.count, (digests,), one.until, heard)

        def end(count: int) -> None:
            if not said.issuperset(rows.digests[:count]):
                raise Violation(PROMISED, f"{self.name}: {count} leading rows")
            done(count)

        self._call("lookup", lambda now, deadline: self.conduct.leading(rows, now, deadline), ask, end)

    def read(self, rows: Keys, done: Done) -> None:
        """The value of each row, checked as it is copied; then a little of what was found elsewhere is copied to where
        it should lie."""

        def ask(node: Node, one: Ask, answer: Answer) -> None:
            self.fetch(node, [rows.digests[row] for row in one.rows], one.until, answer)

        def end(read: Read, deadline: float) -> None:
            sizes = [self.values.nbytes(digest) for digest in rows.digests]
            left = (deadline - self.world.now) / self.deadline_s
            work = list(self.conduct.copies(read, sizes, left).items())
            self._copy(rows, work, deadline, lambda: self._ended("read", deadline, done, read.results))

        self._run(lambda now, deadline: self.conduct.read(rows, now, deadline), ask, end)

    def hold(self, rows: Keys, hold_s: float, done: Done) -> None:
        """Lease the rows, look at them where they lie so much later, unchecked, and give the leases back: what was held
        until then must have been right all the time."""
        held: list[tuple[Node, Taken, list[bytes]]] = []

        def ask(node: Node, one: Ask, answer: Answer) -> None:
            digests = [rows.digests[row] for row in one.rows]

            def heard(taken: Taken | None) -> None:
                if taken is not None and taken.lease_id:
                    held.append((node, taken, digests))
                answer(taken and [MISS if place is None else HIT for place in taken.places])

            self.ask(node, Node.take, (digests,), one.until, heard)

        def end(read: Read) -> None:
            self.world.after(hold_s, self._let_go, held)
            done(read.results)

        self._call("hold", lambda now, deadline: self.conduct.read(rows, now, deadline, note=False), ask, end)

    def put(self, rows: Keys, done: Done) -> None:
        """Store every row's value on its owners."""
        has: dict[int, set[str]] = {}

        def ask(node: Node, one: Ask, answer: Answer) -> None:
            def heard(results: list[Result]) -> None:
                for row, result in zip(one.rows, results, strict=True):
                    if result:
                        has.setdefault(row, set()).add(node.name)
                answer(results)

            self.store(node, [(rows.digests[row], rows.parents[row]) for row in one.rows], one.until, heard)

        def end(results: list[Result]) -> None:
            replicas = self.conduct.router.replicas.default
            for row, result in enumerate(results):
                wanted = 0 if not result else 1 if result.reason else min(replicas, self.fewest)
                if len(has.get(row, ())) < wanted:
                    raise Violation(ACKNOWLEDGED, f"{self.name}: row {row} {result} of {has.get(row)}")
            done(results)

        self.fewest = len(self.members)
        self._check_owners(rows)
        self._call("put", lambda now, deadline: self.conduct.store(rows, now, deadline), ask, end)

    def _check_owners(self, rows: Keys) -> None:
        """It is about to store on the owners that its view gives, of the run's home or, behind a fork, a finer one."""
        router = self.conduct.router
        for row, route in enumerate(router.routes(rows, self.world.now)):
            owners = router.view.owners(self._home(rows, row), len(route.owners))
            if route.owners != tuple(router.view.members[owner].id for owner in owners):
                raise Violation(PLACED, f"{self.name}: row {row} to {route.owners}")

    def _home(self, rows: Keys, row: int) -> bytes:
        if not len(self.conduct.router.forks):
            return rows.homes[row]
        return self.conduct.router.forks.homes(rows, self.world.now)[row]

    def _let_go(self, held: Sequence[tuple[Node, Taken, list[bytes]]]) -> None:
        for node, taken, digests in held:
            places = zip(digests, taken.places, strict=True)
            wrong = [d for d, place in places if place is not None and self.values.at(taken.cells, place) != d]

            def said(is_held: bool | None, wrong: Sequence[bytes] = wrong, node: Node = node) -> None:
                if is_held and wrong:
                    raise Violation(WRONG, f"{self.name} held a lease of {node.name} over other bytes")

            self.ask(node, Node.release, (taken.lease_id,), self.world.now + self.deadline_s, said)

    def _copy(
        self, rows: Keys, work: list[tuple[tuple[str, str], list[int]]], deadline: float, done: Callable[[], None]
    ) -> None:
        """Copy one group of rows after the other."""
        if not work:
            done()
            return
        (source, target), picked = work.pop()
        if source not in self.members or not self.open_to(target):
            self._copy(rows, work, deadline, done)
            return

        def stored(_: list[Result]) -> None:
            self.conduct.copied(rows, picked, target)
            self._copy(rows, work, deadline, done)

        def fetched(results: list[Result]) -> None:
            pairs = [
                (rows.digests[row], rows.parents[row])
                for row, result in zip(picked, results, strict=True)
                if result is HIT
            ]
            if pairs and self.world.now < deadline:
                self.store(self.nodes[target], pairs, deadline, stored)
            else:
                self._copy(rows, work, deadline, done)

        self.fetch(self.nodes[source], [rows.digests[row] for row in picked], deadline, fetched)

    # ------------------------------------------------------------------ a call's rounds

    def _call(self, name: str, steps: Any, ask: Any, end: Done) -> None:
        def ended(result: Any, deadline: float) -> None:
            self._ended(name, deadline, end, result)

        self._run(steps, ask, ended)

    def _run(
        self,
        steps: Callable[[float, float], Steps[Any]],
        ask: Callable[[Node, Ask, Answer], None],
        end: Callable[[Any, float], None],
    ) -> None:
        deadline = self.world.now + self.deadline_s
        call = steps(self.world.now, deadline)

        def go_on(replies: Replies | None) -> None:
            if self.gone:
                return
            try:
                asks = next(call) if replies is None else call.send(replies)
            except StopIteration as stop:
                end(stop.value, deadline)
                return
            self._round(asks, ask, go_on)

        go_on(None)

    def _ended(self, name: str, deadline: float, done: Done, result: Any) -> None:
        if self.world.now > deadline + SLACK_S:
            late = self.world.now - deadline
            raise Violation(LATE, f"{self.name}: {name} is {late:.3f} s late")
        done(result)

    def _round(
        self, asks: Mapping[str, Ask], ask: Callable[[Node, Ask, Answer], None], go_on: Callable[[Replies], None]
    ) -> None:
        names = [name for name in asks if name in self.members]
        answers: dict[str, Any] = {}

        def end() -> None:
            told, self.told = self.told, set()
            self.world.after(0.0, go_on, Replies(self.world.now, answers, told))

        def answer_of(name: str) -> Answer:
            def answer(one: Any) -> None:
                answers[name] = one
                if len(answers) == len(names):
                    end()

            return answer

        for name in names:
            ask(self.nodes[name], asks[name], answer_of(name))
        if not names:
            end()
