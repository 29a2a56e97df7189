"""Mistakes planted into the pure code, each as somebody could make it, and which invariants are to notice."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Final

import pytest

from mmcache.client import cluster_steps
from mmcache.client.cluster_steps import Conduct
from mmcache.client.plan import Breaker
from mmcache.cluster.absent import Absent
from mmcache.cluster.placement import View
from mmcache.cluster.routes import Route, Router
from mmcache.cluster.search import Search
from mmcache.keyset import Keys
from mmcache.store.columns import NIL
from mmcache.store.extents import Extents
from mmcache.store.index import Index
from mmcache.store.leases import Lease, Leases
from mmcache.store.restore import Restored, restore
from mmcache.store.rows import LIVE, RESERVED, Rows
from mmcache.testing.simulator import node
from mmcache.testing.simulator.world import (
    ACKNOWLEDGED,
    CAPACITY,
    FOUND,
    INTEGRITY,
    KEPT,
    LATE,
    PLACED,
    PROMISED,
    RAISES,
    RECOVERED,
    REUSED,
    WRONG,
)
from mmcache.transport.base import Outcome, Result
from mmcache.why import Why

Patch = pytest.MonkeyPatch


@dataclass(frozen=True)
class Mutant:
    """`plant` makes the mistake; one of `noticed` must be violated within so many seeds."""

    plant: Callable[[Patch], None]
    noticed: frozenset[str]
    seeds: int = 20


def _a_lease_ends_before_its_time(patch: Patch) -> None:
    def take_expired(self: Leases, now: float) -> Lease | None:
        return self._ended(self._open.pop(next(iter(self._open)))) if self._open else None

    patch.setattr(Leases, "take_expired", take_expired)


def _eviction_frees_what_is_leased(patch: Patch) -> None:
    drop = Index.drop

    def drop_all(self: Index, row: int, why: Why, now: float) -> None:
        node = self.rows.node[row]
        pins, self._pins[node] = self._pins[node], 0
        drop(self, row, why, now)
        self._pins[node] = pins

    patch.setattr(Index, "_evictable", lambda self, row: not self.rows.children[row])
    patch.setattr(Index, "drop", drop_all)


def _an_extent_is_too_short(patch: Patch) -> None:
    patch.setattr(Extents, "rounded", lambda self, nbytes: max(self.alignment, nbytes & -self.alignment))


def _a_second_shard_is_asked_after_the_deadline(patch: Patch) -> None:
    ask = Conduct._ask

    def ask_anew(self: Conduct, rows: Keys, search: Search, asks: Any, now: float, deadline: float) -> Any:
        return ask(self, rows, search, asks, now, now + 1.0)

    patch.setattr(Conduct, "_ask", ask_anew)


def _blocks_are_stored_by_their_own_key(patch: Patch) -> None:
    routes = Router.routes

    def routes_of_blocks(self: Router, rows: Keys, now: float, *, counts: bool = False) -> list[Route]:
        if counts:
            return routes(self, rows, now, counts=counts)
        above = rows.parents, rows.indices, rows.parent_chains
        return routes(self, Keys(rows.digests, rows.chains, rows.chains, rows.namespaces, *above), now)

    patch.setattr(Router, "routes", routes_of_blocks)


def _a_slice_is_placed_by_its_first_block(patch: Patch) -> None:
    routes = Router.routes

    def routes_of_slices(self: Router, rows: Keys, now: float, *, counts: bool = False) -> list[Route]:
        first = rows.homes[0] if len(rows) else b""
        homes = [rows.chains[0] if home == first else home for home in rows.homes]
        above = rows.parents, rows.indices, rows.parent_chains
        return routes(self, Keys(rows.digests, rows.chains, homes, rows.namespaces, *above), now, counts=counts)

    patch.setattr(Router, "routes", routes_of_slices)


def _owners_are_those_of_an_older_view(patch: Patch) -> None:
    take = Router.take

    def take_and_keep(self: Router, view: View, now: float) -> None:
        known = dict(self._owners)
        take(self, view, now)
        self._owners.update(known)

    patch.setattr(Router, "take", take_and_keep)


def _a_breaker_never_closes(patch: Patch) -> None:
    patch.setattr(Breaker, "allows", lambda self, now: not self.failures)


def _a_pause_has_no_limit(patch: Patch) -> None:
    failed = Breaker.failed

    def failed_for_longer(self: Breaker, now: float, took_s: float = 0.0) -> bool:
        longer_s = 4 * self.pause_s
        first = failed(self, now, took_s)
        self.pause_s = max(self.pause_s, longer_s)
        self.retry_at = now + self.pause_s
        return first

    patch.setattr(Breaker, "failed", failed_for_longer)


def _what_was_absent_stays_absent(patch: Patch) -> None:
    begin = Absent.__init__
    patch.setattr(Absent, "__init__", lambda self, keep_s: begin(self, 1e6))


def _a_restarted_shard_honours_leases_of_its_last_life(patch: Patch) -> None:
    lives: dict[int, Index] = {}
    begin = Index.__init__

    def begin_again(self: Index, **settings: Any) -> None:
        begin(self, **settings)
        before, lives[id(self.rows.state.obj)] = lives.get(id(self.rows.state.obj)), self
        for lease_id, lease in before._leases._open.items() if before is not None else ():
            self._leases.add(lease_id, lease.tenant, lease.expires_at, array("I"))

    patch.setattr(Index, "__init__", begin_again)


def _one_owner_that_stored_counts_for_all(patch: Patch) -> None:
    def first_good(owners: Sequence[str], answers: Mapping[str, Result]) -> Result:
        good = [result for result in answers.values() if result]
        return good[0] if good else Result(Outcome.UNAVAILABLE)

    patch.setattr(cluster_steps, "together", first_good)


def _a_prefix_goes_on_behind_a_gap(patch: Patch) -> None:
    leading = Search.leading

    def all_or_nothing(self: Search, rows: Sequence[int], count: int) -> int | None:
        return leading(self, rows, len(rows) if count else 0)

    patch.setattr(Search, "leading", all_or_nothing)


def _a_prefix_ends_with_the_first_wave(patch: Patch) -> None:
    new_wave = Search._new_wave
    patch.setattr(Search, "_new_wave", lambda self, first: new_wave(self, first) if not first else {})


def _a_restarted_shard_forgets_its_forks(patch: Patch) -> None:
    def forgetful(index: Index, tenants: int, namespaces: Set[int]) -> Restored:
        index.rows.parts_ways[:] = bytes(len(index.rows.parts_ways))
        return restore(index, tenants, namespaces)

    patch.setattr(node, "restore", forgetful)


def _the_arena_is_taken_for_larger_than_it_is(patch: Patch) -> None:
    begin = Index.__init__

    def begin_larger(self: Index, *, capacity_bytes: int, **settings: Any) -> None:
        begin(self, capacity_bytes=capacity_bytes + 1024, **settings)

    patch.setattr(Index, "__init__", begin_larger)


def _a_parent_still_counts_children_that_were_evicted(patch: Patch) -> None:
    vacate = Rows.vacate

    def vacate_and_count(self: Rows, row: int, *, evicted: bool = False) -> None:
        above = self.parent[row]
        vacate(self, row, evicted=evicted)
        if evicted and above != NIL and self.state[above] in (RESERVED, LIVE):
            self.children[above] += 1

    patch.setattr(Rows, "vacate", vacate_and_count)


def _who_failed_once_is_not_read_from_again(patch: Patch) -> None:
    failed, route_of = Router.failed, Router._route
    avoided: set[tuple[int, str]] = set()

    def failed_for_ever(self: Router, member: str, now: float) -> None:
        failed(self, member, now)
        avoided.add((id(self), member))

    def route_beside(self: Router, home: bytes, run: bytes, namespace: bytes, now: float) -> Route:
        route = route_of(self, home, run, namespace, now)
        left = tuple(name for name in route.reads if (id(self), name) not in avoided)
        return route._replace(reads=left or route.reads[:1])

    patch.setattr(Router, "failed", failed_for_ever)
    patch.setattr(Router, "_route", route_beside)


def _who_left_during_a_call_is_not_expected(patch: Patch) -> None:
    failed = Router.failed

    def failed_member(self: Router, member: str, now: float) -> None:
        if member not in self.ids:
            raise KeyError(member)
        failed(self, member, now)

    patch.setattr(Router, "failed", failed_member)


MUTANTS: Final = {
    plant.__name__.strip("_"): Mutant(plant, frozenset(noticed), seeds)
    for plant, noticed, seeds in (
        (_a_lease_ends_before_its_time, {REUSED}, 10),
        (_eviction_frees_what_is_leased, {REUSED}, 10),
        (_an_extent_is_too_short, {REUSED, WRONG, INTEGRITY}, 5),
        (_a_second_shard_is_asked_after_the_deadline, {LATE}, 10),
        (_blocks_are_stored_by_their_own_key, {PLACED}, 5),
        (_a_slice_is_placed_by_its_first_block, {PLACED, FOUND}, 5),
        (_owners_are_those_of_an_older_view, {PLACED}, 5),
        (_a_breaker_never_closes, {FOUND, RECOVERED}, 5),
        (_a_pause_has_no_limit, {FOUND, RECOVERED}, 20),
        (_what_was_absent_stays_absent, {FOUND, RECOVERED}, 5),
        (_a_restarted_shard_honours_leases_of_its_last_life, {WRONG}, 100),
        (_one_owner_that_stored_counts_for_all, {ACKNOWLEDGED}, 10),
        (_a_prefix_goes_on_behind_a_gap, {PROMISED}, 5),
        (_a_prefix_ends_with_the_first_wave, {FOUND}, 20),
        (_a_restarted_shard_forgets_its_forks, {KEPT}, 20),
        (_the_arena_is_taken_for_larger_than_it_is, {CAPACITY}, 5),
        (_a_parent_still_counts_children_that_were_evicted, {INTEGRITY}, 5),
        (_who_failed_once_is_not_read_from_again, {RECOVERED}, 10),
        (_who_left_during_a_call_is_not_expected, {RAISES}, 10),
    )
}
