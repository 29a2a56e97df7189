"""The index, case by case: what is pinned, what leaves, what expires, what is refused, and for how much work."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from mmcache.errors import KeyInputError, StoreError, UsageError
from mmcache.store import index as index_module
from mmcache.store.answers import Found, Refusal, Reserved
from mmcache.store.index import Index
from mmcache.store.table import Table, tenant_prefix

UNIT = 64
SUM = bytes(range(16))
ROOT = bytes(32)


def key(number: int) -> bytes:
    return number.to_bytes(32, "little")


class Bed:
    """An index with short ways to do whole operations; `now` and ids are kept here."""

    def __init__(self, units: int = 8, max_entries: int = 64, **settings: Any) -> None:
        self.index = Index(capacity_bytes=units * UNIT, max_entries=max_entries, seed=7, lease_s=10.0, **settings)
        self.now = 0.0
        self.last_id = 0

    def reserve(self, name: bytes, parent: bytes = ROOT, units: int = 1, tenant: int = 0) -> Reserved | Refusal:
        self.last_id += 1
        return self.index.reserve(tenant, name, parent, units * UNIT, reservation_id=self.last_id, now=self.now)

    def commit(self, reservation_id: int | None = None, expires_at: float = math.inf) -> bool:
        return self.index.commit(
            reservation_id or self.last_id, header_nbytes=40, header_sum=SUM, expires_at=expires_at, now=self.now
        )

    def put(
        self, name: bytes, parent: bytes = ROOT, units: int = 1, tenant: int = 0, expires_at: float = math.inf
    ) -> int:
        """Stores and returns the offset."""
        answer = self.reserve(name, parent, units, tenant)
        assert isinstance(answer, Reserved), answer
        assert self.commit(expires_at=expires_at)
        self.index.check_integrity()
        return answer.offset

    def acquire(self, *names: bytes, tenant: int = 0, prefix: bool = False) -> list[Found | None]:
        self.last_id += 1
        return self.index.acquire(tenant, names, lease_id=self.last_id, now=self.now, prefix=prefix)

    def release(self, lease_id: int, tenant: int = 0) -> bool:
        held = self.index.release(tenant, lease_id, self.now)
        self.index.check_integrity()
        return held

    def stored(self, *names: bytes, tenant: int = 0) -> list[bool]:
        return self.index.contains(tenant, names, self.now)


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


def test_a_lease_is_released_once_and_only_by_its_tenant() -> None:
    bed = Bed()
    bed.put(key(1), tenant=1)
    bed.acquire(key(1), tenant=1)
    assert not bed.release(bed.last_id, tenant=2)
    assert bed.index.stats().leases == 1
    assert bed.release(bed.last_id, tenant=1)
    assert not bed.release(bed.last_id, tenant=1)


def test_nothing_found_leaves_no_lease() -> None:
    bed = Bed()
    bed.acquire(key(1))
    assert bed.index.stats().leases == 0
    assert not bed.release(bed.last_id)


def test_a_release_after_expiry_says_so() -> None:
    bed = Bed()
    bed.put(key(1))
    bed.acquire(key(1))
    bed.now = 10.0
    assert not bed.release(bed.last_id)
    assert bed.index.stats().held_bytes == 0


def test_leases_expire_oldest_first_and_free_what_they_pinned() -> None:
    bed = Bed(units=2)
    bed.put(key(1))
    bed.put(key(2))
    bed.acquire(key(1))
    bed.now = 5.0
    bed.acquire(key(2))
    assert bed.reserve(key(3)) is Refusal.FULL
    bed.now = 10.0
    bed.put(key(3))
    assert bed.stored(key(1), key(2), key(3)) == [False, True, True]
    assert bed.index.stats().expired_leases == 1


def test_duplicates_in_a_batch_are_pinned_twice_and_let_go_together() -> None:
    bed = Bed(units=1)
    bed.put(key(1))
    assert len(bed.acquire(key(1), key(1))) == 2
    assert bed.index.stats().held_bytes == UNIT
    bed.index.check_integrity()
    assert bed.release(bed.last_id)
    bed.put(key(2))


def test_an_entry_deleted_under_a_lease_vanishes_but_keeps_its_bytes() -> None:
    bed = Bed(units=2)
    offset = bed.put(key(1))
    bed.acquire(key(1))
    lease_id = bed.last_id
    assert bed.index.delete(0, [key(1), key(1)], 0.0) == [True, False]
    assert bed.stored(key(1)) == [False]
    again = bed.put(key(1))
    assert again != offset
    assert bed.reserve(key(2), units=2) is Refusal.FULL
    assert bed.acquire(key(1)) == [Found(again, UNIT, 40, SUM)]
    assert bed.release(bed.last_id)
    assert bed.release(lease_id)
    bed.put(key(2), units=2)


def test_a_parent_deleted_under_a_lease_and_stored_again_still_outlives_its_child() -> None:
    bed = Bed(units=4)
    bed.put(key(1))
    bed.put(key(2), key(1))
    bed.acquire(key(1))
    bed.index.delete(0, [key(1)], 0.0)
    assert bed.index.stats().ghosts == 1
    bed.put(key(1))
    assert bed.index.stats().ghosts == 0
    bed.release(bed.last_id - 1)
    bed.put(key(3), units=2)
    assert bed.stored(key(1), key(2), key(3)) == [True, False, True]


def test_deleted_bytes_come_back_when_the_lease_expires() -> None:
    bed = Bed(units=1)
    bed.put(key(1))
    bed.acquire(key(1))
    bed.index.delete(0, [key(1)], 0.0)
    bed.now = 10.0
    bed.put(key(2))


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


def test_reservations_expire_and_late_calls_are_told() -> None:
    bed = Bed(units=1)
    bed.reserve(key(1))
    bed.now = 10.0
    bed.put(key(2))
    assert not bed.index.begin_write(1, bed.now)
    assert not bed.commit(1)
    bed.index.end_write(1)
    bed.index.abort(1)
    bed.index.check_integrity()
    assert bed.stored(key(1), key(2)) == [False, True]
    assert bed.index.stats().expired_reservations == 1


def test_a_write_in_flight_is_never_reclaimed() -> None:
    bed = Bed(units=1)
    bed.reserve(key(1))
    assert bed.index.begin_write(1, 0.0)
    bed.now = 100.0
    assert bed.reserve(key(2)) is Refusal.FULL
    bed.index.check_integrity()
    assert not bed.commit(1), "committed under the writer"
    bed.index.end_write(1)
    assert bed.commit(1), "reclaimed although nobody needed it"
    assert bed.stored(key(1)) == [True]


def test_a_write_that_ends_after_expiry_is_reclaimed_when_memory_is_needed() -> None:
    bed = Bed(units=1)
    bed.reserve(key(1))
    bed.index.begin_write(1, 0.0)
    bed.now = 100.0
    bed.index.expire(bed.now)
    bed.index.end_write(1)
    bed.put(key(2))
    assert not bed.commit(1)


def test_an_abort_during_a_write_waits_for_its_end() -> None:
    bed = Bed(units=1)
    bed.reserve(key(1))
    bed.index.begin_write(1, 0.0)
    bed.index.begin_write(1, 0.0)
    bed.index.abort(1)
    assert not bed.index.begin_write(1, 0.0)
    bed.index.end_write(1)
    assert bed.reserve(key(2)) is Refusal.FULL
    bed.index.end_write(1)
    bed.put(key(2))


def test_begin_write_renews_the_expiry() -> None:
    bed = Bed()
    bed.reserve(key(1))
    bed.now = 9.0
    assert bed.index.begin_write(1, bed.now)
    bed.index.end_write(1)
    bed.now = 18.9
    bed.index.expire(bed.now)
    assert bed.commit(1)


def test_a_value_already_past_its_time_is_not_stored() -> None:
    bed = Bed()
    bed.reserve(key(1))
    bed.now = 1.0
    assert not bed.commit(1, expires_at=1.0)
    assert bed.index.stats().bytes_used == 0


def test_one_tenant_cannot_hold_more_than_its_share() -> None:
    bed = Bed(units=8, max_pinned_bytes=2 * UNIT)
    for number in (1, 2, 3):
        bed.put(key(number))
        bed.put(key(number), tenant=1)
    found = bed.acquire(*map(key, (1, 2, 3, 1)))
    assert [entry is not None for entry in found] == [True, True, False, True]
    assert bed.index.stats().refused_pins == 1
    assert bed.reserve(key(9)) is Refusal.FULL
    assert bed.acquire(*map(key, (1, 2)), tenant=1) != [None, None]
    bed.release(bed.last_id - 2)
    bed.put(key(9))


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
    assert bed.index.nbytes_by_kind() == {1: 50, 2: 100}
    bed.index.delete(0, [key(1)], 0.0)
    assert bed.index.nbytes_by_kind() == {2: 100}


def test_one_call_evicts_a_bounded_number_and_says_to_call_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "MAKE_ROOM_STEPS", 4)
    bed = Bed(units=12)
    for number in range(1, 13):
        bed.put(key(number))
    assert bed.reserve(key(20), units=10) is Refusal.AGAIN
    assert bed.index.stats().evictions == 4
    answers = [bed.reserve(key(20), units=10) for _ in range(2)]
    assert answers[0] is Refusal.AGAIN
    assert isinstance(answers[1], Reserved)
    bed.index.check_integrity()


def test_one_call_looks_at_a_bounded_number_of_rows_that_may_not_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "MAKE_ROOM_STEPS", 2)
    monkeypatch.setattr(index_module, "SCAN_PER_STEP", 2)
    bed = Bed(units=12)
    for number in range(1, 13):
        bed.put(key(number), key(number - 1))
    for number in range(1, 13):  # now every parent is older than its child
        bed.acquire(key(number))
        bed.release(bed.last_id)
    answers = [bed.reserve(key(20)) for _ in range(10)]
    bed.index.check_integrity()
    assert answers[0] is Refusal.AGAIN
    assert any(isinstance(answer, Reserved) for answer in answers)
    assert bed.stored(key(12)) == [False]


def test_one_call_drops_a_bounded_number_of_expired_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "EXPIRE_CLAIMS", 3)
    bed = Bed()
    bed.put(key(1))
    for _ in range(7):
        bed.acquire(key(1))
    left = []
    for _ in range(3):
        bed.index.expire(50.0)
        left.append(bed.index.stats().leases)
    assert left == [4, 1, 0]


def test_open_leases_and_reservations_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "MAX_CLAIMS", 2)
    bed = Bed()
    bed.put(key(1))
    assert [bed.acquire(key(1))[0] is not None for _ in range(3)] == [True, True, False]
    assert [isinstance(bed.reserve(key(number)), Reserved) for number in (2, 3, 4)] == [True, True, False]


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


def test_probing_and_deleting_survive_a_full_table_of_colliding_homes(monkeypatch: pytest.MonkeyPatch) -> None:
    # Every name hashes to one of the last three slots, so that every chain of probes wraps around the end.
    def colliding(name: bytes, seed: int) -> int:
        return (0xFFFFFFFF - name[4] % 3 * 0x02000000) << 32

    monkeypatch.setattr("mmcache.store.table.xxh3_64_intdigest", colliding)
    table, prefix, rng = Table(40, seed=1), tenant_prefix(0), random.Random(3)
    rows: dict[bytes, int] = {}
    for _ in range(600):
        name = key(rng.randrange(60))
        if name in rows:
            table.remove(rows.pop(name))
        elif table.available():
            rows[name] = table.add(prefix, name)
        assert table.check_integrity() == set(rows.values())
        assert table.find_all(prefix, [key(n) for n in range(60)], False) == [rows.get(key(n), -1) for n in range(60)]


def test_the_hash_depends_on_the_seed() -> None:
    def slots(seed: int) -> list[int]:
        table = Table(8, seed)
        for number in range(8):
            table.add(tenant_prefix(0), key(number))
        return [entry & 0xFFFFFFFF for entry in table._slots]

    assert slots(1) != slots(2)


@pytest.mark.parametrize("column", ["state", "children", "node", "parent"])
def test_check_integrity_notices_damage(column: str) -> None:
    bed = Bed(units=8)
    for number in range(1, 6):
        bed.put(key(number), key(number - 1))
    bed.acquire(key(3))
    getattr(bed.index._rows, column)[2] ^= 1
    with pytest.raises(AssertionError):
        bed.index.check_integrity()
