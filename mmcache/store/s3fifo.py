"""S3-FIFO (Yang et al., SOSP'23): queues that move an entry only when its turn to leave comes.

New entries join a small queue, a tenth of all. One that was used more than once there moves on to the main queue when
its turn comes; any other leaves, and is remembered as a ghost: if its name comes back soon, it joins the main queue.
The main queue gives an entry another round for each use, up to three. Capacities are counted in entries, as in the
paper, of what is stored now; the share of the small queue is of those that may leave, as parents wait in it for their
children. A use only raises a count. 9 bytes a row and 4 for its ghost. PURE: no clock, no randomness, no I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from mmcache.store.columns import NIL, Memory, column8, column32, heap
from mmcache.store.ghosts import MARK_BITS, MARK_MASK, Ghosts
from mmcache.store.policy import SHELVED

SMALL_SHARE: Final = 10  # one in so many
MOST_USES: Final = 3
_USES: Final = 3  # the bits of a row's state that count its uses
_MAIN: Final = 4  # the bit that says which queue it is in


class S3FIFO:
    """Quick demotion, then rounds by use. See `Policy`. Both queues are rings through two columns."""

    def __init__(self, max_rows: int, memory: Memory = heap, seed: int = 0, kept: Memory = heap) -> None:
        self._small, self._main = max_rows, max_rows + 1
        self._older = column32(memory, max_rows + 2)
        self._newer = column32(memory, max_rows + 2)
        for ring in (self._small, self._main):
            self._older[ring] = self._newer[ring] = ring
        self._state = column8(kept, max_rows)
        self._rows = 0
        self._listed = [0, 0]  # in the small and the main queue
        self._ghosts = Ghosts(max_rows, seed, memory)
        self._per_mark = 1 + (max_rows >> MARK_BITS - 3)  # so many ghosts have one mark
        self._haunted = 0

    def insert(self, row: int, name: bytes, _kind: int = 0, _parent: int = NIL) -> None:
        mark = self._ghosts.take(name)
        age = MARK_MASK if mark is None else (self._haunted // self._per_mark - mark) & MARK_MASK
        self._state[row] = _MAIN if age * self._per_mark < self._rows - self._rows // SMALL_SHARE else 0
        self._rows += 1
        self._push(row)

    def touch(self, row: int) -> None:
        if self._state[row] & _USES < MOST_USES:
            self._state[row] += 1

    def remove(self, row: int) -> None:
        self.shelve(row)
        self._rows -= 1

    def evict(self, row: int, name: bytes) -> None:
        if self._state[row] < _MAIN:
            self._haunted += 1
            self._ghosts.add(name, self._haunted // self._per_mark & MARK_MASK)
        self.remove(row)

    def shelve(self, row: int) -> None:
        newer = self._newer
        next_newer = newer[row]
        if next_newer != SHELVED:
            next_older = self._older[row]
            newer[next_older] = next_newer
            self._older[next_newer] = next_older
            newer[row] = SHELVED
            self._listed[self._state[row] >= _MAIN] -= 1

    def unshelve(self, row: int) -> None:
        newer = self._newer
        if newer[row] == SHELVED:
            in_main = self._state[row] >= _MAIN
            ring = self._small + in_main
            oldest = newer[ring]
            newer[row] = oldest
            self._older[row] = ring
            self._older[oldest] = newer[ring] = row
            self._listed[in_main] += 1

    def victim(self, evictable: Callable[[int], bool], max_scan: int) -> int | None:
        newer, state, listed = self._newer, self._state, self._listed
        for _ in range(max_scan):
            from_small, from_main = listed
            if not from_small + from_main:
                return None
            in_main = from_main > 0 and from_small * SMALL_SHARE < max(SMALL_SHARE, from_small + from_main)
            row = newer[self._small + in_main]
            if state[row] & _USES > (0 if state[row] >= _MAIN else 1):
                self._go_round(row)
            elif evictable(row):
                return row
            else:
                self.shelve(row)
        return None

    def exhausted(self) -> bool:
        return not any(self._listed)

    def restore(self, rows: Sequence[int], _kinds: Sequence[int]) -> None:
        for row in rows:
            self._state[row] &= _MAIN | _USES
            self._push(row)
        self._rows = len(rows)

    def listed(self) -> list[int]:
        rows: list[int] = []
        for ring in (self._small, self._main):
            row, previous = self._newer[ring], ring
            while row != ring:
                assert len(rows) < self._small, "a queue does not close"
                assert self._older[row] == previous, f"row {row}: its older neighbour is not {previous}"
                assert (self._state[row] >= _MAIN) == (ring == self._main), f"row {row} is in the wrong queue"
                rows.append(row)
                row, previous = self._newer[row], row
            assert self._older[ring] == previous, "a queue is broken at its newest row"
        assert len(rows) == sum(self._listed), f"{len(rows)} rows are listed, {sum(self._listed)} are counted"
        return rows

    def _go_round(self, row: int) -> None:
        """To the new end of the main queue: from there with one use less, from the small one with none."""
        self.shelve(row)
        self._state[row] = self._state[row] - 1 if self._state[row] >= _MAIN else _MAIN
        self._push(row)

    def _push(self, row: int) -> None:
        in_main = self._state[row] >= _MAIN
        ring = self._small + in_main
        newest = self._older[ring]
        self._older[row] = newest
        self._newer[row] = ring
        self._newer[newest] = self._older[ring] = row
        self._listed[in_main] += 1
