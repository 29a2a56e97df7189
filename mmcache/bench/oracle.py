"""What the hit rate should be: one request flow, replayed over an exact LRU of any size, an endless one included.

PURE: identities and sizes in, counts out; no clock, no cache, no bytes. Entries go by the benchmark's own content
digests, never by mmcache's keys, so a key that splits or merges contents shows up as a difference to this.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor the flow looks up: its content digest, its parent block's (b"" for none) and its payload bytes."""

    content: bytes
    parent: bytes
    nbytes: int


@dataclass(frozen=True, slots=True)
class Step:
    """One request: its KV blocks in order, and its embeddings with the block count from which each is not needed."""

    blocks: tuple[Entry, ...]
    embeddings: tuple[tuple[int, Entry], ...]

    def uncovered(self, prefix: int) -> list[Entry]:
        """The embeddings still needed when `prefix` leading blocks are there, each content once."""
        return list({entry.content: entry for covered_by, entry in self.embeddings if prefix < covered_by}.values())


@dataclass(slots=True)
class Tally:
    """Lookups and hits of one kind of entry, and the payload bytes that moved."""

    lookups: int = 0
    hits: int = 0
    bytes_read: int = 0
    bytes_written: int = 0

    @property
    def hit_rate(self) -> float:
        return self.hits / self.lookups if self.lookups else 0.0


@dataclass(slots=True)
class Tallies:
    """One Tally a kind, and the hit rate over both."""

    kv: Tally = field(default_factory=Tally)
    embedding: Tally = field(default_factory=Tally)

    @property
    def hit_rate(self) -> float:
        lookups = self.kv.lookups + self.embedding.lookups
        return (self.kv.hits + self.embedding.hits) / lookups if lookups else 0.0


class ExactLRU:
    """An exact least-recently-used store with a byte capacity; a block goes only after all blocks that follow it.

    Reads and writes touch; a look does not. A batch is touched from its last entry to its first, so that a chain's
    parents stay more recent than their children. An entry costs its payload and `overhead_nbytes`, rounded up to
    `alignment`.
    """

    def __init__(self, capacity_nbytes: float = math.inf, *, overhead_nbytes: int = 0, alignment: int = 1) -> None:
        self._capacity_nbytes = capacity_nbytes
        self._overhead_nbytes = overhead_nbytes
        self._alignment = alignment
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()  # least recently used first
        self._children: dict[bytes, int] = {}
        self.used_nbytes = 0

    def __contains__(self, content: bytes) -> bool:
        return content in self._entries

    def prefix(self, entries: Sequence[Entry]) -> int:
        """How many leading entries are here. Touches nothing."""
        for count, entry in enumerate(entries):
            if entry.content not in self._entries:
                return count
        return len(entries)

    def read(self, entries: Sequence[Entry]) -> list[bool]:
        """Which entries are here; those are touched, last first."""
        found = [entry.content in self._entries for entry in entries]
        self._touch(entries)
        return found

    def put(self, entries: Sequence[Entry]) -> int:
        """Store what is not here yet, evicting as needed; returns the payload bytes stored.

        An entry that does not fit even when everything else that may go is gone is left out.
        """
        batch = {entry.content for entry in entries}
        written_nbytes = 0
        for entry in entries:
            if entry.content in self._entries:
                continue
            self._children[entry.parent] = self._children.get(entry.parent, 0) + 1  # so its parent stays
            if not self._make_room(self.cost_nbytes(entry), batch):
                self._children[entry.parent] -= 1
                continue
            self._entries[entry.content] = entry
            self.used_nbytes += self.cost_nbytes(entry)
            written_nbytes += entry.nbytes
        self._touch(entries)
        return written_nbytes

    def cost_nbytes(self, entry: Entry) -> int:
        """The bytes of capacity an entry takes."""
        return -(-(entry.nbytes + self._overhead_nbytes) // self._alignment) * self._alignment

    def _touch(self, entries: Sequence[Entry]) -> None:
        for entry in reversed(entries):
            if entry.content in self._entries:
                self._entries.move_to_end(entry.content)

    def _make_room(self, nbytes: int, keep: set[bytes]) -> bool:
        while self.used_nbytes + nbytes > self._capacity_nbytes:
            victim = next((e for e in self._entries.values() if self._evictable(e) and e.content not in keep), None)
            if victim is None:
                return False
            del self._entries[victim.content]
            self._children[victim.parent] -= 1
            self.used_nbytes -= self.cost_nbytes(victim)
        return True

    def _evictable(self, entry: Entry) -> bool:
        return not self._children.get(entry.content)


def replay(steps: Sequence[Step], store: ExactLRU) -> Tallies:
    """Run the benchmark's request flow over a store that only knows identities; the store keeps what it ends with."""
    tallies = Tallies()
    for step in steps:
        prefix = store.prefix(step.blocks)
        store.read(step.blocks[:prefix])
        tallies.kv.lookups += len(step.blocks)
        tallies.kv.hits += prefix
        tallies.kv.bytes_read += sum(entry.nbytes for entry in step.blocks[:prefix])
        wanted = step.uncovered(prefix)
        found = store.read(wanted)
        tallies.embedding.lookups += len(wanted)
        tallies.embedding.hits += sum(found)
        tallies.embedding.bytes_read += sum(entry.nbytes for entry, hit in zip(wanted, found, strict=True) if hit)
        missing = [entry for entry, hit in zip(wanted, found, strict=True) if not hit]
        tallies.embedding.bytes_written += store.put(missing)
        tallies.kv.bytes_written += store.put(step.blocks[prefix:])
    return tallies
