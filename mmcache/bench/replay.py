"""Replays a trace over the policies of the store: the code a server runs, without its memory, leases and locks.

A cache here is what the index is to a policy: it hands out rows, shelves parents and evicts children first, and uses
keys in the order a connector does: the leading blocks that are there are read (the first counts as used last), the
others are stored, parents first. `tests/unit/test_bench_replay.py` holds it to the index. PURE: requests in, counts
out.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from mmcache.bench.trace import LRU, Optimal, Progress, Request, Trace, hit_blocks
from mmcache.errors import UsageError
from mmcache.frame import Kind
from mmcache.store.columns import NIL, heap
from mmcache.store.index import SCAN_PER_STEP
from mmcache.store.policies import POLICIES
from mmcache.store.policy import Factory

NAME_NBYTES: Final = 36
SEED: Final = 1  # of the policies' hashes: a replay gives the same figures each time
ROWS_PER_BLOCK: Final = 2  # an index has room for more entries than its memory holds of blocks; default: one per 16 KiB


class PolicyCache:
    """What a server of `capacity_blocks` entries of one kind and size would hold under a policy of the store."""

    def __init__(self, capacity_blocks: int, policy: Factory) -> None:
        rows = ROWS_PER_BLOCK * capacity_blocks
        self._capacity = capacity_blocks
        self._policy = policy(rows, heap, SEED)
        self._rows: dict[int, int] = {}
        self._blocks = array("q", bytes(8 * rows))
        self._parent = array("Q", bytes(8 * rows))
        self._children = array("Q", bytes(8 * rows))
        self._unused = list(range(rows - 1, -1, -1))

    def __contains__(self, block: int) -> bool:
        return block in self._rows

    def use(self, request: Request) -> None:
        """See `Cache`. Blocks for which nothing may leave are not stored, nor those after them."""
        rows, policy = self._rows, self._policy
        found = next((depth for depth, block in enumerate(request) if block not in rows), len(request))
        for block in request[found - 1 :: -1] if found else ():
            policy.touch(rows[block])
        above = rows[request[found - 1]] if found else NIL
        for block in request[found:]:
            row = rows.get(block)
            if row is not None:
                policy.touch(row)
            else:
                row = self._store(block, above)
                if row is None:
                    return
            above = row

    def _store(self, block: int, above: int) -> int | None:
        policy, children = self._policy, self._children
        if above != NIL:
            children[above] += 1
            policy.shelve(above)
        while len(self._rows) >= self._capacity:
            victim = policy.victim(self._is_leaf, SCAN_PER_STEP)
            if victim is not None:
                self._evict(victim)
            elif policy.exhausted():
                self._let_go(above)
                return None
        row = self._unused.pop()
        self._rows[block] = row
        self._blocks[row], self._parent[row], children[row] = block, above, 0
        policy.insert(row, name_of(block), Kind.KV, above)
        return row

    def _evict(self, row: int) -> None:
        block = self._blocks[row]
        self._policy.evict(row, name_of(block))
        del self._rows[block]
        self._unused.append(row)
        self._let_go(self._parent[row])

    def _let_go(self, above: int) -> None:
        if above != NIL:
            self._children[above] -= 1
            if not self._children[above]:
                self._policy.unshelve(above)

    def _is_leaf(self, row: int) -> bool:
        return not self._children[row]


def name_of(block: int) -> bytes:
    """A block's name, as if tenant 0 had stored it."""
    return block.to_bytes(NAME_NBYTES, "big", signed=True)


@dataclass(frozen=True, slots=True)
class Row:
    """Hit rates at one capacity, by policy's name."""

    capacity_tokens: int
    capacity_blocks: int
    rates: Mapping[str, float]
    optimal: float

    def gap_closed(self, policy: str) -> float | None:
        """Which share of the way from LRU to the optimum a policy goes. None where LRU is the optimum."""
        gap = self.optimal - self.rates["lru"]
        return (self.rates[policy] - self.rates["lru"]) / gap if gap > 0 else None


def replay(trace: Trace, capacity_tokens: int, progress: Progress | None = None) -> Row:
    """All policies at one capacity. Raises UsageError if that holds no block."""
    blocks = capacity_tokens // trace.block_tokens
    if blocks < 1:
        raise UsageError(f"a capacity of {capacity_tokens} tokens holds no block of {trace.block_tokens}")
    every = max(1, trace.blocks)
    rates = {
        name: hit_blocks(trace.requests, PolicyCache(blocks, policy), progress) / every
        for name, policy in POLICIES.items()
    }
    best = hit_blocks(trace.requests, Optimal(blocks, trace.requests), progress) / every
    return Row(capacity_tokens, blocks, rates, best)


def endless(trace: Trace) -> float:
    """The hit rate of a cache that keeps everything."""
    return hit_blocks(trace.requests, LRU(trace.unique_blocks)) / max(1, trace.blocks)
