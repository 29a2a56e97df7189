"""The clock, the network and what must never happen: events in order of time, one after the other, from one seed."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from typing import Any, Final

LATENCY_S: Final = 0.0005  # the mean of what a message takes beyond as much again
SLOW_SHARE: Final = 0.02  # of messages that take longer: they are overtaken
SLOW: Final = 20  # times as long
SLOWEST: Final = 200  # in trouble: a call may be over before the answer comes

WRONG: Final = "never wrong bytes"
REUSED: Final = "no extent is reused under a claim"
LATE: Final = "every call ends by its deadline"
CAPACITY: Final = "capacity is never exceeded"
INTEGRITY: Final = "the index agrees with itself"
KEPT: Final = "a warm restart forgets nothing"
PROMISED: Final = "nothing is promised that no shard has"
ACKNOWLEDGED: Final = "a put is what its owners said"
PLACED: Final = "values go to the owners of their home"
FOUND: Final = "what is stored is found while nothing fails"
RECOVERED: Final = "the hit rate returns"
RAISES: Final = "nothing raises"


class Violation(Exception):
    """Something happened that never may; `invariant` is its name."""

    def __init__(self, invariant: str, detail: str) -> None:
        super().__init__(f"{invariant}: {detail}")
        self.invariant, self.detail = invariant, detail


class World:
    """Time and messages. `trace`, if given, is told what happens."""

    def __init__(self, seed: int, trace: Callable[[str], None] | None = None) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.events = 0
        self.loss = 0.0  # the share of messages that are lost
        self.slow = SLOW
        self.cut: set[tuple[str, str]] = set()  # (client, shard): no message passes
        self._queue: list[list[Any]] = []
        self._number = 0
        self._trace = trace

    def say(self, *words: object) -> None:
        """One line of the trace."""
        if self._trace is not None:
            self._trace(f"{self.now:10.6f}  {' '.join(map(str, words))}")

    def at(self, time: float, act: Callable[..., None], *arguments: Any) -> list[Any]:
        """An event at that time, or now if that has passed; give it to `cancel` if it is not to be."""
        self._number += 1
        event = [max(time, self.now), self._number, act, arguments]
        heapq.heappush(self._queue, event)
        return event

    def after(self, delay_s: float, act: Callable[..., None], *arguments: Any) -> list[Any]:
        """An event so much later."""
        return self.at(self.now + delay_s, act, *arguments)

    def cancel(self, event: list[Any]) -> None:
        """That event does not happen."""
        event[2] = None

    def step(self) -> bool:
        """The next event. False: there is none."""
        while self._queue:
            time, _, act, arguments = heapq.heappop(self._queue)
            if act is not None:
                self.now = time
                self.events += 1
                act(*arguments)
                return True
        return False

    def latency_s(self) -> float:
        """What one message takes."""
        taken = LATENCY_S * (1 + self.random.expovariate(1.0))
        return taken * self.slow if self.random.random() < SLOW_SHARE else taken

    def send(self, client: str, shard: str, act: Callable[..., None], *arguments: Any) -> None:
        """A message between a client and a shard, either way; it may be lost, and it may be overtaken."""
        if (client, shard) in self.cut or (self.loss and self.random.random() < self.loss):
            return
        self.after(self.latency_s(), self._arrive, client, shard, act, arguments)

    def _arrive(self, client: str, shard: str, act: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        if (client, shard) not in self.cut:
            act(*arguments)
