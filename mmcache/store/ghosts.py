"""Ghosts: a short memory of the names that were evicted, so that a policy learns which left too early.

One 32-bit number a ghost: 13 bits of the name's hash, which tell it from the others of its bucket of eight, and 19 bits
that belong to the policy. A full bucket forgets what it has known longest. A name that was never there is taken for a
ghost about once in a thousand times; that costs a policy a little of its aim, and nobody a wrong value. The hash is
keyed by a secret seed: names crafted to collide do not. PURE: no clock, no randomness, no I/O.
"""

from __future__ import annotations

from typing import Final

from xxhash import xxh3_64_intdigest

from mmcache.store.columns import Memory, column32, heap

WAYS: Final = 8
MARK_BITS: Final = 19
MARK_MASK: Final = (1 << MARK_BITS) - 1
_TAGS: Final = (1 << 32 - MARK_BITS) - 1


class Ghosts:
    """Remembers about `count` names, each with a mark of `MARK_BITS` bits. Every call is O(1)."""

    def __init__(self, count: int, seed: int, memory: Memory = heap) -> None:
        self._seed = seed & 0xFFFFFFFFFFFFFFFF
        self._buckets = -(-count // WAYS)
        # A bucket is ordered: the newest first, then older ones, then zeros.
        self._entries = column32(memory, WAYS * self._buckets)

    def add(self, name: bytes, mark: int) -> int | None:
        """Remember `name`, which must not be remembered yet; the mark of the one that was forgotten for it."""
        base, tag = self._place(name)
        entries, last = self._entries, base + WAYS - 1
        forgotten = entries[last]
        entries[base + 1 : last + 1] = entries[base:last]
        entries[base] = tag << MARK_BITS | mark
        return forgotten & MARK_MASK if forgotten else None

    def take(self, name: bytes) -> int | None:
        """The mark `name` was remembered with, None if it is not; it is forgotten now."""
        base, tag = self._place(name)
        entries = self._entries
        for place, entry in enumerate(entries[base : base + WAYS].tolist(), base):
            if entry >> MARK_BITS == tag:
                last = base + WAYS - 1
                entries[place:last] = entries[place + 1 : last + 1]
                entries[last] = 0
                return entry & MARK_MASK
        return None

    def _place(self, name: bytes) -> tuple[int, int]:
        hash64 = xxh3_64_intdigest(name, self._seed)
        return (hash64 >> 32) * self._buckets >> 32 << 3, 1 + (hash64 & 0xFFFFFFFF) % _TAGS
