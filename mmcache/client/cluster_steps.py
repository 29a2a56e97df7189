"""A call of a cluster's client as rounds: whom to ask for which rows, until when, and what the answers come to. Pure.

A call is a generator. It yields a round, what goes out at the same time, is sent what came back, and returns what the
call came to. The client carries rounds out on sockets (cluster.py), the simulator on messages of its own
(mmcache.testing.simulator): so what is simulated is what runs.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Final, NamedTuple, TypeVar

from mmcache.cluster.absent import Absent
from mmcache.cluster.placement import View
from mmcache.cluster.routes import Replicas, Router, by_member
from mmcache.cluster.search import Search
from mmcache.keyset import Keys
from mmcache.transport.base import HIT, MISS, Outcome, Result

COPY_NBYTES: Final = 4 << 20  # of one call: what a shard on the same host takes in a few milliseconds
RESTING: Final = Result(Outcome.UNAVAILABLE, "no shard that may have it answers; they are asked again shortly")
_BETTER: Final = (Outcome.STORED, Outcome.PRESENT, Outcome.REFUSED)


class Ask(NamedTuple):
    """What one shard is asked for, and until when it may answer, in monotonic seconds."""

    rows: Sequence[int]
    until: float


class Replies(NamedTuple):
    """What a round came to, and when. `answers`: by member, of those that could be asked at all. `forks`: the stored
    keys that they called forks."""

    now: float
    answers: Mapping[str, Any]
    forks: AbstractSet[bytes] = frozenset()


Round = Mapping[str, Ask]
T = TypeVar("T")
Steps = Generator[Round, Replies, T]


class Read:
    """What a read came to. `results`: for each row the last thing that was said; `found_on`: who had it; `rescued`: how
    many were read beside a shard that did not answer."""

    def __init__(self, search: Search) -> None:
        self.search = search
        self.results: list[Result] = [MISS] * len(search)
        self.found_on: dict[int, str] = {}
        self.rescued = 0


class Conduct:
    """What one client knows of its cluster, and its calls. Not thread-safe: a step at a time.

    `open_to(member)`: whether it may be asked now. The rest is as for Router. Raises ConfigError as that does.
    """

    def __init__(
        self,
        view: View,
        replicas: Replicas,
        open_to: Callable[[str], bool],
        *,
        draw: int,
        now: float,
        ramp_s: float,
        absent_s: float,
    ) -> None:
        self.router = Router(view, replicas, draw, now, ramp_s)
        self.absent = Absent(absent_s)
        self._open_to = open_to
        self._news = 0  # how often a fork was heard of that was not known

    def take(self, view: View, now: float) -> None:
        """From now on this is the view."""
        self.router.take(view, now)
        self.absent.keep(self.router.ids)

    # ------------------------------------------------------------------ calls

    def leading(self, rows: Keys, now: float, deadline: float) -> Steps[int]:
        """How many leading rows are stored. A shard answers how many of its rows, from the first, it has; None: it did
        not answer."""
        found, again = b"", True
        while True:
            search = self._search(rows, now, found, self.router.forks.splits(rows, now))
            news = self._news
            while asks := search.asks(prefix=True):
                replies = yield from self._ask(rows, search, asks, now, deadline)
                now = replies.now
                for member, count in replies.answers.items():
                    if count is None:
                        self._silent(search, member, asks[member], now)
                    elif (row := search.leading(asks[member], count)) is not None:
                        self.absent.note(member, rows.digests[row], now)
            # A fork that was heard of just now says where the rest may lie: worth one more look.
            if not again or self._news == news or search.prefix == len(rows):
                return search.prefix
            found, again = bytes(search.found), False

    def read(self, rows: Keys, now: float, deadline: float, *, note: bool = True) -> Steps[Read]:
        """Each row from the first shard that has it. A shard answers one Result a row; None: it did not answer.
        `note`: a miss says that the shard does not have the row."""
        search = self._search(rows, now)
        read = Read(search)
        asked: set[int] = set()
        while asks := search.asks():
            replies = yield from self._ask(rows, search, asks, now, deadline)
            now = replies.now
            for member, results in replies.answers.items():
                if results is None:
                    self._silent(search, member, asks[member], now)
                    continue
                asked.update(asks[member])
                self._mark(rows, read, member, asks[member], results, now if note else None)
                if any(result.outcome is Outcome.UNAVAILABLE for result in results):
                    self.router.failed(member, now)
        for row, result in enumerate(read.results):
            if result is MISS and search.is_troubled(row) and row not in asked:
                read.results[row] = RESTING
        return read

    def store(self, rows: Keys, now: float, deadline: float) -> Steps[list[Result]]:
        """Every row on all its owners. A shard answers one Result a row. See `together`."""
        routes = self.router.routes(rows, now)
        groups = by_member((row, route.owners) for row, route in enumerate(routes))
        replies = yield {member: Ask(wanted, deadline) for member, wanted in groups.items()}
        self._hear(rows, replies)
        said: list[dict[str, Result]] = [{} for _ in routes]
        for member, results in replies.answers.items():
            for row, result in zip(groups[member], results, strict=True):
                said[row][member] = result
                if result:
                    self.absent.stored(member, rows.digests[row])
            if any(result.outcome is Outcome.UNAVAILABLE for result in results):
                self.router.failed(member, replies.now)
        return [together(route.owners, answers) for route, answers in zip(routes, said, strict=True)]

    def copies(self, read: Read, sizes: Sequence[int], left: float) -> dict[tuple[str, str], list[int]]:
        """What to copy after a read, by (from, to): some of what was found elsewhere than it was looked for first.
        `left`: which share of the call's time is left; copying is not begun with less than half."""
        if left < 0.5:
            return {}
        wanted_on = {row: first for row in read.found_on if (first := read.search.lacking(row)) is not None}
        return chosen(read.found_on, wanted_on, sizes)

    def copied(self, rows: Keys, picked: Sequence[int], target: str) -> None:
        """These rows were copied to that shard."""
        for row in picked:
            self.absent.stored(target, rows.digests[row])

    # ------------------------------------------------------------------ a round

    def _search(self, rows: Keys, now: float, found: bytes = b"", splits: AbstractSet[int] = frozenset()) -> Search:
        routes = self.router.routes(rows, now, counts=not found)
        digests, absent = rows.digests, self.absent

        def lacks(member: str, row: int, last: bool) -> bool:
            return absent(member, digests[row], now, last=last)

        search = Search(routes, self._open_to, lacks, splits)
        if found:
            search.found[:] = found
        return search

    def _ask(
        self, rows: Keys, search: Search, asks: Mapping[str, Sequence[int]], now: float, deadline: float
    ) -> Steps[Replies]:
        """Ask each shard for its rows. Each has its share of the time that is left, so that a shard that hangs leaves
        enough for those that are asked after it."""
        replies = Replies(now, {})
        if now < deadline:
            replies = yield {
                member: Ask(wanted, now + (deadline - now) / search.tries(wanted)) for member, wanted in asks.items()
            }
        for member in asks.keys() - replies.answers.keys():
            for row in asks[member]:
                search.fail(row)
        self._hear(rows, replies)
        return replies

    def _hear(self, rows: Keys, replies: Replies) -> None:
        if replies.forks:
            self._news += self.router.forks.hear(rows, replies.forks, replies.now)

    def _silent(self, search: Search, member: str, wanted: Sequence[int], now: float) -> None:
        for row in wanted:
            search.fail(row)
        self.router.failed(member, now)

    def _mark(
        self, rows: Keys, read: Read, member: str, wanted: Sequence[int], results: Sequence[Result], now: float | None
    ) -> None:
        search = read.search
        for row, result in zip(wanted, results, strict=True):
            read.results[row] = result
            if result.outcome is Outcome.MISS:
                search.miss(row)
                if now is not None:
                    self.absent.note(member, rows.digests[row], now)
            elif result.outcome in (Outcome.UNAVAILABLE, Outcome.CORRUPT):
                search.fail(row)
            else:
                read.rescued += search.is_troubled(row)
                search.hit(row)
                if result is HIT:
                    read.found_on[row] = member


def together(owners: Sequence[str], answers: Mapping[str, Result]) -> Result:
    """What a put came to, given what each owner that could be asked said: the best of it, and who has it not."""
    results = [answers.get(owner, RESTING) for owner in owners]
    best = next((result for kind in _BETTER for result in results if result.outcome is kind), results[0])
    without = [f"{owner}: {result.reason}" for owner, result in zip(owners, results, strict=True) if not result]
    return Result(best.outcome, f"not on {'; '.join(without)}") if best and without else best


def chosen(
    found_on: Mapping[int, str], wanted_on: Mapping[int, str], sizes: Sequence[int]
) -> dict[tuple[str, str], list[int]]:
    """Which rows to copy now, by (from, to): those that were not found where they are wanted, the first of them, up to
    COPY_NBYTES, and one at least."""
    groups: dict[tuple[str, str], list[int]] = {}
    left = COPY_NBYTES
    for row, source in found_on.items():
        target = wanted_on.get(row, source)
        if target == source:
            continue
        if groups and sizes[row] > left:
            break
        left -= sizes[row]
        groups.setdefault((source, target), []).append(row)
    return groups
