"""KV groups: what a hit needs, what is loaded and saved for it, which part each rank holds, what is refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmcache import Keys, Namespace, Part
from mmcache.errors import ConfigError
from mmcache_connectors.vllm.groups import CHUNK, FULL, WINDOW, Group, all_parts, longest_hit, rank_part, read_groups
from mmcache_connectors.vllm.plan import blocks_to_load, blocks_to_save, savable_blocks

BLOCK = 16
NAMESPACE = Namespace(kind="kv", model="m", dtype="bfloat16", layout="LHNC", block_size=BLOCK)


def group(kind: str = FULL, reach: int = 0, index: int = 0, heads: int = 2, shards: int = 1) -> Group:
    return Group(index, kind, reach, ("layer",), heads, shards)


# What vLLM's specs look like from here: the names of their classes and the attributes that are read.
@dataclass
class FullAttentionSpec:
    block_size: int = BLOCK
    num_heads: int = 2
    max_tp_shards: int | None = None
    tokens_per_state: int = 1
    prefix_cacheable: bool = True
    sliding_window: int | None = None
    extra_retained_tokens: int = 0


class SlidingWindowSpec(FullAttentionSpec):
    pass


class MLAAttentionSpec(FullAttentionSpec):
    pass


class MambaSpec(FullAttentionSpec):
    pass


@dataclass
class CacheGroup:
    kv_cache_spec: Any
    layer_names: list[str] = field(default_factory=lambda: ["layer"])
    enable_kv_transfer: bool = True


@dataclass
class CacheConfig:
    kv_cache_groups: list[CacheGroup]


def read(*specs: Any, tp: int = 1, heads: int = 8) -> tuple[Group, ...]:
    return read_groups(CacheConfig([CacheGroup(spec) for spec in specs]), BLOCK, tp, heads)


def test_groups_are_read_from_specs() -> None:
    full, window = read(FullAttentionSpec(sliding_window=64), SlidingWindowSpec(sliding_window=64))
    assert (full.kind, full.reach_tokens, window.kind, window.reach_tokens) == (FULL, 0, WINDOW, 64)


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        (MambaSpec(), "MambaSpec"),
        (FullAttentionSpec(block_size=32), "blocks of 32 tokens"),
        (FullAttentionSpec(tokens_per_state=4), "no state per token"),
        (FullAttentionSpec(prefix_cacheable=False), "not kept per block"),
    ],
)
def test_what_cannot_be_stored_is_refused_with_the_remedy(spec: Any, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as refusal:
        read(spec)
    assert "--kv-transfer-config" in str(refusal.value)


def test_a_model_without_kv_is_refused() -> None:
    with pytest.raises(ConfigError, match="no KV cache"):
        read()


# ---------------------------------------------------------------------------------------------------- parts
def test_ranks_hold_ranges_and_copies_store_nothing() -> None:
    (cut,) = read(FullAttentionSpec(num_heads=2), tp=4, heads=8)
    assert [rank_part(cut, 1, rank, 4, None) for rank in range(4)] == [
        (Part(kv_heads=(2 * rank, 2 * rank + 2, 8)), True) for rank in range(4)
    ]
    (copied,) = read(FullAttentionSpec(num_heads=1), tp=4, heads=2)
    assert [rank_part(copied, 1, rank, 4, None) for rank in range(4)] == [
        (Part(kv_heads=(0, 1, 2)), True),
        (Part(kv_heads=(0, 1, 2)), False),
        (Part(kv_heads=(1, 2, 2)), True),
        (Part(kv_heads=(1, 2, 2)), False),
    ]


def test_one_rank_holds_everything_and_mla_is_the_same_under_any_tp() -> None:
    (alone,) = read(FullAttentionSpec(num_heads=8))
    assert rank_part(alone, 1, 0, 1, None) == (Part(), True)
    (latent,) = read(MLAAttentionSpec(num_heads=1), tp=8, heads=128)
    assert [rank_part(latent, 1, rank, 8, None) for rank in (0, 7)] == [(Part(), True), (Part(), False)]


def test_the_parts_of_a_block_cover_every_head_and_stage_once() -> None:
    groups = read(FullAttentionSpec(num_heads=1), tp=4, heads=2)
    parts = all_parts(groups, 4, [(0, 3, 5), (3, 5, 5)])
    assert parts.of_group == (
        tuple(
            Part(layers=layers, kv_heads=heads) for layers in [(0, 3, 5), (3, 5, 5)] for heads in [(0, 1, 2), (1, 2, 2)]
        ),
    )


# ---------------------------------------------------------------------------------------------------- hits
@pytest.mark.parametrize(
    ("kind", "reach", "tokens", "first"),
    [(FULL, 0, 100, 0), (WINDOW, 40, 100, 61), (WINDOW, 200, 100, 0), (CHUNK, 32, 100, 96), (CHUNK, 32, 96, 96)],
)
def test_what_attention_still_reads(kind: str, reach: int, tokens: int, first: int) -> None:
    assert group(kind, reach).first_needed_token(tokens) == first


def naive_hit(groups: list[Group], present: list[list[bool]], limit: int) -> int:
    for count in range(limit, 0, -1):
        needed = [range(one.first_needed_token(count * BLOCK) // BLOCK, count) for one in groups]
        if all(row < len(flags) and flags[row] for flags, rows in zip(present, needed, strict=True) for row in rows):
            return count
    return 0


GROUPS = st.lists(
    st.one_of(
        st.just((FULL, 0)),
        st.tuples(st.just(WINDOW), st.integers(1, 100)),
        st.tuples(st.just(CHUNK), st.integers(1, 100)),
    ),
    min_size=1,
    max_size=3,
)


@given(kinds=GROUPS, data=st.data())
def test_the_longest_hit_is_what_trying_every_length_finds(kinds: list[tuple[str, int]], data: st.DataObject) -> None:
    groups = [group(kind, reach, index) for index, (kind, reach) in enumerate(kinds)]
    present = [data.draw(st.lists(st.booleans(), max_size=12)) for _ in groups]
    limit = data.draw(st.integers(0, 12))
    assert longest_hit(groups, present, limit, BLOCK) == naive_hit(groups, present, limit)


# ---------------------------------------------------------------------------------------------------- jobs
KEYS = NAMESPACE.block_keys(range(10 * BLOCK))


def keys_of(first: int, stop: int) -> Keys:
    return KEYS[first:stop]


def test_a_window_loads_its_last_blocks_and_never_the_null_block() -> None:
    groups = [group(), group(WINDOW, 2 * BLOCK + 1, 1)]
    loads = blocks_to_load(groups, keys_of, [list(range(1, 11)), [0, 0, 0, 0, 0, 16, 17, 18, 19, 20]], 2, 7, BLOCK)
    assert [(job.group, job.block_ids) for job in loads] == [(0, [3, 4, 5, 6, 7]), (1, [16, 17])]
    assert list(loads[0].keys) == list(KEYS[2:7])
    assert list(loads[1].keys) == list(KEYS[5:7])


def test_saves_leave_out_what_has_no_memory_any_more() -> None:
    groups = [group(), group(WINDOW, 33, 1)]
    saves = blocks_to_save(groups, keys_of, [[4, 5, 6, 7], [0, 0, 0, 9]], 1, 4)
    assert [(job.group, job.block_ids, list(job.keys)) for job in saves] == [
        (0, [5, 6, 7], list(KEYS[1:4])),
        (1, [9], list(KEYS[3:4])),
    ]
    assert blocks_to_save(groups, keys_of, [[4], [0]], 1, 4) == ()


@given(ids=st.lists(st.integers(0, 3), max_size=10), first=st.integers(0, 12), stop=st.integers(0, 12))
def test_no_job_ever_names_block_0_or_mismatches_keys(ids: list[int], first: int, stop: int) -> None:
    for job in blocks_to_save([group()], keys_of, [ids], first, stop):
        assert 0 not in job.block_ids
        rows = [key.index for key in job.keys]
        assert [ids[row] for row in rows] == job.block_ids
        assert all(first <= row < stop for row in rows)


@pytest.mark.parametrize(
    ("computed", "known", "prompt", "limit", "blocks"),
    [
        (100, 100, None, 99, 6),
        (100, 95, None, 99, 5),  # draft tokens that may be thrown away
        (100, 100, 40, 99, 2),  # prompt blocks only
        (100, 100, None, 3, 3),  # an item of unknown identity lies behind
        (15, 100, None, 99, 0),
    ],
)
def test_only_final_values_are_saved(computed: int, known: int, prompt: int | None, limit: int, blocks: int) -> None:
    assert savable_blocks(computed, known, prompt, limit, BLOCK) == blocks
