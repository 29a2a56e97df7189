"""What is asked for: the simulator's prompts, placed by runs or by block, and the only right value of each key."""

from __future__ import annotations

from itertools import islice

import numpy as np

from mmcache.keyset import Keys
from mmcache.testing.simulator.prompts import requests
from mmcache.testing.values import Bytes

HEAD_NBYTES = 32


def prompts(workload: str, seed: int, shards: int, count: int, *, by_block: bool = False) -> list[Keys]:
    """So many requests, the same ones each time. `by_block`: each block is a run of its own."""
    asked = list(islice(requests(workload, seed, shards), count))
    return list(map(blocks_alone, asked)) if by_block else asked


def blocks_alone(keys: Keys) -> Keys:
    """The same keys, each placed by its own chain key."""
    above = keys.parents, keys.indices, keys.parent_chains
    return Keys(keys.digests, keys.chains, keys.chains, keys.namespaces, *above)


class Values:
    """The only right value of each key: its digest, then a window of random bytes that the digest chooses."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._pool = np.random.default_rng(1).integers(0, 256, 2 * nbytes, np.uint8)

    def of(self, digest: bytes) -> Bytes:
        """The value, a copy."""
        start = int.from_bytes(digest[:8], "little") % self.nbytes
        value = self._pool[start : start + self.nbytes].copy()
        value[:HEAD_NBYTES] = np.frombuffer(digest, np.uint8)
        return value

    def is_right(self, digest: bytes, found: Bytes) -> bool:
        """Whether each byte is."""
        return bool(np.array_equal(found, self.of(digest)))
