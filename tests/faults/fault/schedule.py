"""Which faults, when, for how long and on what, from a seed. Pure: the seed's random numbers and nothing else."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tests.faults.fault.kinds import Kind

GAP_S = (0.3, 4.0)  # from one beginning to the next
REST_S = 2.0  # of a target between two faults


@dataclass(frozen=True)
class Planned:
    """A fault to come. `begin_s`: after the trouble begins."""

    kind: str
    target: str
    begin_s: float
    length_s: float


def plan(seed: int, seconds: float, kinds: Mapping[str, Kind]) -> list[Planned]:
    """All kinds in an order by chance, again and again, until the time is over; one at a time on each target."""
    drawn = random.Random(seed)
    free_s: defaultdict[str, float] = defaultdict(float)
    planned: list[Planned] = []
    clock_s = 0.0
    for name in _decks(drawn, list(kinds)):
        kind = kinds[name]
        target = min(drawn.sample(kind.targets, len(kind.targets)), key=lambda one: max(clock_s, free_s[one]))
        begin_s = max(clock_s, *(free_s[one] for one in (target, *kind.also)))
        length_s = drawn.uniform(kind.least_s, kind.most_s)
        clock_s += drawn.uniform(*GAP_S)
        if clock_s > seconds:
            break
        if begin_s + length_s > seconds:
            continue
        for one in (target, *kind.also):
            free_s[one] = begin_s + length_s + REST_S
        planned.append(Planned(name, target, begin_s, length_s))
    return sorted(planned, key=lambda one: one.begin_s)


def _decks(drawn: random.Random, names: list[str]) -> Iterator[str]:
    while True:
        drawn.shuffle(names)
        yield from names
