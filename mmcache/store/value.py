"""Eviction by value: what leaves is what is expected to save the least time for the memory it holds.

A class is a kind of value and how its entry came to be: new without a parent that is known, new below what was used
again for the first time (a conversation goes on), new below what was used before (a branch of something shared), used
again once, twice, more often. hazard.py learns how soon entries of each class are used again at each age, from those
stored and from ghosts of those evicted; a ghost's return counts as its next use. Worth is that rate times
`SAVED_MS_PER_MB` of the kind; a saving grows with an entry's size, so the size itself cancels out. The class and age of
least worth gives the next victim, the oldest first; entries of which nothing is known leave by age, as in LRU.

Rows lie in rings, one for each class and slot, the parent of what was evicted at the old end of its own. 13 bytes a
row, and 4 for each of `GHOSTS_PER_ROW` ghosts. It learns from the calls alone, and begins anew at each start.
PURE: no clock, no randomness, no I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from mmcache.store.columns import NIL, Memory, column8, column32, heap
from mmcache.store.ghosts import MARK_BITS, Ghosts
from mmcache.store.hazard import BIN_OF_AGE, BINS, FITS_EVERY, OLD, OLD_BIN, RING, Hazard
from mmcache.store.policy import SHELVED

# What a hit saves by kind, in ms of an accelerator at 400 TFLOP/s for each MB stored, at two operations a parameter and
# token. KV: Qwen2.5-VL-7B's prefill, 14 GFLOP and 57,344 bytes a token. Embedding: its vision tower, .67e9 parameters,
# four patches to each token of 7,168 bytes. Prompt: T5-XXL's encoder, 4.7e9 parameters and 8,192 bytes a token. Latent:
# ten steps saved of a 12e9-parameter transformer, 128 bytes a token. Only the proportions matter.
SAVED_MS_PER_MB: Final = (0.6, 1.9, 2.9, 4700.0)  # Kind.KV, EMBEDDING, PROMPT, LATENT; others count as the last but 3
GHOSTS_PER_ROW: Final = 3
SLOTS_PER_TURN: Final = 32  # so many slots pass while as many accesses happen as there are entries
LEAST_SLOT_ACCESSES: Final = 64
KINDS: Final = len(SAVED_MS_PER_MB)
NEW, CONTINUED, BRANCHED, USED_ONCE, USED_TWICE, USED_OFTEN = range(6)
AFTER_USE: Final = (USED_ONCE, USED_ONCE, USED_ONCE, USED_TWICE, USED_OFTEN, USED_OFTEN)
BELOW: Final = (NEW, CONTINUED, BRANCHED, CONTINUED, BRANCHED, BRANCHED)  # the class of a new entry, by its parent's
CLASSES: Final = len(AFTER_USE)
ALL: Final = KINDS * CLASSES
_RINGS: Final = RING + 1  # of each class: one a slot, one for all that is older
_SLOT_BITS: Final = MARK_BITS - 5  # a ghost's mark: its class of all, and the slot it was last used in
_SLOT_MASK: Final = (1 << _SLOT_BITS) - 1
_AGES_IN_BIN: Final = tuple(
    sum(1 << age for age in range(OLD + 1) if BIN_OF_AGE[age] == which) for which in range(BINS)
)
_AGES: Final = (1 << RING) - 1


class Value:
    """The least expected saving per byte and access leaves first. See the module's text and `Policy`."""

    def __init__(self, max_rows: int, memory: Memory = heap, seed: int = 0, kept: Memory = heap) -> None:
        links = max_rows + ALL * _RINGS
        self._first_ring = max_rows
        self._older = column32(memory, links)
        self._newer = column32(memory, links)
        self._class = column8(kept, max_rows)  # of all classes, plus one; 0: not in the policy
        self._used_in = column32(kept, max_rows)  # the slot of the last use
        self._ghosts = Ghosts(GHOSTS_PER_ROW * max_rows, seed, memory)
        self._rows = 0
        self._listed_rows = 0
        self._slot = 0
        self._width = self._left = LEAST_SLOT_ACCESSES
        self._hazards: list[Hazard | None] = [None] * KINDS
        self._listed = [0] * ALL  # by class: bit `age` says that the ring of that age holds a row
        self._order: list[tuple[int, int]] = []  # the classes and the bits of ages, the least worth first
        self._place = [0] * (ALL * BINS)  # where a class and bin stand in that order
        self._start = 0  # before it, no row is listed

    def insert(self, row: int, name: bytes, kind: int, parent: int) -> None:
        self._count_access()
        of_kind = (kind - 1) % KINDS
        hazard = self._hazards[of_kind] or self._new_kind(of_kind)
        mark = self._ghosts.take(name)
        which = -1
        if mark is not None:
            was, age = self._read(mark)
            if age < OLD and was // CLASSES == of_kind:
                hazard.leave_ghost(was % CLASSES, age, hit=True)
                which = AFTER_USE[was % CLASSES]
        if which < 0:
            above = 0 if parent == NIL else self._class[parent]
            which = BELOW[(above - 1) % CLASSES] if above else NEW
        hazard.enter(which)
        self._rows += 1
        self._class[row] = 1 + of_kind * CLASSES + which
        self._used_in[row] = self._slot
        self._newer[row] = SHELVED
        self._list(row, newest=True)

    def touch(self, row: int) -> None:
        self._count_access()
        of_kind, was = divmod(self._class[row] - 1, CLASSES)
        hazard = self._hazards[of_kind]
        assert hazard is not None
        shelved = self._newer[row] == SHELVED
        if not shelved:
            self.shelve(row)
        which = AFTER_USE[was]
        hazard.leave(was, self._age(row), hit=True)
        hazard.enter(which)
        self._class[row] = 1 + of_kind * CLASSES + which
        self._used_in[row] = self._slot
        if not shelved:
            self._list(row, newest=True)

    def remove(self, row: int) -> None:
        of_kind, which = divmod(self._class[row] - 1, CLASSES)
        hazard = self._hazards[of_kind]
        assert hazard is not None
        self.shelve(row)
        hazard.leave(which, self._age(row), hit=False)
        self._forget(row)

    def evict(self, row: int, name: bytes) -> None:
        age = self._age(row)
        if age == OLD:
            self.remove(row)
            return
        self.shelve(row)
        mark = self._class[row] - 1 << _SLOT_BITS | self._used_in[row] & _SLOT_MASK
        of_kind, which = divmod(self._class[row] - 1, CLASSES)
        hazard = self._hazards[of_kind]
        assert hazard is not None
        hazard.haunt(which, age)
        self._forget(row)
        forgotten = self._ghosts.add(name, mark)
        if forgotten is not None:
            was, age = self._read(forgotten)
            other = self._hazards[was // CLASSES]
            assert other is not None
            other.leave_ghost(was % CLASSES, age, hit=False)

    def shelve(self, row: int) -> None:
        newer, older = self._newer, self._older
        next_newer = newer[row]
        if next_newer == SHELVED:
            return
        next_older = older[row]
        newer[next_older] = next_newer
        older[next_newer] = next_older
        newer[row] = SHELVED
        self._listed_rows -= 1
        if next_newer == next_older:  # both are the ring's own place: it is empty now
            self._listed[self._class[row] - 1] &= ~(1 << self._age(row))

    def unshelve(self, row: int) -> None:
        if self._class[row] and self._newer[row] == SHELVED:
            self._list(row, newest=False)

    def victim(self, evictable: Callable[[int], bool], max_scan: int) -> int | None:
        for _ in range(max_scan):
            row = self._next()
            if row is None or evictable(row):
                return row
            self.shelve(row)
        return None

    def exhausted(self) -> bool:
        return not self._listed_rows

    def restore(self, rows: Sequence[int], kinds: Sequence[int]) -> None:
        """Classes and ages go on; rates and ghosts are learnt anew. Done on whole columns: there may be millions."""
        mine, of_kind = np.asarray(rows, np.int64), (np.asarray(kinds, np.int64) - 1) % KINDS
        classes, used = np.frombuffer(self._class, np.uint8), np.frombuffer(self._used_in, np.uint32)
        was, slots = classes[mine].astype(np.int64) - 1, used[mine].astype(np.int64)
        which = np.where((was >= 0) & (was // CLASSES == of_kind), was, of_kind * CLASSES + NEW)
        classes[:] = 0
        classes[mine] = which + 1
        self._slot = slot = int(slots.max(initial=0))
        ages = np.minimum(slot - slots, OLD)
        self._rows = self._listed_rows = len(mine)
        self._left = self._width = max(LEAST_SLOT_ACCESSES, self._rows // SLOTS_PER_TURN)
        groups, counts = np.unique(np.stack([which, ages]), axis=1, return_counts=True)
        for (one, age), count in zip(groups.T.tolist(), counts.tolist(), strict=True):
            hazard = self._hazards[one // CLASSES]
            if hazard is None:
                hazard = self._hazards[one // CLASSES] = Hazard(CLASSES, slot)
            hazard.settle(one % CLASSES, age, count)
            self._listed[one] |= 1 << age
        self._rank()
        rings = self._first_ring + which * _RINGS + np.where(ages == OLD, RING, slots % RING)
        order = np.lexsort((slots, rings))
        mine, rings = mine[order], rings[order]
        first = np.concatenate(([True], rings[1:] != rings[:-1])) if len(mine) else np.zeros(0, np.bool_)
        last = np.roll(first, -1)
        older, newer = np.frombuffer(self._older, np.uint32), np.frombuffer(self._newer, np.uint32)
        older[mine] = np.where(first, rings, np.roll(mine, 1))
        newer[mine] = np.where(last, rings, np.roll(mine, -1))
        newer[rings[first]], older[rings[last]] = mine[first], mine[last]

    def listed(self) -> list[int]:
        rows: list[int] = []
        for which, ages in self._order:
            left = self._listed[which] & ages
            while left:
                age = left.bit_length() - 1
                left ^= 1 << age
                ring = self._ring(which, age)
                row, previous = self._newer[ring], ring
                assert row != ring, f"the ring of class {which}, age {age} is empty, but not marked as such"
                while row != ring:
                    assert len(rows) < self._first_ring, f"the ring of class {which}, age {age} does not close"
                    assert self._older[row] == previous, f"row {row}: its older neighbour is not {previous}"
                    assert (self._class[row] - 1, self._age(row)) == (which, age), f"row {row} is in another's ring"
                    rows.append(row)
                    row, previous = self._newer[row], row
                assert self._older[ring] == previous, (
                    f"the ring of class {which}, age {age} is broken at its newest row"
                )
        assert len(rows) == self._listed_rows, f"{len(rows)} rows are listed, {self._listed_rows} are counted"
        return rows

    def _age(self, row: int) -> int:
        age = self._slot - self._used_in[row] & 0xFFFFFFFF
        return age if age < OLD else OLD

    def _read(self, mark: int) -> tuple[int, int]:
        """The class and age that a ghost's mark tells."""
        return mark >> _SLOT_BITS, self._slot - mark & _SLOT_MASK

    def _ring(self, which: int, age: int) -> int:
        return self._first_ring + which * _RINGS + (RING if age == OLD else (self._slot - age) % RING)

    def _forget(self, row: int) -> None:
        self._class[row] = 0
        self._rows -= 1

    def _list(self, row: int, *, newest: bool) -> None:
        """Put a shelved row into the ring of its class and age, at one end."""
        which, age = self._class[row] - 1, self._age(row)
        ring = self._ring(which, age)
        older, newer = self._older, self._newer
        if not self._listed[which] >> age & 1:
            self._listed[which] |= 1 << age
            older[ring] = newer[ring] = ring
        before, after = (older[ring], ring) if newest else (ring, newer[ring])
        older[row], newer[row] = before, after
        newer[before] = older[after] = row
        self._listed_rows += 1
        place = self._place[which * BINS + BIN_OF_AGE[age]]
        if place < self._start:
            self._start = place

    def _next(self) -> int | None:
        """The oldest row of the class and ages of least worth."""
        order, listed = self._order, self._listed
        for place in range(self._start, len(order)):
            which, ages = order[place]
            found = listed[which] & ages
            if found:
                self._start = place
                return self._newer[self._ring(which, found.bit_length() - 1)]
        return None

    def _count_access(self) -> None:
        self._left -= 1
        if not self._left:
            self._advance()

    def _advance(self) -> None:
        """The slot ends: every row is older by one. The rings of those that grow old are joined to their class's."""
        self._slot += 1
        for of_kind, hazard in enumerate(self._hazards):
            if hazard is None:
                continue
            for which in range(of_kind * CLASSES, (of_kind + 1) * CLASSES):
                listed = self._listed[which] << 1
                if listed >> OLD:
                    self._grow_old(which, listed)
                    listed = listed & _AGES | 1 << OLD
                self._listed[which] = listed
            hazard.advance(self._width)
            if self._slot % FITS_EVERY == of_kind:
                hazard.fit()
                self._rank()
        self._start = 0
        self._left = self._width = max(LEAST_SLOT_ACCESSES, self._rows // SLOTS_PER_TURN)

    def _grow_old(self, which: int, listed: int) -> None:
        """`listed`: bit OLD says that rows become old now, the bit above it that others are already."""
        if not listed >> OLD & 1:
            return
        older, newer = self._older, self._newer
        ring = self._first_ring + which * _RINGS + self._slot % RING
        old = self._ring(which, OLD)
        if not listed >> OLD + 1:
            older[old] = newer[old] = old
        oldest, newest, last = newer[ring], older[ring], older[old]
        newer[last], older[oldest] = oldest, last
        newer[newest], older[old] = old, newest

    def _new_kind(self, of_kind: int) -> Hazard:
        hazard = self._hazards[of_kind] = Hazard(CLASSES, self._slot)
        self._rank()
        return hazard

    def _rank(self) -> None:
        """Sort the classes and ages by worth; those of one worth by age."""
        ranked = [
            (worth * SAVED_MS_PER_MB[of_kind], -which, of_kind * CLASSES + number)
            for of_kind, hazard in enumerate(self._hazards)
            if hazard is not None
            for number, worths in enumerate(hazard.worth)
            for which, worth in enumerate(worths)
        ]
        ranked.sort()
        self._order = [(number, _AGES_IN_BIN[-which]) for _, which, number in ranked]
        for place, (_, which, number) in enumerate(ranked):
            self._place[number * BINS - which] = place
        self._start = 0


assert _AGES_IN_BIN[OLD_BIN] == 1 << OLD
