"""Searches against a world that is drawn: nothing is found that is not there, and everything that a route leads to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mmcache.cluster.search as search_module
from mmcache.cluster.routes import Route
from mmcache.cluster.search import FIRST_WAVE, MAX_ROUNDS, Search

MEMBERS = ("a", "b", "c", "d")


@dataclass
class World:
    """Runs with a route each and so many rows; per run and member how many leading rows it has; who is dead, who is
    known to be, and what is known to be absent."""

    runs: list[tuple[Route, int]]
    has: dict[tuple[int, str], int]
    dead: set[str]
    shunned: set[str]
    splits: frozenset[int] = frozenset()

    @property
    def routes(self) -> list[Route]:
        return [route for route, count in self.runs for _ in range(count)]

    def there(self, member: str) -> list[bool]:
        return [place < self.has[run, member] for run, (_, count) in enumerate(self.runs) for place in range(count)]

    def search(self) -> Search:
        return Search(
            self.routes, lambda member: member not in self.shunned, lambda member, row, last: False, self.splits
        )

    def best(self, run: int) -> int:
        """How many leading rows of a run a search can find."""
        route, count = self.runs[run]
        found, troubled = 0, False
        for member in route.reads:
            gone = member in self.dead | self.shunned
            found = max(found, 0 if gone else self.has[run, member])
            troubled |= gone and found < count
        spares = [member for member in route.spares if member not in self.dead | self.shunned]
        return max([found, *(self.has[run, member] for member in spares)]) if troubled else found


@st.composite
def worlds(draw: st.DrawFn) -> World:
    runs, has = [], {}
    for run in range(draw(st.integers(1, 5))):
        order = draw(st.permutations(MEMBERS))
        reads, spares = draw(st.integers(1, 3)), draw(st.integers(0, 1))
        count = draw(st.integers(1, 6))
        runs.append((Route(tuple(order[:1]), tuple(order[:reads]), tuple(order[reads : reads + spares])), count))
        for member in MEMBERS:
            has[run, member] = draw(st.integers(0, count))
    some = st.sets(st.sampled_from(MEMBERS), max_size=2)
    rows = sum(count for _, count in runs)
    return World(runs, has, draw(some), draw(some), draw(st.frozensets(st.integers(0, rows - 1))))


def look(world: World, *, prefix: bool) -> tuple[Search, int]:
    """A search carried out; and how often a shard was asked."""
    search, requests = world.search(), 0
    asked: set[tuple[str, int]] = set()
    while asks := search.asks(prefix=prefix):
        known = search.prefix
        for member, rows in asks.items():
            requests += 1
            assert member not in world.shunned
            assert rows == sorted(rows)
            assert not prefix or rows[0] >= known
            assert not asked & {(member, row) for row in rows}
            assert 1 <= search.tries(rows) <= 5
            there = world.there(member)
            if member in world.dead:
                asked |= {(member, row) for row in rows}
                for row in rows:
                    search.fail(row)
            elif prefix:
                count = next((at for at, row in enumerate(rows) if not there[row]), len(rows))
                first = search.leading(rows, count)
                assert first == (rows[count] if count < len(rows) else None)
                asked |= {(member, row) for row in rows[: count + 1]}
            else:
                asked |= {(member, row) for row in rows}
                for row in rows:
                    (search.hit if there[row] else search.miss)(row)
    assert search.rounds <= MAX_ROUNDS
    return search, requests


@pytest.fixture(params=[1, 2, FIRST_WAVE])
def first_wave(request: pytest.FixtureRequest) -> Iterator[int]:
    """Waves as they are, and so narrow that few shards make many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_module, "FIRST_WAVE", request.param)
        yield request.param


@pytest.mark.usefixtures("first_wave")
@given(worlds())
@settings(max_examples=300, deadline=None)
def test_a_prefix_is_found_as_far_as_the_routes_lead(world: World) -> None:
    search, _ = look(world, prefix=True)
    expected = 0
    for run, (_, count) in enumerate(world.runs):
        expected += world.best(run)
        if world.best(run) < count:
            break
    assert search.prefix == expected


@given(worlds())
@settings(max_examples=300, deadline=None)
def test_single_rows_are_found_wherever_their_routes_lead(world: World) -> None:
    search, _ = look(world, prefix=False)
    alive = {member: world.there(member) for member in set(MEMBERS) - world.dead - world.shunned}
    for row, route in enumerate(world.routes):
        on_reads = any(member in alive and alive[member][row] for member in route.reads)
        on_spares = any(member in alive and alive[member][row] for member in route.spares)
        troubled = any(member not in alive for member in route.reads)
        assert bool(search.found[row]) == (on_reads or (troubled and on_spares))
        assert search.found[row] or search.is_troubled(row) == troubled


def test_a_prefix_costs_one_request_an_owner() -> None:
    runs = [(Route((member,), (member,), ()), 8) for member in "abcabcab"]
    world = World(runs, {(run, member): 8 for run in range(8) for member in MEMBERS}, set(), set())
    search, requests = look(world, prefix=True)
    assert (search.prefix, requests, search.rounds) == (64, 3, 1)


def test_a_prefix_is_found_however_many_of_its_runs_a_newcomer_lacks() -> None:
    runs = [(Route(("a",), ("a", "b"), ()), 8) for _ in range(20)]
    has = {(run, member): 8 * (member != "a") for run in range(20) for member in MEMBERS}
    search, _ = look(World(runs, has, set(), set()), prefix=True)
    assert search.prefix == 160


def test_what_lies_behind_a_row_that_nobody_has_is_not_asked_for_again() -> None:
    reads = ("a", "b")
    world = World(
        [(Route(("a",), ("a",), ()), 4), (Route(("b",), reads[::-1], ()), 4)],
        {(0, "a"): 2, (0, "b"): 0, (1, "a"): 0, (1, "b"): 0} | {(run, m): 0 for run in (0, 1) for m in "cd"},
        set(),
        set(),
    )
    search, requests = look(world, prefix=True)
    assert (search.prefix, requests) == (2, 2)


def waves_of(owners: Sequence[str], there: int, splits: frozenset[int] = frozenset()) -> list[list[str]]:
    """Who is asked in each round, of a prompt with one row for each owner, of which so many rows are stored."""
    search = Search([Route((one,), (one,), ()) for one in owners], lambda member: True, lambda *_: False, splits)
    rounds = []
    while asks := search.asks(prefix=True):
        rounds.append(list(asks))
        more = search._end < len(owners)
        for rows in asks.values():
            assert search.tries(rows) == 1 + more
            search.leading(rows, sum(row < there for row in rows))
    assert search.prefix == there
    return rounds


LONG = [f"s{number}" for number in range(40)]


def test_a_prefix_is_looked_for_in_waves_that_double() -> None:
    assert waves_of(LONG, 40) == [LONG[:8], LONG[8:24], LONG[24:]]
    assert waves_of(LONG, 8) == [LONG[:8], LONG[8:24]]
    assert waves_of(LONG, 7) == [LONG[:8]]
    assert waves_of(LONG[:8], 8) == [LONG[:8]]


def test_a_wave_is_half_as_wide_where_prompts_part_ways_and_goes_as_far_as_the_first_row_behind() -> None:
    assert waves_of(LONG, 0, frozenset({1})) == [LONG[:4]]
    assert waves_of(LONG, 0, frozenset({6})) == [LONG[:7]]
    assert waves_of(LONG, 0, frozenset({8})) == [LONG[:8]]
    assert waves_of(LONG, 40, frozenset({6})) == [LONG[:7], LONG[7:23], LONG[23:]]
    assert waves_of(LONG, 40, frozenset({6, 9})) == [LONG[:7], LONG[7:15], LONG[15:]]


def test_a_shard_that_is_asked_is_asked_for_all_that_lies_behind() -> None:
    few = [f"s{number % 10}" for number in range(40)]
    assert waves_of(few, 40) == [few[:8], few[8:10]]
    assert waves_of(["a", "b"] * 20, 40, frozenset(range(1, 40))) == [["a", "b"]]


def test_many_waves_take_no_rounds_from_each_other() -> None:
    owners = [f"s{number}" for number in range(2 * FIRST_WAVE << MAX_ROUNDS)]
    assert len(waves_of(owners, len(owners))) > MAX_ROUNDS


def test_time_is_shared_out_among_those_that_may_still_be_asked() -> None:
    route = Route(("a", "b"), ("a", "b"), ("c",))
    shut: set[str] = set()
    search = Search([route, route], lambda member: member not in shut, lambda member, row, last: False)
    assert search.asks() == {"a": [0, 1]}
    assert search.tries([0, 1]) == 3
    search.fail(0)
    search.fail(1)
    assert search.asks() == {"b": [0, 1]}
    assert search.tries([0, 1]) == 2
    shut.add("c")
    assert search.tries([0, 1]) == 1


def test_who_is_known_to_lack_a_row_is_passed_over_and_is_no_trouble() -> None:
    route = Route(("a",), ("a", "b"), ("c",))
    search = Search([route] * 2, lambda member: True, lambda member, row, last: (member, row, last) == ("a", 1, False))
    assert search.asks() == {"a": [0], "b": [1]}
    search.hit(1)
    assert search.lacking(1) == "a"
    assert search.lacking(0) is None
    assert not search.is_troubled(1)


@pytest.mark.parametrize("prefix", [True, False])
def test_nothing_to_look_for_is_found_at_once(prefix: bool) -> None:
    search = Search([], lambda member: True, lambda member, row, last: False)
    assert search.asks(prefix=prefix) == {}
    assert search.prefix == 0
