"""The replay against the index itself, and the policies on a trace that was made up."""

from __future__ import annotations

import math

import pytest

from mmcache.bench.replay import PolicyCache, replay
from mmcache.bench.trace import LRU, Request, Trace, hit_blocks
from mmcache.bench.tracegen import Shape, generate
from mmcache.store.answers import Reserved
from mmcache.store.index import Index
from mmcache.store.policies import POLICIES

SMALL = Shape(requests=2_500, documents=150, drift_requests=400, think_requests=50.0, prompt_blocks=4.0)


@pytest.fixture(scope="module")
def trace() -> Trace:
    return generate(3, SMALL)


class IndexCache:
    """The index as a connector uses it."""

    def __init__(self, capacity_blocks: int, policy: str) -> None:
        self._index = Index(
            capacity_bytes=64 * capacity_blocks, max_entries=2 * capacity_blocks, seed=1, policy=POLICIES[policy]
        )
        self._last_id = 0

    @staticmethod
    def _key(block: int) -> bytes:
        return block.to_bytes(32, "big")

    def __contains__(self, block: int) -> bool:
        return self._index.contains(0, [self._key(block)], 0.0)[0]

    def use(self, request: Request) -> None:
        keys = [self._key(block) for block in request]
        self._last_id += 1
        found = len(self._index.acquire(0, keys, lease_id=self._last_id, now=0.0, prefix=True))
        self._index.release(0, self._last_id, 0.0)
        for depth in range(found, len(keys)):
            self._last_id += 1
            above = keys[depth - 1] if depth else bytes(32)
            answer = self._index.reserve(0, keys[depth], above, 64, reservation_id=self._last_id, now=0.0, kind=1)
            if isinstance(answer, Reserved):
                assert self._index.commit(
                    self._last_id, header_nbytes=1, header_sum=bytes(16), expires_at=math.inf, now=0.0
                )


@pytest.mark.parametrize("policy", POLICIES)
def test_a_replay_finds_what_the_index_finds(trace: Trace, policy: str) -> None:
    # A key of 32 zero bytes is no parent, so no block is 0.
    requests = [tuple(block + 1 for block in request) for request in trace.requests[:350]]
    for capacity in (400, 1000):
        replayed, index = PolicyCache(capacity, POLICIES[policy]), IndexCache(capacity, policy)
        hits = [hit_blocks([request], replayed) for request in requests]
        assert hits == [hit_blocks([request], index) for request in requests]
        assert 0 < sum(hits) < sum(map(len, requests))


def test_the_stores_lru_is_the_exact_one(trace: Trace) -> None:
    for capacity in (500, 3000):
        assert hit_blocks(trace.requests, PolicyCache(capacity, POLICIES["lru"])) == hit_blocks(
            trace.requests, LRU(capacity)
        )


def test_value_closes_a_part_of_the_gap_on_a_made_up_trace_and_is_never_far_below_lru(trace: Trace) -> None:
    for share in (20, 4):  # in a trace of a few hundred requests what is learnt comes too late
        row = replay(trace, trace.unique_blocks // share * trace.block_tokens)
        assert row.rates["value"] <= row.optimal
        assert row.rates["value"] > row.rates["lru"] - 0.005, (share, row)
        closed = row.gap_closed("value")
        assert share == 4 or (closed is not None and closed > 0.08), (share, row)


def test_a_seed_makes_the_same_trace_and_another_one_another(trace: Trace) -> None:
    assert generate(3, SMALL) == trace
    assert generate(4, SMALL) != trace
    assert len(trace.requests) == SMALL.requests
    first, last = trace.requests[:200], trace.requests[-200:]
    assert {block for request in first for block in request} & {block for request in last for block in request}
