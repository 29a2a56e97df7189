"""KV cache groups: which blocks of each a prefix needs, and which part of a block each worker holds.

A model with several kinds of attention has several groups; each has its own block table over the same tokens. A prefix
is a hit when every group has what attention will read: all blocks under full attention, the last ones under a sliding
window or a chunk. Decides only; vLLM's config objects are read, nothing of vLLM is imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from mmcache.errors import ConfigError
from mmcache.keyset import Part

FULL: Final = "full"
WINDOW: Final = "window"
CHUNK: Final = "chunk"
_KIND_OF_SPEC: Final = {
    "FullAttentionSpec": FULL,
    "MLAAttentionSpec": FULL,
    "SlidingWindowSpec": WINDOW,
    "ChunkedLocalAttentionSpec": CHUNK,
}


@dataclass(frozen=True, slots=True)
class Group:
    """One KV cache group. `reach_tokens` is the sliding window's or the chunk's size, 0 under full attention."""

    index: int
    kind: str
    reach_tokens: int
    layer_names: tuple[str, ...]
    heads: int  # in one worker's page
    shards: int  # how many different parts the heads are cut into over tensor parallel ranks

    def first_needed_token(self, num_tokens: int) -> int:
        """The first token position that attention at position `num_tokens` still reads."""
        if self.kind == WINDOW:
            return max(0, num_tokens - self.reach_tokens + 1)
        if self.kind == CHUNK:
            return num_tokens // self.reach_tokens * self.reach_tokens
        return 0


@dataclass(frozen=True, slots=True)
class Parts:
    """Where this engine's blocks lie: per group, the part of every rank that stores, in order of rank."""

    groups: tuple[Group, ...]
    of_group: tuple[tuple[Part, ...], ...]


def read_groups(kv_cache_config: Any, block_tokens: int, tp_size: int, total_kv_heads: int) -> tuple[Group, ...]:
    """The groups of a vLLM KVCacheConfig. Raises ConfigError, with the remedy, for a kind that cannot be stored."""
    groups = []
    for index, group in enumerate(kv_cache_config.kv_cache_groups):
        spec = group.kv_cache_spec
        kind = _KIND_OF_SPEC.get(type(spec).__name__)
        if kind is None or not group.enable_kv_transfer or not spec.prefix_cacheable:
            raise ConfigError(
                f"KV group {index} ({type(spec).__name__}) holds state that is not kept per block of tokens, or not in "
                "a form mmcache stores yet; start this model without --kv-transfer-config"
            )
        if spec.block_size != block_tokens:
            raise ConfigError(
                f"KV group {index} has blocks of {spec.block_size} tokens, the engine of {block_tokens}; set one "
                "--block-size for all, or start without --kv-transfer-config"
            )
        if getattr(spec, "non_causal", False) or spec.tokens_per_state != 1:
            raise ConfigError(
                f"KV group {index} is not causal, or keeps no state per token: its blocks are not decided by the "
                "tokens before them; start this model without --kv-transfer-config"
            )
        kind, reach = _reach(kind, spec)
        shards = spec.max_tp_shards or (1 if type(spec).__name__ == "MLAAttentionSpec" else total_kv_heads)
        groups.append(Group(index, kind, reach, tuple(group.layer_names), spec.num_heads, min(tp_size, shards)))
    if not groups:
        raise ConfigError("this model has no KV cache; start it without --kv-transfer-config")
    return tuple(groups)


def _reach(kind: str, spec: Any) -> tuple[str, int]:
    """A window or chunk may also sit in a full-attention spec: all its blocks are kept then, and all are needed."""
    if kind == WINDOW:
        return WINDOW, spec.sliding_window + spec.extra_retained_tokens
    if kind == CHUNK:
        return CHUNK, spec.attention_chunk_size
    return FULL, 0


def rank_part(
    group: Group, group_count: int, tp_rank: int, tp_size: int, layers: tuple[int, int, int] | None
) -> tuple[Part, bool]:
    """(the part of a block that this tensor parallel rank holds, whether it is the rank that stores it).

    Ranks beyond the number of head shards hold copies: they read the same part and store nothing.
    """
    copies = tp_size // group.shards
    shard = tp_rank // copies
    heads = (shard * group.heads, (shard + 1) * group.heads, group.shards * group.heads)
    return Part(kv_group=(group.index, group_count), layers=layers, kv_heads=heads), tp_rank % copies == 0


def all_parts(groups: Sequence[Group], tp_size: int, stages: Sequence[tuple[int, int, int] | None]) -> Parts:
    """Every part a block of this engine consists of, over all tensor and pipeline parallel ranks."""
    of_group = []
    for group in groups:
        ranks = [rank_part(group, len(groups), rank, tp_size, layers) for layers in stages for rank in range(tp_size)]
        of_group.append(tuple(part for part, stores in ranks if stores))
    return Parts(tuple(groups), tuple(of_group))


def groups_fact(groups: Iterable[Group], specs: Iterable[Any]) -> list[dict[str, object]]:
    """What the groups are, as a namespace fact: the same group number in another model or setup means other layers."""
    return [
        {
            "kind": group.kind,
            "reach": group.reach_tokens,
            "layers": list(group.layer_names),
            "spec": type(spec).__name__,
            "dtype": str(spec.dtype).removeprefix("torch."),
            "quant": str(spec.kv_quant_mode.name),
            "head_size": [spec.head_size, spec.head_size_v],
            "packing": [spec.num_head_slots, spec.state_content_bytes],
            "cache_dtype": str(getattr(spec, "cache_dtype_str", None)),
        }
        for group, spec in zip(groups, specs, strict=True)
    ]


def longest_hit(groups: Sequence[Group], present: Sequence[Sequence[bool]], limit: int, block_tokens: int) -> int:
    """How many leading blocks are a hit: the most, up to `limit`, for which every group holds what it must.

    `present[g][i]` says that all parts of block i of group g are stored.
    """
    count = limit
    for group, flags in zip(groups, present, strict=True):
        if group.kind == FULL:
            count = min(
                count, next((row for row, flag in enumerate(flags[:count]) if not flag), min(count, len(flags)))
            )
    while count > 0:
        gap = 0
        for group, flags in zip(groups, present, strict=True):
            if group.kind != FULL:
                first = group.first_needed_token(count * block_tokens) // block_tokens
                gap = max(gap, _last_gap(flags, first, count))
        if not gap:
            return count
        count = gap - 1
    return 0


def _last_gap(flags: Sequence[bool], first: int, stop: int) -> int:
    """1 + the last row of first .. stop that is absent, 0 if none is."""
    for row in range(stop - 1, first - 1, -1):
        if row >= len(flags) or not flags[row]:
            return row + 1
    return 0
