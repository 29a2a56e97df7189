"""LRU: the order in which rows are proposed, shelving, and bounded scans."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mmcache.store.policy import LRU


def full(rows: int = 5) -> LRU:
    lru = LRU(rows)
    for row in range(rows):
        lru.insert(row)
    return lru


def anything(_row: int) -> bool:
    return True


def excluding(*rows: int) -> Callable[[int], bool]:
    return lambda row: row not in rows


def test_the_least_recently_used_leaves_first() -> None:
    lru = full()
    lru.touch(0)
    lru.touch(4)
    lru.touch(2)
    assert lru.listed() == [1, 3, 0, 4, 2]
    assert lru.victim(anything, 1) == 1


def test_a_victim_stays_until_it_is_removed() -> None:
    lru = full()
    assert [lru.victim(anything, 1) for _ in range(2)] == [0, 0]
    lru.remove(0)
    assert lru.victim(anything, 1) == 1


def test_rows_that_may_not_leave_are_shelved_and_not_looked_at_again() -> None:
    lru, seen = full(), []

    def third_or_later(row: int) -> bool:
        seen.append(row)
        return row >= 2

    assert lru.victim(third_or_later, 5) == 2
    assert lru.victim(third_or_later, 5) == 2
    assert seen == [0, 1, 2, 2]
    assert lru.listed() == [2, 3, 4]


def test_an_unshelved_row_is_next_a_touched_one_is_last() -> None:
    lru = full()
    assert lru.victim(excluding(0, 1), 5) == 2
    lru.unshelve(1)
    lru.touch(0)
    assert lru.listed() == [1, 2, 3, 4, 0]


def test_unshelving_a_listed_row_changes_nothing() -> None:
    lru = full()
    lru.unshelve(3)
    assert lru.listed() == [0, 1, 2, 3, 4]


def test_a_scan_is_bounded_and_goes_on_where_it_stopped() -> None:
    lru = full()
    assert lru.victim(excluding(0, 1, 2), 2) is None
    assert not lru.exhausted()
    assert lru.victim(excluding(0, 1, 2), 2) == 3


def test_exhausted_when_everything_is_shelved() -> None:
    lru = full()
    assert lru.victim(excluding(0, 1, 2, 3, 4), 100) is None
    assert lru.exhausted()
    lru.unshelve(3)
    assert not lru.exhausted()
    assert lru.victim(anything, 1) == 3


def test_shelved_rows_can_be_removed_and_inserted_again() -> None:
    lru = full()
    lru.shelve(2)
    lru.remove(2)
    lru.insert(2)
    assert lru.listed() == [0, 1, 3, 4, 2]


def test_an_empty_policy_has_no_victim() -> None:
    lru = LRU(3)
    assert lru.exhausted()
    assert lru.victim(anything, 10) is None
    assert lru.listed() == []


def test_listed_notices_a_broken_ring() -> None:
    lru = full()
    lru._older[3] = 1
    with pytest.raises(AssertionError, match="older neighbour"):
        lru.listed()
