"""The toy engine's requests and its own prefix cache: hashes, reference counts, the order of reuse, as vLLM's.

Source: vLLM 0.32.0, v1/core/block_pool.py and kv_cache_utils.py. A block's hash says nothing about weights: of
an adapter it holds the name and the path only. So this cache can hold stale bytes where vLLM's can.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import blake3

from tests.integration.toy_memory import BLOCK

NULL_BLOCK = 0  # stands where a sliding window needs no memory


def block_hash(parent: bytes, tokens: Sequence[int], extra: object) -> bytes:
    """The name under which a full block is found again."""
    return blake3.blake3(repr((parent, list(tokens), extra)).encode()).digest()


@dataclass(frozen=True)
class Lora:
    """What the connector reads of a vLLM LoRARequest."""

    lora_int_id: int
    lora_name: str
    lora_path: str
    is_3d_lora_weight: bool = False


@dataclass(eq=False)
class Request:
    """What the connector reads of a vLLM request, and what this engine keeps of it."""

    request_id: str
    all_token_ids: list[int]
    outputs: int = 1
    cache_salt: str | None = None
    lora_request: Lora | None = None
    mm_features: Sequence[Any] = ()
    prompt_embeds: Any = None
    prompt_is_token_ids: Any = None
    resumable: bool = False
    skip_reading_prefix_cache: bool = False
    state: str = "waiting"  # then loading, loaded, running, ended; or aborted while it was loading
    computed: int = 0
    local: int = 0  # tokens found in this engine's own memory, at the last admission
    external: int = 0  # tokens that came from the cache, at the last admission
    asked: int = 0
    load_failed: bool = False
    told: Any = None  # what the response says of the cache
    blocks: list[list[int]] = field(default_factory=list)
    hashed: list[int] = field(default_factory=list)  # leading blocks whose hash was set, for each group
    hashes: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.all_token_ids = list(self.all_token_ids)
        self.num_prompt_tokens = len(self.all_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)

    def block_hashes(self) -> list[bytes]:
        """Of all full blocks; of weights they hold what vLLM's hold: an adapter's name and path."""
        lora = self.lora_request and (self.lora_request.lora_name, self.lora_request.lora_path)
        for row in range(len(self.hashes), self.num_tokens // BLOCK):
            extra = (lora, self.cache_salt if row == 0 else None)
            parent = self.hashes[-1] if row else b""
            self.hashes.append(block_hash(parent, self.all_token_ids[row * BLOCK : (row + 1) * BLOCK], extra))
        return self.hashes


class BlockPool:
    """One KV group's blocks. Those nobody refers to keep their hash, and can be hit, until they are used again."""

    def __init__(self, num_blocks: int) -> None:
        self.references = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._cached: dict[bytes, dict[int, None]] = {}  # several blocks may hold the same
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))  # the first is used next

    def free_count(self) -> int:
        """How many blocks nobody refers to."""
        return len(self._free)

    def cached_count(self) -> int:
        """How many blocks can be hit."""
        return sum(one is not None for one in self._hashes)

    def find(self, name: bytes) -> int | None:
        """A block of this hash; None if there is none."""
        return next(iter(self._cached.get(name, ())), None)

    def take(self, count: int) -> list[int]:
        """Blocks for new content: what they held can no longer be hit."""
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        self.evict(blocks)
        for block in blocks:
            assert self.references[block] == 0
            self.references[block] = 1
        return blocks

    def touch(self, blocks: Iterable[int]) -> None:
        """One more request refers to these."""
        for block in blocks:
            self._free.pop(block, None)
            self.references[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One request fewer refers to these, the last block first. Without a hash they are used first, else last."""
        first: list[int] = []
        last: list[int] = []
        for block in blocks:
            self.references[block] -= 1
            assert self.references[block] >= 0
            if not self.references[block]:
                (first if self._hashes[block] is None else last).append(block)
        for block in reversed(first):
            self._free[block] = None
            self._free.move_to_end(block, last=False)
        for block in last:
            self._free[block] = None

    def cache(self, block: int, name: bytes) -> None:
        """From now on the block can be hit, whatever it holds."""
        assert self._hashes[block] is None
        self._hashes[block] = name
        self._cached.setdefault(name, {})[block] = None

    def evict(self, blocks: Iterable[int]) -> None:
        """These cannot be hit any more; who refers to them still does."""
        for block in blocks:
            name, self._hashes[block] = self._hashes[block], None
            if name is not None:
                del self._cached[name][block]
                if not self._cached[name]:
                    del self._cached[name]

    def reset(self) -> bool:
        """Forget all hashes; False, and nothing happens, while a block is in use."""
        if any(self.references):
            return False
        self.evict(range(len(self._hashes)))
        return True
