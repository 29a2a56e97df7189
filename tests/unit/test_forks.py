"""Which stored keys a shard calls forks: those that many keys of a tenant name as parent, while they have a row."""

from __future__ import annotations

import pytest

import mmcache.store.restore as restore_module
import mmcache.store.rows as rows_module
from mmcache.store.rows import FORK_CHILDREN
from tests.unit.index_bed import Bed, key
from tests.unit.test_restore import Columns, Life, restored

PARENT, OTHER = key(1), key(2)


def bed_with(children: int, tenant: int = 0) -> Bed:
    bed = Bed(units=64)
    bed.put(PARENT, tenant=tenant)
    for number in range(children):
        bed.put(key(100 + number), PARENT, tenant=tenant)
    return bed


def test_a_key_becomes_a_fork_with_its_last_child_but_one_too_few_do_not() -> None:
    bed = bed_with(FORK_CHILDREN - 1)
    assert bed.index.forks(0, [PARENT, OTHER]) == set()
    bed.put(key(99), PARENT)
    assert bed.index.forks(0, [OTHER, PARENT]) == {PARENT}
    assert bed.index.forks(0, [OTHER]) == set()


def test_another_tenant_is_told_nothing() -> None:
    bed = bed_with(FORK_CHILDREN, tenant=3)
    bed.put(PARENT, tenant=4)
    assert bed.index.forks(3, [PARENT]) == {PARENT}
    assert bed.index.forks(4, [PARENT]) == set()


def test_a_fork_stays_one_when_its_tails_are_stored_elsewhere_and_goes_with_its_row() -> None:
    bed = bed_with(FORK_CHILDREN)
    bed.index.delete(0, [key(100 + number) for number in range(FORK_CHILDREN)], bed.now)
    bed.index.check_integrity()
    assert bed.index.forks(0, [PARENT]) == {PARENT}
    bed.index.delete(0, [PARENT], bed.now)
    bed.index.check_integrity()
    assert bed.index.forks(0, [PARENT]) == set()
    assert bed.index.rows.forks == {}


def test_a_parent_that_is_only_a_name_is_a_fork_too() -> None:
    bed = Bed(units=64)
    for number in range(FORK_CHILDREN):
        bed.put(key(100 + number), PARENT)
    assert bed.stored(PARENT) == [False]
    assert bed.index.forks(0, [PARENT]) == {PARENT}
    for number in range(FORK_CHILDREN):
        bed.index.delete(0, [key(100 + number)], bed.now)
        bed.index.check_integrity()
    assert bed.index.rows.forks == {}


def test_keys_that_many_name_as_parent_are_so_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (rows_module, restore_module):
        monkeypatch.setattr(module, "FORK_CHILDREN", 8)
    columns = Columns()
    life = Life(columns)
    assert all([life.store(1), *(life.store(number, parent=1) for number in range(2, 10))])
    index, _ = restored(columns.image())
    assert index.rows.forks == life.index.rows.forks != {}
    index.check_integrity()


@pytest.mark.parametrize("parent_is_stored", [True, False])
def test_a_fork_whose_tails_lie_elsewhere_is_one_after_a_restart_too(parent_is_stored: bool) -> None:
    columns = Columns()
    life = Life(columns)
    children = range(2, 2 + FORK_CHILDREN)
    assert all([not parent_is_stored or life.store(1), *(life.store(number, parent=1) for number in children)])
    life.index.delete(0, [key(number) for number in children[not parent_is_stored :]], life.now)
    index, _ = restored(columns.image())
    assert index.rows.forks == life.index.rows.forks != {}
    again, _ = restored(columns.image())
    again.delete(0, [key(1), *map(key, children)], 0.0)
    again.check_integrity()
    assert again.rows.forks == {}


def test_a_row_that_was_a_fork_is_none_under_its_next_name() -> None:
    columns = Columns()
    life = Life(columns)
    for number in range(2, 2 + FORK_CHILDREN):
        life.store(number, parent=1)
    life.index.delete(0, [key(number) for number in range(2, 2 + FORK_CHILDREN)], life.now)
    assert all(life.store(number) for number in range(100, 120))
    index, said = restored(columns.image())
    assert (said.entries, index.rows.forks) == (20, {})
