"""Leases and reservations: what they protect, how they end, and how much work one call may do."""

from __future__ import annotations

import pytest

from mmcache.store import index as index_module
from mmcache.store import ledger as ledger_module
from mmcache.store.answers import Found, Refusal, Reserved, Unpinned
from tests.unit.index_bed import SUM, UNIT, Bed, key


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
    assert [isinstance(entry, Found) for entry in found] == [True, True, False, False]
    assert found[2:] == [Unpinned.LATER, Unpinned.LATER]
    assert bed.index.stats().refused_pins == 1
    assert bed.reserve(key(9)) is Refusal.FULL
    assert bed.acquire(*map(key, (1, 2)), tenant=1) != [None, None]
    bed.release(bed.last_id - 2)
    bed.put(key(9))


def test_a_lease_takes_no_more_bytes_than_asked_but_always_one_value() -> None:
    bed = Bed()
    for number in (1, 2, 3):
        bed.put(key(number), units=2)
    found = bed.index.acquire(0, [*map(key, (1, 2, 9, 3))], lease_id=90, now=0.0, max_nbytes=UNIT)
    assert [isinstance(found[0], Found), *found[1:]] == [True, Unpinned.LATER, None, Unpinned.LATER]
    assert (
        len(bed.index.acquire(0, [*map(key, (1, 2, 3))], lease_id=91, now=0.0, prefix=True, max_nbytes=4 * UNIT)) == 3
    )


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
    monkeypatch.setattr(ledger_module, "EXPIRE_CLAIMS", 3)
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
    monkeypatch.setattr(index_module, "MAX_CLAIMS", 3)
    bed = Bed()
    bed.put(key(1))
    assert [isinstance(bed.acquire(key(1))[0], Found) for _ in range(3)] == [True, True, False]
    assert [isinstance(bed.reserve(key(number)), Reserved) for number in (2, 3, 4, 5)] == [True, True, True, False]


def test_a_reservation_renewed_by_a_write_does_not_delay_the_others() -> None:
    bed = Bed(units=2)
    bed.reserve(key(1))
    bed.now = 5.0
    bed.reserve(key(2))
    bed.now = 6.0
    bed.index.begin_write(1, bed.now)
    bed.index.end_write(1)
    bed.now = 15.0
    bed.put(key(3))
    assert bed.commit(1)
    assert not bed.commit(2)


def test_a_write_that_ended_late_is_reclaimed_before_younger_reservations_expire() -> None:
    bed = Bed(units=2)
    bed.reserve(key(1))
    bed.index.begin_write(1, 0.0)
    bed.now = 10.0
    bed.reserve(key(2))
    bed.index.end_write(1)
    bed.put(key(3))
    assert not bed.commit(1)
    assert bed.commit(2)


def test_blocks_stored_in_order_need_no_search_for_the_one_that_may_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "MAKE_ROOM_STEPS", 1)
    monkeypatch.setattr(index_module, "SCAN_PER_STEP", 1)
    bed = Bed(units=12)
    for number in range(1, 13):
        bed.put(key(number), key(number - 1))
    bed.put(key(20))
    assert bed.stored(key(11), key(12)) == [True, False]


def test_making_room_drops_a_bounded_number_of_expired_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "EXPIRE_CLAIMS", 1)
    bed = Bed(units=12)
    for number in range(1, 13):
        bed.put(key(number), key(number - 1))
    for _ in range(8):
        bed.acquire(key(12))
    bed.now = 10.0
    assert bed.reserve(key(20)) is Refusal.AGAIN
    assert bed.index.stats().leases >= 4
    while (answer := bed.reserve(key(20))) is Refusal.AGAIN:
        bed.index.check_integrity()
    assert isinstance(answer, Reserved)
