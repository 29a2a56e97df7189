"""A read as a search: whom to ask for which rows now, and whom next, given what was answered. Pure.

Each row goes along its route until a shard has it. Rows are asked for in rounds: in one round every shard is asked
once, all at the same time. A prefix ends at the first row that nobody has; what lies behind it is not asked for again.

A prefix is looked for in waves, each begun when all rows of the one before are found: the first few shards of a long
prompt, then twice as many, and so on. Behind a place where prompts part ways a wave asks half as many, as most prompts
that are new end there. So one of which little is stored asks few shards, and one that is stored whole takes a round or
two more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from typing import Final

from mmcache.cluster.routes import Route

MAX_ROUNDS: Final = 6  # in which a prefix does not grow; of any other read
FIRST_WAVE: Final = 8  # shards that the first wave asks at most; half as many where prompts part ways


class Search:
    """Rows by number, each at some place of its route. `found[row]` is 1 once a shard has answered that it has it.

    `open_to(member)`: whether it may be asked now. `lacks(member, row, last)`: whether it is known not to have that
    row; `last`: nobody else is left to ask. `splits`: the rows before which prompts part ways.
    """

    def __init__(
        self,
        routes: Sequence[Route],
        open_to: Callable[[str], bool],
        lacks: Callable[[str, int, bool], bool],
        splits: Set[int] = frozenset(),
    ) -> None:
        self._routes, self._open_to, self._lacks, self._splits = routes, open_to, lacks, splits
        self._wave, self._end = FIRST_WAVE, len(routes)  # how many shards the next one asks; where this one ends
        self._places = [0] * len(routes)
        self._troubled = bytearray(len(routes))
        self.found = bytearray(len(routes))
        self.rounds = 0
        self._reached = 0  # the prefix when rounds were last counted from 0

    def __len__(self) -> int:
        return len(self._routes)

    @property
    def prefix(self) -> int:
        """How many leading rows are found."""
        return len(self.found) if (end := self.found.find(0)) < 0 else end

    def asks(self, *, prefix: bool = False) -> dict[str, list[int]]:
        """Whom to ask in this round for which rows, in order; empty when the search is over.

        With `prefix`: only rows that can still be part of it, in waves.
        """
        groups: dict[str, list[int]] = {}
        first = self.prefix if prefix else 0
        if prefix and (first >= self._end or not self.rounds):
            return self._new_wave(first)
        if prefix and first > self._reached:
            self._reached, self.rounds = first, 0
        if self.rounds >= MAX_ROUNDS:
            return groups
        self.rounds += 1
        open_now: dict[str, bool] = {}
        for row in range(first, self._end):
            if self.found[row]:
                continue
            member = self._next(row, open_now)
            if member is not None:
                groups.setdefault(member, []).append(row)
            elif prefix:
                break
        return groups

    def _new_wave(self, first: int) -> dict[str, list[int]]:
        """The first round of one that begins with this row. Who is asked is asked for all rows behind it, too."""
        groups: dict[str, list[int]] = {}
        open_now: dict[str, bool] = {}
        self.rounds, self._end, most = 1, len(self._routes), self._wave
        self._wave *= 2
        parted, later = False, None
        routes, found, splits = self._routes, self.found, self._splits
        for row in range(first, len(routes)):
            if found[row] or routes[row] is later:
                continue
            member = self._next(row, open_now)
            if member is None:
                break
            parts = row in splits
            if member in groups:
                groups[member].append(row)
            elif len(groups) < (most // 2 if parted and not parts else most):
                groups[member] = [row]
            else:
                self._end, most, later = min(self._end, row), 0, routes[row]
            parted |= parts
        return groups

    def _next(self, row: int, open_now: dict[str, bool]) -> str | None:
        route, place = self._routes[row], self._places[row]
        while True:
            if place < len(route.reads):
                member = route.reads[place]
            elif self._troubled[row] and place < len(route.reads) + len(route.spares):
                member = route.spares[place - len(route.reads)]
            else:
                self._places[row] = place
                return None
            answers = open_now.get(member)
            if answers is None:
                answers = open_now[member] = self._open_to(member)
            if answers and not self._lacks(member, row, place + 1 >= len(route.reads)):
                self._places[row] = place
                return member
            self._troubled[row] |= not answers
            place += 1

    def tries(self, rows: Sequence[int]) -> int:
        """Among how many tries the time that is left should be shared out: this round's, those after it, and a wave."""
        left, last = 1, None
        for row in rows:
            if row >= self._end:
                break
            route, place = self._routes[row], self._places[row]
            if route is not last and len(route.reads) + len(route.spares) - place > left:
                left = max(left, sum(map(self._open_to, (route.reads + route.spares)[place:])))
            last = route
        return left + (self._end < len(self._routes))

    def lacking(self, row: int) -> str | None:
        """Who was to have a row first, and did not, where another shard had it, and all that were asked answered."""
        place = self._places[row]
        return self._routes[row].reads[0] if place and not self._troubled[row] else None

    def is_troubled(self, row: int) -> bool:
        """Whether somebody who may have it could not be asked."""
        return bool(self._troubled[row])

    def hit(self, row: int) -> None:
        """It is there."""
        self.found[row] = 1

    def miss(self, row: int) -> None:
        """Who was asked does not have it."""
        self._places[row] += 1

    def fail(self, row: int) -> None:
        """Who was asked did not answer, or not with the right bytes."""
        self._places[row] += 1
        self._troubled[row] = 1

    def leading(self, rows: Sequence[int], count: int) -> int | None:
        """Who was asked for these rows has the first `count`, and not the next one, which is returned. The rest of its
        run is not there either, as far as that matters; of rows behind nothing is known."""
        for row in rows[:count]:
            self.found[row] = 1
        if count >= len(rows):
            return None
        first, route = rows[count], self._routes[rows[count]]
        for row in rows[count:]:
            if self._routes[row] is not route:
                break
            self._places[row] += 1
        return first
