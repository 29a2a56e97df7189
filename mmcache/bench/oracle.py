"""What the hit rate should be: one request flow, replayed over an exact LRU of any size, an endless one included.

PURE: identities and sizes in, counts out; no clock, no cache, no bytes. Entries go by the benchmark's own content
digests, never by mmcache's keys, so a key that splits or merges contents shows up as a difference to this.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor the flow looks up: its content digest, its parent block's (b"" for none) and its payload bytes."""

    content: bytes
    parent: bytes
    nbytes: int


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


Moment = dict[str, tuple[int, int, int, int]]  # kind -> a Tally's numbers, summed up to a request


class Tallies:
    """One Tally a kind, the hit rate over all, and how they grew request by request.

    `work` counts what a workload counts beside lookups (steps of denoising, for one): what was asked for, and what
    was not computed again.
    """

    def __init__(self, by_kind: Mapping[str, Tally]) -> None:
        self.by_kind = dict(by_kind)
        self.work: Counter[str] = Counter()
        self.history: list[Moment] = []

    @classmethod
    def of(cls, *kinds: str) -> Tallies:
        """Zeros for these kinds, in this order."""
        return cls({kind: Tally() for kind in kinds})

    def __getitem__(self, kind: str) -> Tally:
        return self.by_kind[kind]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Tallies):
            return NotImplemented
        return (self.by_kind, self.work, self.history) == (other.by_kind, other.work, other.history)

    def __repr__(self) -> str:
        return f"Tallies({self.by_kind!r}, work={dict(self.work)!r})"

    @property
    def hit_rate(self) -> float:
        return self.total().hit_rate

    def total(self) -> Tally:
        """All kinds together."""
        rows = [astuple(tally) for tally in self.by_kind.values()]
        return Tally(*map(sum, zip(*rows, strict=True)))

    def mark(self) -> None:
        """A request is done: remember where the counts stand."""
        self.history.append({kind: astuple(tally) for kind, tally in self.by_kind.items()})


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


class Step(Protocol):
    """One request as the replays see it: what it looks up and stores, by identity alone."""

    def serve(self, store: ExactLRU, tallies: Tallies) -> None:
        """Do the request's lookups and stores, and count them."""


@dataclass(frozen=True, slots=True)
class PrefixStep:
    """A prompt: its KV blocks in order, and its embeddings with the block count from which each is not needed.

    `generated`: the blocks that the answer completes. They are stored for the next turn, not looked up by this one.
    """

    blocks: tuple[Entry, ...]
    embeddings: tuple[tuple[int, Entry], ...]
    generated: tuple[Entry, ...] = ()

    def uncovered(self, prefix: int) -> list[Entry]:
        """The embeddings still needed when `prefix` leading blocks are there, each content once."""
        return list({entry.content: entry for covered_by, entry in self.embeddings if prefix < covered_by}.values())

    def serve(self, store: ExactLRU, tallies: Tallies) -> None:
        """See Step."""
        prefix, tally = store.prefix(self.blocks), tallies["kv"]
        store.read(self.blocks[:prefix])
        tally.lookups += len(self.blocks)
        tally.hits += prefix
        tally.bytes_read += sum(entry.nbytes for entry in self.blocks[:prefix])
        get_or_store(store, tallies["embedding"], self.uncovered(prefix))
        tally.bytes_written += store.put((*self.blocks[prefix:], *self.generated))


def get_or_store(store: ExactLRU, tally: Tally, wanted: Sequence[Entry]) -> None:
    """Look up entries that stand alone, and store those that are missing."""
    found = store.read(wanted)
    tally.lookups += len(wanted)
    tally.hits += sum(found)
    tally.bytes_read += sum(entry.nbytes for entry, hit in zip(wanted, found, strict=True) if hit)
    tally.bytes_written += store.put([entry for entry, hit in zip(wanted, found, strict=True) if not hit])


def replay(steps: Sequence[Step], store: ExactLRU, kinds: Sequence[str] = ("embedding", "kv")) -> Tallies:
    """Run a benchmark's request flow over a store that only knows identities; the store keeps what it ends with."""
    tallies = Tallies.of(*kinds)
    for step in steps:
        step.serve(store, tallies)
        tallies.mark()
    return tallies
