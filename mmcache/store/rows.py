"""The entries of the index as rows: names, states, parents and children, and the order in which they leave.

A row stands for one key of one tenant. Its life:

    FREE ──claim──► RESERVED ──settle──► LIVE ──vacate──► FREE
                        └──────vacate─────────────────────┘     GHOST instead of FREE while it has children

A GHOST is a key that is not stored but is the parent of keys that are (or are being written); it exists to keep the
count of its children, so that children leave before parents whatever the order they came in. It has no parent itself.
What an entry's bytes are and who reads them is the index's business. PURE: no clock, no randomness, no I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from struct import Struct

from mmcache.store.columns import NIL, Memory, column8, column32, column_float, heap
from mmcache.store.policy import LRU, Factory
from mmcache.store.table import Table
from mmcache.store.uses import Uses

FREE, GHOST, RESERVED, LIVE = range(4)
RECORD = Struct("=QQI16s")  # offset, nbytes, header_nbytes, header_sum
MAX_ANCESTORS = 4096
FORK_CHILDREN = 16  # a row that so many name as parent is where prompts part ways


class Rows:
    """The columns of at most `max_rows` rows: 107 bytes each with the name, and the policy's, and 16 in the hash table.

    Readable by anyone, written by the index: `records`, `expires_at`, `node` (the extent), `kind`, `namespace` (its
    number), `media` (see answers.Media) and `stored_at_s` (whole monotonic seconds), while a row is RESERVED or LIVE.
    Written here only: `state`, `parent` (a row or NIL), `children` (how many name it as parent), `parts_ways` (1:
    FORK_CHILDREN named it as parent at one time), `forks` (by tenant's prefix, the keys of those).

    In `kept` lies what says which values are stored, and where. It may outlive the process, which may be killed between
    any two stores: so a row becomes LIVE last of all, and ceases to be LIVE before anything else of it, or of its
    memory, changes. A row that is LIVE is whole (restore.py), and its parent has its name.
    """

    def __init__(
        self, max_rows: int, seed: int, policy: Factory = LRU, memory: Memory = heap, kept: Memory = heap
    ) -> None:
        self.state = column8(kept, max_rows)
        self.records = kept(RECORD.size * max_rows)
        self.expires_at = column_float(kept, max_rows)
        self.parent = column32(kept, max_rows)
        self.namespace = column32(kept, max_rows)
        self.media = column32(kept, max_rows)
        self.stored_at_s = column32(kept, max_rows)
        self.kind = column8(kept, max_rows)
        self.parts_ways = column8(kept, max_rows)
        self.table = Table(max_rows, seed, memory, kept)
        self.policy = Uses(policy(max_rows, memory, seed, kept))
        self.node = column32(memory, max_rows)
        self.children = column32(memory, max_rows)
        self.live = 0
        self.ghosts = 0
        self.forks: dict[bytes, set[bytes]] = {}

    def needed(self, prefix: bytes, key: bytes, parent: bytes) -> int:
        """How many unused rows `claim` would take now."""
        return [*self.table.find_all(prefix, (key, parent) if parent else (key,), False)].count(-1)

    def claim(self, prefix: bytes, key: bytes, parent: bytes) -> int:
        """A RESERVED row for a key that has none or a GHOST, under the key `parent` (empty: none).

        The table must have `needed` unused rows. A parent that is not stored becomes a GHOST; one that is leaves
        after this row. A row that would become its own ancestor gets no parent, so no ring of rows can keep itself
        alive; so does, to bound the work, one that had children before and has over `MAX_ANCESTORS` ancestors.
        """
        row = self.table.find(prefix, key)
        if row < 0:
            row = self._add(prefix, key)
        else:
            self.ghosts -= 1
        self.state[row] = RESERVED
        above = NIL
        if parent:
            above = self.table.find(prefix, parent)
            if above < 0:
                above = self._add(prefix, parent)
                self.parent[above] = NIL
                self.ghosts += 1
                self.state[above] = GHOST
            elif self.children[row] and self._is_under(above, row):
                above = NIL
        self.parent[row] = above
        if above != NIL:
            self.children[above] += 1
            if self.children[above] == FORK_CHILDREN:
                self.note_fork(above)
            if self.state[above] == LIVE:
                self.policy.shelve(above)
        return row

    def _add(self, prefix: bytes, key: bytes) -> int:
        row = self.table.add(prefix, key)
        self.children[row] = self.parts_ways[row] = 0
        return row

    def note_fork(self, row: int) -> None:
        """Many rows name this one as parent, or did."""
        self.parts_ways[row] = 1
        name = self.table.name(row)
        self.forks.setdefault(name[:4], set()).add(name[4:])

    def settle(self, row: int) -> None:
        """RESERVED becomes LIVE, just used."""
        self.policy.insert(row, self.table.name(row), self.kind[row], self.parent[row])
        self.live += 1
        self.state[row] = LIVE

    def vacate(self, row: int, *, evicted: bool = False) -> None:
        """RESERVED or LIVE becomes GHOST, or FREE when it has no children; its parent may then leave in its turn.
        `evicted`: it was LIVE and leaves for others."""
        if self.state[row] == LIVE:
            if evicted:
                self.policy.evict(row, self.table.name(row))
            else:
                self.policy.remove(row)
            self.live -= 1
        above = self.parent[row]
        if self.children[row]:
            self.state[row] = GHOST
            self.parent[row] = NIL
            self.ghosts += 1
        else:
            self._free(row)
        if above != NIL:
            self.children[above] -= 1
            if not self.children[above]:
                if self.state[above] == LIVE:
                    self.policy.unshelve(above)
                elif self.state[above] == GHOST:
                    self.ghosts -= 1
                    self._free(above)

    def _free(self, row: int) -> None:
        self.state[row] = FREE
        if self.forks:
            name = self.table.name(row)
            keys = self.forks.get(name[:4], set())
            keys.discard(name[4:])
            if not keys:
                self.forks.pop(name[:4], None)
        self.table.remove(row)

    def _is_under(self, row: int, ancestor: int) -> bool:
        """Whether `ancestor` is `row` or above it; True also when that takes over `MAX_ANCESTORS` steps to see."""
        for _ in range(MAX_ANCESTORS):
            if row == ancestor:
                return True
            row = self.parent[row]
            if row == NIL:
                return False
        return True

    def check_integrity(self, pinned: Callable[[int], bool]) -> Set[int]:
        """Walks everything and returns the rows in use; raises AssertionError saying what is wrong. O(max_rows)."""
        rows = self.table.check_integrity()
        children = dict.fromkeys(rows, 0)
        for row in rows:
            above = self.parent[row]
            assert self.state[row] in (GHOST, RESERVED, LIVE), f"row {row} is in use with state {self.state[row]}"
            if self.state[row] == GHOST:
                assert above == NIL, f"ghost {row} has a parent"
                assert self.children[row], f"ghost {row} has no children"
            if above != NIL:
                assert above in rows, f"row {row}'s parent {above} is not in use"
                names = self.table.name(row), self.table.name(above)
                assert names[0][:4] == names[1][:4], f"row {row} and its parent {above} are of different tenants"
                children[above] += 1
        names_of_forks = {prefix + key for prefix, keys in self.forks.items() for key in keys}
        many = {self.table.name(row) for row, count in children.items() if count >= FORK_CHILDREN}
        part_ways = {self.table.name(row) for row in rows if self.parts_ways[row]}
        assert many <= names_of_forks == part_ways, "forks are not what rows say"
        for row, count in children.items():
            assert self.children[row] == count, f"row {row} counts {self.children[row]} children of {count}"
            steps, above = 0, row
            while above != NIL:
                assert steps <= len(rows), f"row {row} is its own ancestor"
                steps, above = steps + 1, self.parent[above]
        states = [self.state[row] for row in rows]
        assert states.count(LIVE) == self.live, f"{states.count(LIVE)} rows are live, {self.live} are counted"
        assert states.count(GHOST) == self.ghosts, f"{states.count(GHOST)} rows are ghosts, {self.ghosts} are counted"
        listed = self.policy.listed()
        live = {row for row in rows if self.state[row] == LIVE}
        assert live.issuperset(listed), f"rows {set(listed) - live} may leave, but are not live"
        for row in live.difference(listed):
            assert self.children[row] or pinned(row), f"row {row} could leave, but is shelved for ever"
        return rows
