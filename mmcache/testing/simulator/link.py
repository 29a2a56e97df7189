"""What a client has for each shard: its real breaker, and requests that have an answer, or none, by a given time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from mmcache.client.plan import Breaker
from mmcache.store.answers import Refusal
from mmcache.testing.simulator.node import Node, Taken
from mmcache.testing.simulator.values import Values, checksum
from mmcache.testing.simulator.world import WRONG, Violation, World
from mmcache.transport.base import HIT, MISS, Outcome, Result

SILENT: Final = Result(Outcome.UNAVAILABLE, "the shard did not answer")
CORRUPT: Final = Result(Outcome.CORRUPT, "the checksum is another")
STORED: Final = Result(Outcome.STORED)
PRESENT: Final = Result(Outcome.PRESENT)
LOST: Final = Result(Outcome.REFUSED, "the reservation expired")
COPY_S: Final = 0.0003  # the mean of what taking values out of mapped memory takes
Answer = Callable[[Any], None]


class Links:
    """The shards as one client reaches them."""

    def __init__(self, world: World, values: Values, nodes: Mapping[str, Node], name: str) -> None:
        self.world, self.values, self.nodes, self.name = world, values, nodes, name
        self.breakers: dict[str, Breaker] = {}
        self.members: frozenset[str] = frozenset()
        self.gone = False  # its process has ended
        self.busy = False  # with a request
        self.told: set[bytes] = set()  # forks that replies named since a round ended
        self.denied: dict[tuple[str, bytes], float] = {}  # when a shard last said that it does not have a key

    def open_to(self, name: str) -> bool:
        """Whether a shard may be asked now."""
        return name in self.members and self._breaker(name).allows(self.world.now)

    def _breaker(self, name: str) -> Breaker:
        if name not in self.breakers:
            self.breakers[name] = Breaker(draw=self.world.random.random)
        return self.breakers[name]

    def ask(
        self, node: Node, operation: Callable[..., Any], arguments: tuple[Any, ...], until: float, answer: Answer
    ) -> None:
        """As a shard's client does: not at all while it is left alone, and not beyond `until`. None: no answer."""
        world, breaker, begun = self.world, self._breaker(node.name), self.world.now
        if not breaker.allows(begun):
            answer(None)
            return
        failures, life = breaker.failures, node.life
        open_ = True

        def failed() -> None:
            nonlocal open_
            if open_ and not self.gone:
                open_ = False
                breaker.failed(world.now, world.now - begun)
                answer(None)

        def reply(result: Any, forks: frozenset[bytes] = frozenset()) -> None:
            nonlocal open_
            if not open_ or self.gone:
                return
            if result is None:
                world.cancel(timer)
                failed()
                return
            open_ = False
            world.cancel(timer)
            breaker.succeeded(failures)
            self.told |= forks
            answer(result)

        timer = world.at(until, failed)
        world.say(self.name, operation.__name__, node.name, "life", life, "until", f"{until:.4f}")
        world.send(self.name, node.name, node.receive, self.name, reply, operation, arguments)

    def fetch(self, node: Node, digests: Sequence[bytes], until: float, answer: Answer) -> None:
        """Take values out of memory under a lease, check them, and give the lease back."""

        def heard(taken: Taken | None) -> None:
            if taken is None:
                answer([SILENT] * len(digests))
                return
            self.world.at(min(until, self.world.now + COPY_S * self.world.random.expovariate(1.0)), copied, taken)

        def copied(taken: Taken) -> None:
            if self.gone:
                return
            results = [self._look(taken, row, digest) for row, digest in enumerate(digests)]
            for digest, result in zip(digests, results, strict=True):
                if result is MISS:
                    self.denied[node.name, digest] = self.world.now
            if taken.lease_id:
                self.world.send(
                    self.name, node.name, node.receive, self.name, _nothing, Node.release, (taken.lease_id,)
                )
            answer(results)

        self.ask(node, Node.take, (digests,), until, heard)

    def _look(self, taken: Taken, row: int, digest: bytes) -> Result:
        place = taken.places[row]
        if place is None:
            return MISS
        whose = self.values.at(taken.cells, place)
        if whose is None or checksum(whose) != place.header_sum:
            return CORRUPT
        if whose != digest:
            raise Violation(WRONG, f"{self.name} was told of {whose.hex()[:8]} where it asked for {digest.hex()[:8]}")
        return HIT

    def store(
        self,
        node: Node,
        pairs: Sequence[tuple[bytes, bytes]],
        until: float,
        answer: Callable[[list[Result]], None],
    ) -> None:
        def heard(said: list[Refusal | bool] | None) -> None:
            answer([SILENT] * len(pairs) if said is None else [_put_result(one) for one in said])

        is_lost = self.world.random.random() < self.world.loss
        self.ask(node, Node.store, (pairs, is_lost), until, heard)


def _nothing(*_: Any) -> None:
    """Nobody waits for this reply."""


def _put_result(answer: Refusal | bool) -> Result:
    if answer is Refusal.PRESENT:
        return PRESENT
    if isinstance(answer, Refusal):
        return Result(Outcome.REFUSED, answer.value)
    return STORED if answer else LOST
