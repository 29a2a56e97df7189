"""What the toy engine's KV must hold, recomputed from what was asked, and the memory that holds it.

A token's KV follows from all tokens up to it, the KV group, the cache_salt, the adapter's weights and the model's. So
both what lies in an engine's memory and what the cache gives under a key can be compared with the only right value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import blake3
import numpy as np
import torch
from numpy.typing import NDArray

import mmcache
from mmcache.keyset import Keys
from mmcache_connectors.device import DeviceBlocks
from mmcache_connectors.paged import PagedGroup
from mmcache_connectors.vllm.groups import Group, Parts
from mmcache_connectors.vllm.lookup import STORED_LAYOUT

BLOCK = 4
LAYERS, HEADS, CONTENT = 2, 2, 8
FACTS = {"model": "toy", "dtype": "uint8"}
GARBAGE = 77  # what is computed from anything that is not right
Bytes = NDArray[np.uint8]
Told = tuple[str, bytes, int]  # salt, the adapter's weights, the model's weights


@lru_cache(1 << 17)
def _after(state: bytes, token: int) -> bytes:
    return blake3.blake3(state + token.to_bytes(8, "little")).digest()


@lru_cache(1 << 17)
def _value(state: bytes, group: int) -> Bytes:
    raw = blake3.blake3(state + bytes([group])).digest(LAYERS * HEADS * CONTENT)
    return np.frombuffer(raw, np.uint8).reshape(LAYERS, HEADS, CONTENT)


def values(tokens: Sequence[int], first: int, group: int, told: Told) -> Bytes:
    """The KV of these tokens from position `first` on, over all heads: [positions, layers, heads, content]."""
    state, found = repr(told).encode(), []
    for position, token in enumerate(tokens):
        state = _after(state, token)
        if position >= first:
            found.append(_value(state, group))
    return np.stack(found)


def adapter_bytes(folder: str) -> bytes:
    """An adapter's weights, as an engine that loads it now has them."""
    return b"".join(path.read_bytes() for path in sorted(Path(folder).iterdir()))


class Memory:
    """One rank's paged memory: an array [blocks, layers, heads, tokens, content] for each KV group. With a `mover` it
    is treated as a device's."""

    def __init__(self, groups: Sequence[Group], num_blocks: int, rank: int, tp: int, mover: Any) -> None:
        pages = [
            torch.full((num_blocks, LAYERS, group.heads, BLOCK, CONTENT), 255, dtype=torch.uint8) for group in groups
        ]
        self.arrays: list[Bytes] = [one.numpy() for one in pages]
        self.paged = [
            PagedGroup([one[:, layer] for layer in range(LAYERS)], num_blocks=num_blocks, block_tokens=BLOCK)
            for one in pages
        ]
        for paged in self.paged if mover is not None else ():
            paged._grid, paged._device = None, DeviceBlocks(paged._views, mover(paged._views))
        self._rank, self._tp = rank, tp

    def holds(self, group: Group, blocks: Sequence[int], first: int, value: Bytes) -> bool:
        """Whether the positions from `first` on, of a request with these blocks, hold our heads of `value`."""
        place = self._place(blocks, first, len(value))
        return np.array_equal(self.arrays[group.index][place], value[:, :, self._heads(group)])

    def write(self, group: Group, blocks: Sequence[int], first: int, value: Bytes) -> None:
        """Put them there."""
        place = self._place(blocks, first, len(value))
        self.arrays[group.index][place] = value[:, :, self._heads(group)]

    def _heads(self, group: Group) -> slice:
        shard = self._rank // (self._tp // group.shards)
        return slice(shard * group.heads, (shard + 1) * group.heads)

    def _place(self, blocks: Sequence[int], first: int, count: int) -> tuple[Any, ...]:
        positions = np.arange(first, first + count)
        rows = np.array(blocks)[positions // BLOCK]
        assert rows.all()  # never the null block
        return rows, slice(None), slice(None), positions % BLOCK


def stored(
    cache: mmcache.Client, parts: Parts, facts: Mapping[str, object], tokens: Sequence[int], told: Told,
    adapter: str = "",
) -> tuple[int, int]:  # fmt: skip
    """(entries stored for these tokens, those of them whose bytes are wrong). `adapter` is the digest of its weights.

    The keys are made here from the facts, not by the connector's code.
    """
    keys = keys_of(facts, tokens, told[0], adapter)
    found = wrong = 0
    for group, ranks in zip(parts.groups, parts.of_group, strict=True):
        value = values(tokens, 0, group.index, told)
        blocks = value[: len(keys) * BLOCK].reshape(len(keys), BLOCK, LAYERS, HEADS, CONTENT).transpose(0, 2, 3, 1, 4)
        for shard, part in enumerate(ranks):
            right = np.ascontiguousarray(blocks[:, :, shard * group.heads : (shard + 1) * group.heads])
            there = np.zeros_like(right)
            hits = [bool(result) for result in cache.get_into(keys.for_part(part), list(there))]
            found += sum(hits)
            wrong += sum(hit and not np.array_equal(*pair) for hit, *pair in zip(hits, there, right, strict=True))
    return found, wrong


def keys_of(facts: Mapping[str, object], tokens: Sequence[int], salt: str = "", adapter: str = "") -> Keys:
    """The keys of these tokens' blocks; `adapter` is the digest of its weights."""
    narrow = {name: text for name, text in (("adapter", adapter), ("cache_salt", salt)) if text}
    namespace = mmcache.Namespace(kind="kv", layout=STORED_LAYOUT, block_size=BLOCK, **{**facts, **narrow})
    return namespace.block_keys(tokens)
