"""What a killed process leaves in its columns: whole entries go on, whatever else lies there is dropped."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import pytest

import mmcache.store
import mmcache.store.restore as restore_module
import mmcache.store.rows as rows_module
from mmcache.store.answers import Found, Reserved
from mmcache.store.index import Index
from mmcache.store.policies import POLICIES
from mmcache.store.restore import Restored, restore
from mmcache.store.rows import FREE, LIVE, RECORD, Rows
from mmcache.why import Why
from tests.unit.index_bed import UNIT, Bed, key

ENTRIES = 64
UNITS = 24
STORE = str(Path(mmcache.store.__file__).parent)
HEADER, SUM = 40, bytes(range(16))


class Columns:
    """Memory that outlives an index: in each life the same pieces are given out again."""

    def __init__(self, pieces: list[bytes] | None = None) -> None:
        self._pieces = [memoryview(bytearray(piece)) for piece in pieces or []]
        self._given = 0

    def __call__(self, nbytes: int) -> memoryview:
        if self._given == len(self._pieces):
            self._pieces.append(memoryview(bytearray(nbytes)))
        self._given += 1
        piece = self._pieces[self._given - 1]
        assert len(piece) == nbytes
        return piece

    def image(self) -> tuple[bytes, ...]:
        """All of it, as it is now."""
        return tuple(map(bytes, self._pieces))


class Entry(NamedTuple):
    """What is restored of one key."""

    found: Found
    expires_at: float
    kind: int
    namespace: int
    parent: bytes


def index_over(columns: Columns, policy: str = "value", kind: type[Index] = Index) -> Index:
    return kind(
        capacity_bytes=UNITS * UNIT,
        max_entries=ENTRIES,
        seed=random.getrandbits(64),
        policy=POLICIES[policy],
        kept=columns,
    )


def restored(image: tuple[bytes, ...], policy: str = "value", tenants: int = 2) -> tuple[Index, Restored]:
    """The index that a new process makes of an image, sound throughout."""
    index = index_over(Columns(list(image)), policy)
    said = restore(index, tenants, {0, 1, 2})
    index.check_integrity()
    taken = index.stats()
    assert said.entries == taken.entries
    sizes = [-(-entry.found.nbytes // UNIT) * UNIT for entry in entries_of(index).values()]
    assert taken.bytes_used == sum(sizes)  # all that no row has is free
    assert (taken.held_bytes, taken.leases, taken.reservations) == (0, 0, 0)
    return index, said


def entries_of(index: Index) -> dict[bytes, Entry]:
    rows, found = index.rows, {}
    for row in range(ENTRIES):
        if rows.state[row] == LIVE:
            place = Found(*RECORD.unpack_from(rows.records, row * RECORD.size))
            above = rows.parent[row]
            parent = rows.table.name(above) if above < ENTRIES else b""
            found[rows.table.name(row)] = Entry(
                place, rows.expires_at[row], rows.kind[row], rows.namespace[row], parent
            )
    return found


class Life(Bed):
    """A bed over columns that are left behind."""

    def __init__(self, columns: Columns, policy: str = "value", kind: type[Index] = Index) -> None:
        self.index, self.now, self.last_id = index_over(columns, policy, kind), 0.0, 0

    def store(self, number: int, parent: int = -1, nbytes: int = UNIT, tenant: int = 0, ttl: float = math.inf) -> bool:
        self.last_id += 1
        above = key(parent) if parent >= 0 else bytes(32)
        answer = self.index.reserve(
            tenant,
            key(number),
            above,
            nbytes,
            reservation_id=self.last_id,
            now=self.now,
            kind=1 + number % 4,
            namespace=number % 3,
        )
        return isinstance(answer, Reserved) and self.index.commit(
            self.last_id, header_nbytes=HEADER, header_sum=SUM, expires_at=self.now + ttl, now=self.now
        )


@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.parametrize("seed", range(8))
def test_a_life_after_many_changes_has_the_same_entries_and_goes_on(policy: str, seed: int) -> None:
    rng, columns = random.Random(seed), Columns()
    for _ in range(4):
        life = Life(columns, policy)
        restore(life.index, 2, {0, 1, 2})
        for _ in range(120):
            life.now += 1.0
            number, tenant = rng.randrange(40), rng.randrange(2)
            draw = rng.random()
            if draw < 0.6:
                ttl = rng.choice([math.inf, math.inf, 30.0])
                life.store(number, rng.choice([-1, rng.randrange(40)]), rng.randint(HEADER, 3 * UNIT), tenant, ttl)
            elif draw < 0.7:
                life.reserve(key(number), tenant=tenant)
            elif draw < 0.85:
                life.acquire(*[key(rng.randrange(40)) for _ in range(4)], tenant=tenant)
            else:
                life.index.delete(tenant, [key(number)], life.now)
        life.index.check_integrity()
        before, image = entries_of(life.index), columns.image()
        index, said = restored(image, policy)
        assert said.dropped == 0
        after = entries_of(index)
        assert after == before
        columns = Columns(list(image))


@pytest.mark.parametrize("policy", list(POLICIES))
def test_right_after_it_all_memory_can_be_had(policy: str) -> None:
    columns = Columns()
    life = Life(columns, policy)
    for number in range(1, 1 + UNITS):
        assert life.store(number, number - 1 if number % 4 else -1)
    index, said = restored(columns.image(), policy)
    assert said.entries == UNITS
    assert index.usage.by_tenant[0] == UNITS * UNIT
    again = Life.__new__(Life)
    again.index, again.now, again.last_id = index, life.now, 0
    for number in range(100, 100 + 2 * UNITS):
        assert again.store(number)
        index.check_integrity()
    assert index.stats().entries == UNITS


def test_what_was_used_last_leaves_last() -> None:
    columns = Columns()
    life = Life(columns, "value")
    for number in range(UNITS):
        assert life.store(number)
    for _ in range(400):  # the slots of the policy pass
        life.acquire(key(3), key(4))
        life.release(life.last_id)
        life.index.rows.policy.tell()
    index, _ = restored(columns.image(), "value")
    again = Life.__new__(Life)
    again.index, again.now, again.last_id = index, life.now, 0
    for number in range(100, 100 + UNITS - 2):
        assert again.store(number)
    assert again.stored(key(3), key(4)) == [True, True]


# Killed between any two steps


@contextmanager
def at_each_step(look: Callable[[], None]) -> Iterator[None]:
    """Calls `look` before each bytecode instruction of the store (and of this file's mutants): what is stored changes
    in between only."""

    def trace(frame: FrameType, _event: str, _arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith((STORE, __file__)):
            return None
        frame.f_trace_opcodes = True
        look()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def kinds_of_work(life: Life) -> Iterator[tuple[str, Callable[[], object]]]:
    """Everything that changes the columns, on an index that holds something of each sort."""
    yield "first", lambda: life.store(1)
    yield "child", lambda: life.store(2, 1)
    yield "orphan", lambda: life.store(3, 50)  # its parent is a ghost
    yield "ghost stored", lambda: life.store(50)
    yield "long", lambda: life.store(4, 1, 3 * UNIT - 7)
    yield "mortal", lambda: life.store(5, ttl=5.0)
    yield "other tenant", lambda: life.store(1, tenant=1)
    yield "delete leaf", lambda: life.index.delete(0, [key(4)], life.now)
    yield "delete parent", lambda: life.index.delete(0, [key(1)], life.now)
    yield "parent again", lambda: life.store(1)
    yield "row again", lambda: life.store(6, 5, 2 * UNIT)
    life.now = 7.0
    yield "expires", lambda: life.acquire(key(5))
    yield "pinned and deleted", lambda: (life.acquire(key(6)), life.index.delete(0, [key(6)], life.now))
    yield "released", lambda: life.index.release(0, life.last_id, life.now)
    yield "reserved", lambda: life.reserve(key(7), key(3))
    yield "aborted", lambda: life.index.abort(life.last_id)
    for number in range(20, 20 + UNITS + 4):
        yield f"evicts for {number}", lambda number=number: life.store(number, 20, 2 * UNIT - 1)  # type: ignore[misc]


def harm_of_kills(kind: type[Index], policy: str = "value") -> list[str]:
    """What is wrong after a kill at any step of all that work; each distinct image is tried once."""
    columns, harm = Columns(), []
    life = Life(columns, policy, kind)
    for name, work in kinds_of_work(life):
        images: dict[tuple[bytes, ...], None] = {}
        before = entries_of(life.index)
        with at_each_step(lambda images=images: images.setdefault(columns.image())):  # type: ignore[misc]
            work()
        after = entries_of(life.index)
        for image in images:
            index, _ = restored(image, policy)
            for name_, entry in entries_of(index).items():
                known = {(was.found, was.expires_at, was.kind, was.namespace)
                         for was in (before.get(name_), after.get(name_)) if was is not None}  # fmt: skip
                if (entry.found, entry.expires_at, entry.kind, entry.namespace) not in known:
                    harm.append(f"{name}: an entry that never was, {entry}")
            lost = (before.keys() & after.keys()) - entries_of(index).keys()
            if lost:
                harm.append(f"{name}: {len(lost)} entries that nothing touched are lost")
    return harm


@pytest.mark.parametrize("policy", ["value", "lru"])
def test_a_kill_at_any_step_leaves_old_rows_new_rows_and_nothing_else(policy: str) -> None:
    assert harm_of_kills(Index, policy) == []


class CommitsFirst(Index):
    """A mutant: a row becomes LIVE before it is written."""

    def commit(self, reservation_id: int, **what: Any) -> bool:
        row = next(one.row for one in self._reservations)
        RECORD.pack_into(self.rows.records, row * RECORD.size, 0, UNIT, HEADER, bytes(16))
        before, self.rows.state[row] = self.rows.state[row], LIVE
        self.rows.state[row] = before
        return super().commit(reservation_id, **what)


class ForgetsFirst(Index):
    """A mutant: a row that ends is cleared while it is LIVE."""

    def drop(self, row: int, why: Why, now: float) -> None:
        self.rows.expires_at[row] = 0.0
        super().drop(row, why, now)


@pytest.mark.parametrize("mutant", [CommitsFirst, ForgetsFirst])
def test_the_check_of_kills_finds_rows_that_change_while_they_are_live(mutant: type[Index]) -> None:
    assert any("never was" in one for one in harm_of_kills(mutant))


# Faults in the columns


def damaged(
    damage: Callable[[Rows], object], count: int = 6
) -> tuple[dict[bytes, Entry], Restored, dict[bytes, Entry]]:
    """Chains of two, damaged: what was there, what restoring said, and what is there after it."""
    columns = Columns()
    life = Life(columns)
    for row in range(count):
        assert life.store(1 + row, row if row % 2 else -1, 2 * UNIT)
    before = entries_of(life.index)
    damage(life.index.rows)
    index, said = restored(columns.image())
    return before, said, entries_of(index)


def record(row: int, **changed: Any) -> Callable[[Rows], None]:
    def damage(rows: Rows) -> None:
        fields = Found(*RECORD.unpack_from(rows.records, row * RECORD.size))._replace(**changed)
        RECORD.pack_into(rows.records, row * RECORD.size, *fields)

    return damage


@pytest.mark.parametrize(
    ("damage", "lost"),
    [
        (record(1, offset=UNITS * UNIT), [1]),
        (record(1, offset=1 << 63), [1]),
        (record(1, offset=(UNITS - 1) * UNIT), [1]),  # ends beyond the arena
        (record(1, offset=2 * UNIT + 1), [1]),
        (record(1, nbytes=0), [1]),
        (record(1, nbytes=(1 << 64) - 1), [1]),
        (record(1, header_nbytes=0), [1]),
        (record(1, header_nbytes=2 * UNIT + 1), [1]),
        (record(1, offset=0), [0, 1]),  # as another row's: nobody knows whose it is
        (record(0, nbytes=6 * UNIT), [0, 1, 2]),
        (record(5, offset=3 * UNIT), [1, 2, 5]),
    ],
)
def test_rows_whose_memory_cannot_be_theirs_are_dropped(damage: Callable[[Rows], None], lost: list[int]) -> None:
    before, said, after = damaged(damage)
    gone = [row for row in range(6) if bytes(4) + key(1 + row) not in after]
    assert gone == lost
    assert said.dropped == len(lost)
    assert {name: entry.found for name, entry in after.items()} == {name: before[name].found for name in after}


def test_names_that_are_there_twice_or_of_nobody_are_dropped() -> None:
    def twice(rows: Rows) -> None:
        rows.table.names[36 * 4 : 36 * 5] = rows.table.names[:36]

    _, said, after = damaged(twice)
    assert (said.dropped, len(after)) == (2, 4)

    def nobody(rows: Rows) -> None:
        rows.table.names[36 * 4 : 36 * 4 + 4] = (2).to_bytes(4, "little")

    _, said, after = damaged(nobody)
    assert (said.dropped, len(after)) == (1, 5)


def test_parents_that_cannot_be_are_none() -> None:
    def circle(rows: Rows) -> None:
        rows.parent[0] = 1
        rows.parent[2] = 2
        rows.parent[4] = 0x7FFFFFFF

    _, said, after = damaged(circle)
    assert said == Restored(6, 12 * UNIT, 0)
    names = [bytes(4) + key(1 + row) for row in range(6)]
    assert [after[name].parent for name in names] == [b"", b"", b"", names[2], b"", names[4]]

    def unused(rows: Rows) -> None:
        rows.parent[0] = 60  # a row that is FREE
        rows.namespace[3] = 77

    _, said, after = damaged(unused)
    assert after[names[0]].parent == b""
    assert after[names[3]].namespace == 0  # nobody knows it: counted with those that nobody named


def test_no_row_at_all_is_an_empty_index() -> None:
    index, said = restored(Columns(index_over_image()).image())
    assert said == Restored(0, 0, 0)
    assert index.stats().largest_free_bytes > 0


def index_over_image() -> list[bytes]:
    columns = Columns()
    index_over(columns)
    return list(columns.image())


def test_a_table_whose_last_slots_are_crowded_goes_on_from_its_start() -> None:
    for seed in range(200):  # some of these seeds crowd them
        columns = Columns()
        life = Life(columns)
        life.index.rows.table._seed = seed
        for number in range(UNITS):
            assert life.store(number)
        index = index_over(Columns(list(columns.image())))
        index.rows.table._seed = seed
        restore(index, 1, {0, 1, 2})
        index.check_integrity()
        assert all(index.contains(0, [key(number) for number in range(UNITS)], life.now))


def test_rows_that_were_never_used_stay_unused() -> None:
    index, _ = restored(Columns(index_over_image()).image())
    assert np.all(np.frombuffer(index.rows.state, np.uint8) == FREE)


def test_keys_that_many_name_as_parent_are_so_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (rows_module, restore_module):
        monkeypatch.setattr(module, "FORK_CHILDREN", 8)
    columns = Columns()
    life = Life(columns)
    assert all([life.store(1), *(life.store(number, parent=1) for number in range(2, 10))])
    index, _ = restored(columns.image())
    assert index.rows.forks == life.index.rows.forks != {}
    index.check_integrity()
