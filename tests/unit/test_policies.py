"""What every eviction policy must do, and what s3-fifo and value do beyond it."""

from __future__ import annotations

import random

import pytest

from mmcache.config import POLICY_NAMES
from mmcache.store.columns import NIL, heap
from mmcache.store.ghosts import WAYS, Ghosts
from mmcache.store.hazard import OLD, Hazard, _best_rates
from mmcache.store.index import Index
from mmcache.store.policies import POLICIES
from mmcache.store.policy import Factory, Policy
from mmcache.store.s3fifo import S3FIFO
from mmcache.store.value import Value
from tests.unit.index_bed import Bed, key

everyone = pytest.mark.parametrize("factory", POLICIES.values(), ids=POLICIES)


def name(number: int) -> bytes:
    return number.to_bytes(36, "little")


def anything(_row: int) -> bool:
    return True


def put(policy: Policy, row: int, *, kind: int = 1, parent: int = NIL) -> None:
    policy.insert(row, name(row), kind, parent)


@everyone
def test_rows_are_listed_shelved_and_listed_again(factory: Factory) -> None:
    policy = factory(4, heap, 1)
    assert policy.exhausted()
    assert policy.victim(anything, 9) is None
    for row in range(4):
        put(policy, row)
    assert sorted(policy.listed()) == [0, 1, 2, 3]
    looked_at: list[int] = []
    assert policy.victim(lambda row: looked_at.append(row) or False, 3) is None  # type: ignore[func-returns-value]
    assert len(looked_at) == 3
    assert sorted(policy.listed()) == sorted({0, 1, 2, 3} - set(looked_at))
    assert policy.victim(lambda _row: False, 9) is None
    assert policy.exhausted()
    policy.unshelve(2)
    policy.unshelve(2)
    assert policy.listed() == [2]
    assert policy.victim(anything, 1) == 2
    policy.evict(2, name(2))
    policy.remove(1)
    assert policy.exhausted()


@everyone
def test_a_long_random_life_keeps_the_lists_whole(factory: Factory) -> None:
    rng, size = random.Random(5), 300
    policy = factory(size, heap, 1)
    live: dict[int, int] = {}
    shelved: set[int] = set()
    free = list(range(size))
    for step in range(30_000):
        draw = rng.random()
        if free and (draw < 0.35 or not live):
            row = free.pop()
            live[row] = number = int(rng.paretovariate(0.6)) % 5000
            policy.insert(row, name(number), rng.randrange(6), rng.choice(list(live)) if draw < 0.1 else NIL)
        elif draw < 0.7:
            policy.touch(row := rng.choice(list(live)))
            shelved.difference_update({row} if row in policy_rows(policy, shelved, row) else ())
        elif draw < 0.75:
            policy.shelve(row := rng.choice(list(live)))
            shelved.add(row)
        elif draw < 0.8:
            policy.unshelve(row := rng.choice(list(live)))
            shelved.discard(row)
        elif draw < 0.82:
            policy.remove(row := rng.choice(list(live)))
            shelved.discard(row)
            free.append(row)
            del live[row]
        else:
            victim = policy.victim(anything, size)
            assert (victim is None) == policy.exhausted() or isinstance(policy, S3FIFO)
            if victim is not None:
                policy.evict(victim, name(live.pop(victim)))
                free.append(victim)
        if not step % 997:
            assert set(policy.listed()) == live.keys() - shelved
    assert set(policy.listed()) == live.keys() - shelved


def policy_rows(policy: Policy, shelved: set[int], row: int) -> set[int]:
    """The row, where its policy lists a shelved one again when it is touched."""
    return {row} if row in shelved and not isinstance(policy, (Value, S3FIFO)) else set()


@everyone
def test_children_leave_before_parents_expired_entries_leave_and_pinned_ones_stay(factory: Factory) -> None:
    bed = Bed(units=3, policy=factory)
    bed.put(key(1))
    bed.put(key(2), parent=key(1))
    bed.put(key(3), expires_at=5.0)
    bed.acquire(key(3))
    bed.put(key(4))
    assert bed.stored(key(1), key(2), key(3), key(4)) == [True, False, True, True]
    bed.put(key(5), parent=key(1))
    assert bed.stored(key(1), key(3), key(4), key(5)) == [True, True, False, True]
    bed.now = 6.0
    assert bed.stored(key(3)) == [False]
    bed.now = 20.0
    bed.index.expire(bed.now)
    bed.put(key(6))
    bed.index.check_integrity()
    assert bed.stored(key(1), key(5), key(6)) == [True, True, True]


def test_the_settings_know_every_policy() -> None:
    assert tuple(POLICIES) == POLICY_NAMES


def test_s3_fifo_lets_a_scan_pass_and_remembers_what_left_too_early() -> None:
    policy = S3FIFO(20)
    for row in range(10):
        put(policy, row)
    for row in (0, 0, 1):  # 0 twice more: it will move on; 1 once: not enough
        policy.touch(row)
    assert policy.victim(anything, 9) == 1
    policy.evict(1, name(1))
    put(policy, 1)  # a ghost: to the main queue
    for row in range(10, 18):
        victim = policy.victim(anything, 9)
        assert victim not in (None, 0, 1)
        policy.evict(victim, name(victim))
        put(policy, row)
    assert {0, 1} <= set(policy.listed())


def test_value_learns_which_entries_come_back_and_what_a_hit_saves() -> None:
    """Even numbers are used again after 150 others, as children of what was used before; odd ones never."""
    policy, rng = Value(400), random.Random(1)
    rows: dict[int, int] = {}
    free = list(range(400))
    hits = 0

    def use(number: int, kind: int) -> bool:
        if number in rows:
            policy.touch(rows[number])
            return True
        if not free:
            victim = policy.victim(anything, 400)
            assert victim is not None
            gone = next(one for one, row in rows.items() if row == victim)
            policy.evict(rows.pop(gone), name(gone))
            free.append(victim)
        rows[number] = free.pop()
        policy.insert(rows[number], name(number), kind, NIL)
        return False

    for number in range(12_000):
        use(2 * number + 1, 1)
        use(2 * number, 2)
        if number > 260:
            hits += use(2 * (number - 250 - rng.randrange(9)), 2)  # an LRU of 400 entries has lost it
    assert hits > 0.8 * 12_000
    odd = sum(number % 2 for number in rows)
    assert odd < 100


def test_ghosts_forget_the_oldest_of_a_bucket_and_give_back_what_they_were_told() -> None:
    ghosts = Ghosts(WAYS, seed=3)
    for number in range(WAYS):
        assert ghosts.add(name(number), number + 1) is None
    assert ghosts.add(name(99), 77) == 1
    assert ghosts.take(name(0)) is None
    assert [ghosts.take(name(number)) for number in (99, 5, 5, 1)] == [77, 6, None, 2]
    assert ghosts.add(name(100), 0) is None
    assert ghosts.take(name(100)) == 0


def test_the_hazard_counts_every_entry_once_at_every_age() -> None:
    hazard, rng = Hazard(2, 0), random.Random(2)
    stays: list[tuple[int, int, bool]] = []  # class, slot, ghost
    for _ in range(2 * OLD):
        for _ in range(rng.randrange(4)):
            which = rng.randrange(2)
            hazard.enter(which)
            stays.append((which, hazard.slot, False))
        for _ in range(rng.randrange(4)):
            if stays:
                which, slot, ghost = stays.pop(rng.randrange(len(stays)))
                age = min(OLD, hazard.slot - slot)
                if ghost:
                    hazard.leave_ghost(which, age, hit=True)
                elif age < OLD and rng.random() < 0.5:
                    hazard.haunt(which, age)
                    stays.append((which, slot, True))
                else:
                    hazard.leave(which, age, hit=True)
        hazard.advance(10)
        stays = [stay for stay in stays if not (stay[2] and hazard.slot - stay[1] >= OLD)]
        assert [sum(at) for at in hazard._at] == [sum(which == stay[0] for stay in stays) for which in (0, 1)]
        assert min(map(min, hazard._at)) >= 0


@pytest.mark.parametrize("seed", range(5))
def test_the_best_rate_is_that_of_the_best_age_to_give_up_at(seed: int) -> None:
    rng = random.Random(seed)
    hits = [float(rng.randrange(4)) for _ in range(12)]
    spent = [float(rng.randrange(3)) if rng.random() < 0.5 else 5.0 for _ in range(12)]
    want = []
    for first in range(12):
        sums = [(sum(hits[first:end]), sum(spent[first:end])) for end in range(first + 1, 13)]
        want.append(max((gained / time for gained, time in sums if time), default=0.0))
    spent_ones = [place for place in range(12) if spent[place]]
    got = _best_rates(hits, spent)
    assert [got[place] for place in spent_ones] == pytest.approx([want[place] for place in spent_ones])


def test_the_policy_of_an_index_is_told_kind_and_parent() -> None:
    told: list[tuple[int, int]] = []

    class Listening(Value):
        def insert(self, row: int, name: bytes, kind: int, parent: int) -> None:
            told.append((kind, parent))
            super().insert(row, name, kind, parent)

    index = Index(capacity_bytes=640, max_entries=8, seed=1, policy=Listening)
    for number, above in ((1, bytes(32)), (2, key(1))):
        index.reserve(0, key(number), above, 64, reservation_id=number, now=0.0, kind=3)
        index.commit(number, header_nbytes=1, header_sum=bytes(16), expires_at=9.0, now=0.0)
    assert told == [(3, NIL), (3, 0)]
