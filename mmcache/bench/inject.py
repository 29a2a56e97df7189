"""Damage on purpose: proof that the benchmark's figures can fail.

Real bytes in the real arena, or real rows of the index, are changed behind the cache's back, always under an entry
that the next request is about to read.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from mmcache.bench.report import Injection
from mmcache.keyset import Key
from mmcache.store.shard import Shard
from mmcache.testing import faults

EVERY = 4  # one request in so many has something damaged before it runs


class Injector:
    """Before some requests, flips one bit of a stored frame (`corrupt`) or exchanges two frames (`wrong`)."""

    def __init__(self, kind: Injection, shard: Shard, seed: int) -> None:
        self._kind = kind
        self._shard = shard
        self._rng = random.Random(seed)
        self.planted = 0

    def damage(self, about_to_be_read: Sequence[Key], frame_nbytes: int) -> None:
        """Perhaps damage one of these stored entries, all of one size; with fewer than two of them do nothing."""
        if len(about_to_be_read) < 2 or self._rng.randrange(EVERY):
            return
        first, second = self._rng.sample(about_to_be_read, 2)
        if self._kind == "corrupt":
            faults.flip_bit(self._shard, first.digest, self._rng.randrange(frame_nbytes * 8))
        else:
            faults.swap_entries(self._shard, first.digest, second.digest)
        self.planted += 1
