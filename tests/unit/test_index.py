"""The index, case by case: what is found, what leaves and in which order, what expires, what is refused."""

from __future__ import annotations

import math
import random

import pytest

from mmcache.errors import KeyInputError, StoreError, UsageError
from mmcache.store.answers import Found, Refusal, Reserved
from mmcache.store.index import Index
from tests.unit.index_bed import ROOT, SUM, UNIT, Bed, key


def test_what_was_committed_is_found_with_its_record() -> None:
    bed = Bed()
    offset = bed.put(key(1), units=3)
    assert bed.acquire(key(1), key(2)) == [Found(offset, 3 * UNIT, 40, SUM), None]


def test_a_reservation_is_not_visible_until_committed() -> None:
    bed = Bed()
    bed.reserve(key(1))
    assert bed.stored(key(1)) == [False]
    assert bed.acquire(key(1)) == [None]
    assert bed.commit(bed.last_id - 1)
    assert bed.stored(key(1)) == [True]


def test_prefix_answers_end_before_the_first_miss() -> None:
    bed = Bed()
    for number in (1, 2, 4):
        bed.put(key(number))
    names = [key(number) for number in (1, 2, 3, 4)]
    assert bed.index.contains(0, names, 0.0, prefix=True) == [True, True]
    assert bed.index.contains(0, names, 0.0) == [True, True, False, True]
    assert len(bed.acquire(*names, prefix=True)) == 2
    assert [found is not None for found in bed.acquire(*names)] == [True, True, False, True]


def test_tenants_share_nothing() -> None:
    bed = Bed()
    offset = bed.put(key(1), tenant=1)
    assert bed.stored(key(1), tenant=2) == [False]
    assert bed.put(key(1), tenant=2) != offset
    assert bed.index.delete(2, [key(1)], 0.0) == [True]
    assert bed.stored(key(1), tenant=1) == [True]


@pytest.mark.parametrize("seed", range(6))
def test_children_leave_before_parents_whatever_order_they_came_in(seed: int) -> None:
    order = random.Random(seed).sample(range(1, 9), 8)
    bed = Bed(units=8)
    for number in order:
        bed.put(key(number), key(number - 1) if number > 1 else ROOT)
    for filler in range(100, 108):
        bed.put(key(filler))
        stored = bed.stored(*map(key, range(1, 9)))
        assert stored == sorted(stored, reverse=True), "a parent left before its child"


@pytest.mark.parametrize("seed", range(8))
def test_eviction_is_exactly_least_recently_used_among_leaves(seed: int) -> None:
    rng = random.Random(seed)
    bed = Bed(units=24, max_entries=200)
    parent_of = {number: rng.randrange(number) if number % 5 else 0 for number in range(1, 60)}
    used: dict[int, int] = {}
    clock = 0
    for _ in range(400):
        path: list[int] = []
        number = rng.randint(1, 59)
        while number:
            path.insert(0, number)
            number = parent_of[number]
        present = [number for number in path if number in used]
        assert sum(entry is not None for entry in bed.acquire(*map(key, path))) == len(present)
        bed.release(bed.last_id)
        for number in reversed(present):
            used[number] = clock = clock + 1
        for number in path:
            if number in used:
                continue
            if len(used) == 24:
                parents = {parent_of[n] for n in (*used, number)}
                leaves = [n for n in used if n not in parents]
                if not leaves:
                    assert bed.reserve(key(number), key(parent_of[number])) is Refusal.FULL
                    break
                del used[min(leaves, key=lambda n: used[n])]
            bed.put(key(number), key(parent_of[number]))
            used[number] = clock = clock + 1
        assert {n for n in range(1, 60) if bed.stored(key(n))[0]} == used.keys()


def test_a_ring_of_parents_cannot_keep_itself_alive() -> None:
    bed = Bed(units=4)
    bed.put(key(1), key(3))
    bed.put(key(2), key(1))
    bed.put(key(3), key(2))
    bed.put(key(4), key(4))
    bed.put(key(5), units=4)
    assert bed.stored(*map(key, range(1, 6))) == [False] * 4 + [True]
    assert bed.index.stats().ghosts == 0


def test_an_entry_past_its_time_is_a_miss_and_is_removed() -> None:
    bed = Bed()
    bed.put(key(1), expires_at=5.0)
    bed.put(key(2), expires_at=5.0)
    bed.now = 4.9
    assert bed.stored(key(1)) == [True]
    bed.now = 5.0
    assert bed.stored(key(1)) == [False]
    assert bed.acquire(key(2)) == [None]
    assert bed.index.stats().entries == 0
    assert bed.index.stats().expired_entries == 2
    assert bed.index.stats().bytes_used == 0


def test_a_key_whose_entry_expired_under_a_lease_can_be_stored_again() -> None:
    bed = Bed()
    first = bed.put(key(1), expires_at=5.0)
    bed.acquire(key(1))
    bed.now = 6.0
    second = bed.put(key(1))
    assert second != first
    assert bed.acquire(key(1)) == [Found(second, UNIT, 40, SUM)]


def test_present_and_busy() -> None:
    bed = Bed()
    bed.put(key(1))
    assert bed.reserve(key(1)) is Refusal.PRESENT
    bed.reserve(key(2))
    assert bed.reserve(key(2)) is Refusal.BUSY
    assert isinstance(bed.reserve(key(2), tenant=1), Reserved)


def test_present_counts_as_a_use_and_contains_does_not() -> None:
    bed = Bed(units=3)
    for number in (1, 2, 3):
        bed.put(key(number))
    bed.reserve(key(1))
    bed.stored(key(2))
    bed.put(key(4))
    assert bed.stored(*map(key, (1, 2, 3, 4))) == [True, False, True, True]


def test_acquire_makes_the_first_key_the_most_recent() -> None:
    bed = Bed(units=3)
    for number in (1, 2, 3):
        bed.put(key(number))
    bed.acquire(*map(key, (1, 2, 3)))
    bed.release(bed.last_id)
    bed.put(key(4))
    assert bed.stored(*map(key, (1, 2, 3))) == [True, True, False]


def test_a_value_larger_than_the_store_is_refused_and_evicts_nothing() -> None:
    bed = Bed(units=8)
    bed.put(key(1))
    assert bed.reserve(key(2), units=9) is Refusal.TOO_LARGE
    assert bed.stored(key(1)) == [True]


def test_what_cannot_fit_beside_leased_memory_evicts_nothing() -> None:
    bed = Bed(units=8)
    bed.put(key(1), units=2)
    bed.put(key(2), units=6)
    bed.acquire(key(1))
    assert bed.reserve(key(3), units=7) is Refusal.FULL
    assert bed.stored(key(2)) == [True]


def test_ghosts_count_as_rows_and_leave_with_their_last_child() -> None:
    bed = Bed(units=64, max_entries=4)
    bed.put(key(1), key(101))
    bed.put(key(2), key(102))
    assert bed.index.stats().ghosts == 2
    bed.put(key(3), key(103))
    assert bed.stored(*map(key, (1, 2, 3))) == [False, True, True]
    bed.acquire(*map(key, (2, 3)))
    assert bed.reserve(key(4)) is Refusal.NO_ENTRIES
    bed.release(bed.last_id - 1)
    bed.put(key(4))
    assert bed.index.stats().ghosts == 1


def test_bytes_by_kind_follow_what_is_stored() -> None:
    bed = Bed(units=4)
    for number, kind in ((1, 1), (2, 2), (3, 2)):
        bed.index.reserve(0, key(number), ROOT, 50, reservation_id=number, now=0.0, kind=kind)
        assert bed.commit(number)
    assert dict(+bed.index.usage.by_kind) == {1: 50, 2: 100}
    bed.index.delete(0, [key(1)], 0.0)
    assert dict(+bed.index.usage.by_kind) == {2: 100}


def test_calls_that_break_the_contract_change_nothing() -> None:
    bed = Bed()
    bed.put(key(1))
    bed.acquire(key(1))
    bed.reserve(key(2))
    before = bed.index.stats()
    with pytest.raises(UsageError, match="lease id"):
        bed.index.acquire(0, [key(1)], lease_id=2, now=0.0)
    with pytest.raises(UsageError, match="reservation id"):
        bed.index.reserve(0, key(3), ROOT, 1, reservation_id=3, now=0.0)
    with pytest.raises(UsageError, match="nbytes"):
        bed.index.reserve(0, key(3), ROOT, 0, reservation_id=9, now=0.0)
    with pytest.raises(UsageError, match="header_sum"):
        bed.index.commit(3, header_nbytes=1, header_sum=b"short", expires_at=math.inf, now=0.0)
    for name, parent in ((b"short", ROOT), (key(3), b"short")):
        with pytest.raises(KeyInputError, match="32"):
            bed.index.reserve(0, name, parent, 1, reservation_id=9, now=0.0)
    assert bed.index.stats() == before
    assert bed.stored(b"short", key(1) + b"x", b"") == [False, False, False]
    bed.index.check_integrity()


@pytest.mark.parametrize("settings", [{"max_entries": 1}, {"alignment": 3}, {"capacity_bytes": 1}])
def test_impossible_sizes_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(StoreError, match="give"):
        Index(**({"capacity_bytes": 1 << 20, "max_entries": 8, "seed": 1} | settings))  # type: ignore[arg-type]


def test_columns_take_their_memory_from_the_argument() -> None:
    taken: list[memoryview] = []

    def memory(nbytes: int) -> memoryview:
        taken.append(memoryview(bytearray(nbytes)))
        return taken[-1]

    bed = Bed(max_entries=1000, memory=memory)
    bed.put(key(1))
    assert any(key(1) in column.tobytes() for column in taken)
    assert sum(column.nbytes for column in taken) < 1000 * 220


@pytest.mark.parametrize("column", ["state", "children", "node", "parent"])
def test_check_integrity_notices_damage(column: str) -> None:
    bed = Bed(units=8)
    for number in range(1, 6):
        bed.put(key(number), key(number - 1))
    bed.acquire(key(3))
    getattr(bed.index.rows, column)[2] ^= 1
    with pytest.raises(AssertionError):
        bed.index.check_integrity()
