"""Finer homes: tails that part ways inside a run are spread, every slice of them alike, and memory is bounded."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcache.cluster import homes as homes_module
from mmcache.cluster.homes import Forks
from mmcache.keyset import Part, woven
from tests.unit.cluster_bed import prompt, view_of

SHARED = 5000  # in the run that goes from 4096 to 8192
FORK = SHARED // 16 - 1  # the last block that all have


def forked(keep_s: float = 600.0) -> Forks:
    forks = Forks(keep_s)
    keys = prompt(SHARED, 100, 0)
    assert forks.hear(keys, [keys.digests[FORK]], 0.0)
    return forks


def test_without_forks_a_row_is_placed_by_its_run() -> None:
    keys = prompt(SHARED, 4000, 1)
    assert list(Forks().homes(keys, 0.0)) == keys.homes


def test_behind_a_fork_each_tail_has_a_home_of_its_own_up_to_the_end_of_the_run() -> None:
    forks = forked()
    one, other = prompt(SHARED, 4000, 1), prompt(SHARED, 4000, 2)
    homes, others = forks.homes(one, 1.0), forks.homes(other, 1.0)
    assert homes[: FORK + 1] == one.homes[: FORK + 1] == others[: FORK + 1]
    behind = range(FORK + 1, 8192 // 16)
    assert {homes[row] for row in behind} == {one.chains[FORK + 1]}
    assert {others[row] for row in behind} == {other.chains[FORK + 1]}
    assert homes[behind.stop :] == one.homes[behind.stop :]


def test_a_fork_behind_a_fork_is_finer_still() -> None:
    forks, keys = forked(), prompt(SHARED, 4000, 1)
    second = FORK + 20
    forks.hear(keys, [keys.digests[second]], 0.0)
    homes = forks.homes(keys, 1.0)
    assert {homes[row] for row in range(FORK + 1, second + 1)} == {keys.chains[FORK + 1]}
    assert {homes[row] for row in range(second + 1, 8192 // 16)} == {keys.chains[second + 1]}


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_slice_is_placed_as_the_whole_once_what_lies_before_it_was_seen(data: st.DataObject) -> None:
    forks, keys = forked(), prompt(SHARED, 4000, 1)
    whole = forks.homes(keys, 1.0)
    start = data.draw(st.integers(0, len(keys)))
    stop = data.draw(st.integers(start, len(keys)))
    assert list(forks.homes(keys[start:stop], 2.0)) == list(whole[start:stop])


def test_all_parts_of_a_block_are_placed_together() -> None:
    forks, keys = forked(), prompt(SHARED, 4000, 1)
    both = woven([keys.for_part(Part(kv_heads=(at, at + 1, 2))) for at in (0, 1)])
    homes = list(forks.homes(both, 1.0))
    assert homes[::2] == homes[1::2] == list(forks.homes(keys, 1.0))


def test_a_fork_is_learnt_from_a_parent_and_from_any_part() -> None:
    keys = prompt(SHARED, 4000, 1).for_part(Part(layers=(0, 4, 8)))
    forks = Forks()
    tail = keys[FORK + 1 :]
    assert forks.hear(tail, [tail.parents[0]], 0.0)
    assert forks.homes(tail, 1.0)[0] == tail.chains[0] != tail.homes[0]


def test_what_is_not_among_the_rows_is_not_learnt_and_what_is_known_is_no_news() -> None:
    forks, keys = forked(), prompt(SHARED, 4000, 1)
    assert not forks.hear(keys, [bytes(32), prompt(SHARED, 100, 9).digests[-1]], 1.0)
    assert not forks.hear(keys, [keys.digests[FORK]], 1.0)
    assert len(forks) == 1


def test_many_forks_and_strangers_are_heard_in_one_pass_over_the_rows() -> None:
    """A shard may name hundreds in a reply, and all calls of a client wait for each other meanwhile."""

    class Counted(list[bytes]):
        """Counts how often it is searched."""

        searches = 0

        def __contains__(self, one: object) -> bool:
            self.searches += 1
            return super().__contains__(one)

    keys = prompt(SHARED, 4000, 1)
    keys.digests, keys.parents = Counted(keys.digests), Counted(keys.parents)
    forks = Forks()
    assert forks.hear(keys, [*keys.digests[-300:], *(bytes([n]) * 32 for n in range(200))], 0.0)
    assert len(forks) == 300
    assert keys.digests.searches + keys.parents.searches <= 2


def test_a_fork_not_heard_of_for_long_is_forgotten_and_learnt_anew() -> None:
    forks, keys = forked(keep_s=10.0), prompt(SHARED, 4000, 1)
    assert forks.homes(keys, 9.0)[-1] == keys.homes[-1]
    assert forks.homes(keys, 9.0)[FORK + 1] != keys.homes[FORK + 1]
    assert list(forks.homes(prompt(SHARED, 4000, 2), 11.0)) == prompt(SHARED, 4000, 2).homes
    assert forks.hear(keys, [keys.digests[FORK]], 11.0)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(homes_module, "MAX_FORKS", 10)
    monkeypatch.setattr(homes_module, "MAX_TRAILS", 100)
    forks, keys = Forks(), prompt(0, 8000, 1)
    forks.hear(keys, keys.digests, 0.0)
    assert 5 <= len(forks) <= 10
    for label in range(20):
        forks.homes(prompt(SHARED, 4000, label), 1.0)
    assert len(forks._trails) <= 100


def test_tails_that_part_ways_do_not_load_one_shard() -> None:
    """The same prompts, before a fork is heard of and after: blocks of the fullest of 16 shards, over the mean."""
    view, prompts = view_of(16), [prompt(SHARED, 3000, label) for label in range(200)]

    def skew(forks: Forks) -> float:
        blocks = {pair for keys in prompts for pair in zip(keys.chains, forks.homes(keys, 1.0), strict=True)}
        load = Counter(view.owners(home)[0] for _, home in blocks)
        return max(load.values()) * 16 / sum(load.values())

    assert skew(Forks()) > 10
    assert skew(forked()) < 2
