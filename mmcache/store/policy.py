"""Eviction: in which order entries leave when memory is short. Which entries MAY leave is the index's business.

A policy orders the rows it was given and proposes the next to go. The index answers whether that row may leave now;
a row that may not (it has children, or a reader holds it) is shelved: set aside, no longer proposed, until the index
says that it may leave after all (`unshelve`). So a row is looked at once for each time it was listed, and a cache full
of held entries is recognised at once instead of being walked again and again. Here is LRU; s3fifo.py and value.py have
others, policies.py their names.
PURE: no clock, no randomness, no I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from mmcache.store.columns import NIL, Memory, column32, heap

SHELVED = NIL - 1
"""In a column of links: the row is in no ring."""


class Policy(Protocol):
    """The order in which rows leave. Every call is O(1), `victim` O(max_scan); none raises for rows it was given."""

    def insert(self, row: int, name: bytes, kind: int, parent: int) -> None:
        """Take charge of `row`, which is not in the policy, as just used. `name` (see table.py) and `kind` (0..255) are
        the entry's, `parent` the row it is useless without or NIL; that one need not be in the policy."""

    def touch(self, row: int) -> None:
        """`row` was used now. A shelved row may be listed again, or not before it is unshelved."""

    def remove(self, row: int) -> None:
        """Forget `row`, listed or shelved: its entry was deleted or has expired."""

    def evict(self, row: int, name: bytes) -> None:
        """As `remove`, for the victim: its entry left for others, and its `name` may come back."""

    def shelve(self, row: int) -> None:
        """`row` may not leave for now: do not propose it until it is touched or unshelved."""

    def unshelve(self, row: int) -> None:
        """`row` may leave again; it is proposed when its turn would have come. No effect unless it is shelved."""

    def victim(self, evictable: Callable[[int], bool], max_scan: int) -> int | None:
        """The next row to leave; it stays in the policy until removed. Shelves up to `max_scan` rows that are not
        evictable on the way; None when none was found among those."""

    def exhausted(self) -> bool:
        """True when every row is shelved: no call to `victim` can find one."""

    def restore(self, rows: Sequence[int], kinds: Sequence[int]) -> None:
        """In a new policy: take charge of these rows, which one of the same kind had in the same `kept` memory when its
        process ended, wherever it was. The row stored first comes first; what that memory says may be wrong, and is
        only a hint. All are listed."""

    def listed(self) -> list[int]:
        """The rows not shelved, the next to leave first; raises AssertionError when the policy is broken. O(rows)."""


class Factory(Protocol):
    """A policy for so many rows, in this memory, with a secret seed for what it hashes. What `restore` goes by lies in
    `kept`: memory that may outlive the process, and need not be zero then."""

    def __call__(self, max_rows: int, memory: Memory, seed: int, kept: Memory = heap, /) -> Policy: ...


class LRU:
    """Least recently used first: a ring through two columns, 8 bytes a row.

    Shelving keeps the exact order among ancestors and descendants. A row is shelved either when it is the least
    recently used of all, or when it has just become the parent of a newer row; when it may leave again, everything
    that was older than it has gone, so it returns at the old end, where it would have been.
    """

    def __init__(self, max_rows: int, memory: Memory = heap, _seed: int = 0, _kept: Memory = heap) -> None:
        self._ring = max_rows
        self._older = column32(memory, max_rows + 1)
        self._newer = column32(memory, max_rows + 1)
        self._older[max_rows] = self._newer[max_rows] = max_rows

    def insert(self, row: int, _name: bytes = b"", _kind: int = 0, _parent: int = NIL) -> None:
        ring, older = self._ring, self._older
        newest = older[ring]
        older[row] = newest
        self._newer[row] = ring
        self._newer[newest] = older[ring] = row

    def touch(self, row: int) -> None:
        ring, older, newer = self._ring, self._older, self._newer
        next_newer = newer[row]
        if next_newer == ring:
            return
        if next_newer != SHELVED:
            next_older = older[row]
            newer[next_older] = next_newer
            older[next_newer] = next_older
        newest = older[ring]
        older[row] = newest
        newer[row] = ring
        newer[newest] = older[ring] = row

    def remove(self, row: int) -> None:
        self.shelve(row)

    def evict(self, row: int, _name: bytes = b"") -> None:
        self.shelve(row)

    def shelve(self, row: int) -> None:
        newer = self._newer
        next_newer = newer[row]
        if next_newer != SHELVED:
            next_older = self._older[row]
            newer[next_older] = next_newer
            self._older[next_newer] = next_older
            newer[row] = SHELVED

    def unshelve(self, row: int) -> None:
        newer = self._newer
        if newer[row] == SHELVED:
            ring = self._ring
            oldest = newer[ring]
            newer[row] = oldest
            self._older[row] = ring
            self._older[oldest] = newer[ring] = row

    def victim(self, evictable: Callable[[int], bool], max_scan: int) -> int | None:
        ring, newer = self._ring, self._newer
        for _ in range(max_scan):
            row = newer[ring]
            if row == ring:
                return None
            if evictable(row):
                return row
            self.shelve(row)
        return None

    def exhausted(self) -> bool:
        return self._newer[self._ring] == self._ring

    def restore(self, rows: Sequence[int], _kinds: Sequence[int]) -> None:
        for row in rows:
            self.insert(row)

    def listed(self) -> list[int]:
        rows: list[int] = []
        row, previous = self._newer[self._ring], self._ring
        while row != self._ring:
            assert len(rows) < self._ring, "the recency ring does not close"
            assert self._older[row] == previous, f"row {row}: its older neighbour is not {previous}"
            rows.append(row)
            row, previous = self._newer[row], row
        assert self._older[self._ring] == previous, "the recency ring is broken at its newest row"
        return rows
