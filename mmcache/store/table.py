"""Rows by name: the columns that say which key of which tenant a row is, and the hash table that finds it.

Open addressing with linear probing. A slot is 64 bits: the upper half of the name's hash, and the row number plus
one (zero: empty). The hash half is both the home slot and a tag that spares most comparisons; the table is sized
once, for two slots a row, so it never rehashes and probes stay short; deletion shifts back what follows, so nothing
marks the grave. The hash is keyed by a secret seed: names crafted to collide do not. PURE: no clock, no randomness,
no I/O.
"""

from __future__ import annotations

from collections.abc import Iterable
from struct import Struct

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from mmcache.store.columns import NIL, Memory, column32, column64, heap

NO_ROW = -1
KEY_NBYTES = 32
NAME = Struct("36s")  # tenant, 4 bytes little-endian, and the key
ROW_MASK = 0xFFFFFFFF


def tenant_prefix(tenant: int) -> bytes:
    """The first 4 bytes of the names of `tenant`, 0 <= tenant < 2**32."""
    return tenant.to_bytes(4, "little")


def tenant_of(name: bytes) -> int:
    """The tenant of a name."""
    return int.from_bytes(name[:4], "little")


class Table:
    """Hands out row numbers 0..max_rows-1 to names (`tenant_prefix` + 32-byte key) and finds them again."""

    def __init__(self, max_rows: int, seed: int, memory: Memory = heap, kept: Memory = heap) -> None:
        self.max_rows = max_rows
        self.used = 0
        self._seed = seed & 0xFFFFFFFFFFFFFFFF
        self._slot_count = max(2 * max_rows, 8)
        self._slots = column64(memory, self._slot_count)
        self.names = kept(NAME.size * max_rows)
        self._next_unused = column32(memory, max_rows)
        self._unused = NIL
        self._fresh = 0  # rows from here on were never used

    def find(self, prefix: bytes, key: bytes) -> int:
        """The row of this name, or NO_ROW."""
        return self.find_all(prefix, (key,), False)[0]

    def find_all(self, prefix: bytes, keys: Iterable[bytes], stop_at_absent: bool) -> list[int]:
        """For each key its row or NO_ROW, in order; `stop_at_absent`: only those before the first absent one. A key
        that is not 32 bytes long is absent."""
        hash64, seed, slots, count = xxh3_64_intdigest, self._seed, self._slots, self._slot_count
        names, unpack, width = self.names, NAME.unpack_from, NAME.size
        rows: list[int] = []
        append = rows.append
        for key in keys:
            name = prefix + key
            tag = hash64(name, seed) >> 32
            slot = tag * count >> 32
            entry = slots[slot]
            while entry:
                if entry >> 32 == tag:
                    row = (entry & 0xFFFFFFFF) - 1
                    if unpack(names, row * width)[0] == name:
                        append(row)
                        break
                slot += 1
                if slot == count:
                    slot = 0
                entry = slots[slot]
            else:
                if stop_at_absent:
                    break
                append(NO_ROW)
        return rows

    @property
    def bound(self) -> int:
        """No row from here on was ever used."""
        return self._fresh

    def available(self) -> int:
        """How many more rows can be added."""
        return self.max_rows - self.used

    def add(self, prefix: bytes, key: bytes) -> int:
        """A row for a name that has none; `available()` must be at least 1."""
        row = self._unused
        if row != NIL:
            self._unused = self._next_unused[row]
        else:
            row = self._fresh
            self._fresh += 1
        name = prefix + key
        NAME.pack_into(self.names, row * NAME.size, name)
        tag = xxh3_64_intdigest(name, self._seed) >> 32
        slots, count = self._slots, self._slot_count
        slot = tag * count >> 32
        while slots[slot]:
            slot += 1
            if slot == count:
                slot = 0
        slots[slot] = tag << 32 | row + 1
        self.used += 1
        return row

    def remove(self, row: int) -> None:
        """Forgets the name of `row`; the row number may be handed out anew at once."""
        slots, count = self._slots, self._slot_count
        name = self.name(row)
        tag = xxh3_64_intdigest(name, self._seed) >> 32
        hole = tag * count >> 32
        mine = tag << 32 | row + 1
        while slots[hole] != mine:
            hole += 1
            if hole == count:
                hole = 0
        slot = hole
        while True:
            slot += 1
            if slot == count:
                slot = 0
            entry = slots[slot]
            if not entry:
                break
            home = (entry >> 32) * count >> 32
            # The entry may fill the hole unless its home lies after the hole, cyclically.
            if (slot - home) % count >= (slot - hole) % count:
                slots[hole] = entry
                hole = slot
        slots[hole] = 0
        self._next_unused[row] = self._unused
        self._unused = row
        self.used -= 1

    def name(self, row: int) -> bytes:
        """The name of a row in use: `tenant_prefix` + key."""
        name: bytes = NAME.unpack_from(self.names, row * NAME.size)[0]
        return name

    def hashes(self, rows: NDArray[np.int64]) -> NDArray[np.uint64]:
        """The hashes of these rows' names."""
        hash64, seed, names, width = xxh3_64_intdigest, self._seed, self.names, NAME.size
        starts = (rows * width).tolist()
        return np.fromiter((hash64(names[at : at + width], seed) for at in starts), np.uint64, len(rows))

    def restore(self, rows: NDArray[np.int64], hashes: NDArray[np.uint64]) -> None:
        """In a new table over kept names: exactly these rows are in use. No two names are the same."""
        tags = hashes >> np.uint64(32)
        count = self._slot_count
        homes = (tags * np.uint64(count) >> np.uint64(32)).astype(np.int64)
        order = np.argsort(homes, kind="stable")
        step = np.arange(len(rows))
        places = step + np.maximum.accumulate(homes[order] - step) if len(rows) else step
        entries = (tags << np.uint64(32) | (rows + 1).astype(np.uint64))[order]
        slots = np.frombuffer(self._slots, np.uint64)
        inside = places < count
        slots[places[inside]] = entries[inside]
        slot = 0
        for entry in entries[~inside]:  # those that go on from the start of the table
            while slots[slot]:
                slot += 1
            slots[slot] = entry
        self.used, self._fresh = len(rows), int(rows.max(initial=-1)) + 1
        is_unused = np.ones(self._fresh, np.bool_)
        is_unused[rows] = False
        unused = np.flatnonzero(is_unused)
        if len(unused):
            np.frombuffer(self._next_unused, np.uint32)[unused] = np.append(unused[1:], NIL)
            self._unused = int(unused[0])

    def check_integrity(self) -> set[int]:
        """Walks everything and returns the rows in use; raises AssertionError saying what is wrong. O(max_rows)."""
        rows: set[int] = set()
        names: set[bytes] = set()
        for slot, entry in enumerate(self._slots):
            if not entry:
                continue
            row = (entry & ROW_MASK) - 1
            name = self.name(row)
            assert row not in rows, f"row {row} is in the table twice"
            assert name not in names, f"two rows have the name {name.hex()}"
            assert self.find(name[:4], name[4:]) == row, f"row {row} in slot {slot} is not found by its name"
            rows.add(row)
            names.add(name)
        assert len(rows) == self.used, f"{len(rows)} rows are in the table, {self.used} are counted"
        unused, row = 0, self._unused
        while row != NIL:
            assert row not in rows, f"row {row} is in use and on the unused list"
            unused, row = unused + 1, self._next_unused[row]
        assert unused + self.used == self._fresh, f"{self._fresh - unused - self.used} rows are lost"
        return rows
