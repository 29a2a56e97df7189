"""The sizing sheet: what a block, an item and an index entry take once stored, and what fits in a cache of some size.

Frames are laid out by mmcache.frame, the index's bytes are counted from an index, so neither can differ from what a
server does. PURE: no clock, no randomness, no I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mmcache.errors import ConfigError
from mmcache.frame import DTYPES, align_up, layout_of
from mmcache.size.kv import KV
from mmcache.size.media import Item
from mmcache.store.index import Index
from mmcache.store.ledger import MAX_HISTORY_KEYS
from mmcache.store.policy import Factory

MAX_BLOCK_TOKENS = 1 << 16


@dataclass(frozen=True, slots=True)
class Split:
    """A block under tensor parallelism: `parts` frames, their bytes with headers and padding, and what one worker
    holds of it."""

    tp: int
    parts: int
    stored_nbytes: int
    worker_nbytes: int


@dataclass(frozen=True, slots=True)
class StoredItem:
    """An embedding, or another single tensor, as bytes and as they are stored."""

    what: str
    tokens: int
    width: int
    nbytes: int
    stored_nbytes: int


@dataclass(frozen=True, slots=True)
class Room:
    """What a cache of `memory_nbytes` holds if it holds nothing else. `index_full`: the index is full before it."""

    memory_nbytes: int
    entries: int
    index_nbytes: int
    tokens: int
    prompts: int
    items: tuple[int, ...]
    index_full: bool


def stored_nbytes(nbytes: int, alignment: int) -> int:
    """What one tensor takes in a server's memory: header, padding to the tensor, and padding to the next frame."""
    return align_up(layout_of([nbytes], alignment).frame_nbytes, alignment)


def split_of(kv: KV, block_tokens: int, tp: int, alignment: int) -> Split:
    """A block over `tp` ranks: ranks hold ranges of heads, and copies of heads are stored once. Raises ConfigError for
    a number of ranks that vLLM cannot cut the heads over."""
    if not 1 <= block_tokens <= MAX_BLOCK_TOKENS:
        raise ConfigError(
            f"a block of {block_tokens} tokens; use 1 to {MAX_BLOCK_TOKENS}, as --block-size of the engine"
        )
    parts = stored = worker = 0
    for group in kv.groups:
        shards = min(tp, group.max_shards)
        if tp < 1 or (group.max_shards % tp and tp % group.max_shards):
            raise ConfigError(f"{group.max_shards} KV heads cannot be cut over {tp} ranks; use a divisor or a multiple")
        nbytes = group.token_nbytes(kv.itemsize) * block_tokens // shards
        parts += shards
        stored += shards * stored_nbytes(nbytes, alignment)
        worker += nbytes
    return Split(tp, parts, stored, worker)


def stored_item(item: Item, dtype: str, alignment: int) -> StoredItem:
    """An item in this dtype."""
    nbytes = item.tokens * item.width * DTYPES[dtype][1]
    return StoredItem(item.what, item.tokens, item.width, nbytes, stored_nbytes(nbytes, alignment))


def index_nbytes(entries: int, policy: Factory) -> int:
    """Bytes of an index for so many entries, beside the memory for values: columns have one size an entry and one a
    key that is remembered after it left."""
    small, keys = 1024, 128
    base = _counted(small, keys, policy)
    entry = (_counted(2 * small, keys, policy) - base) / small
    remembered = (_counted(small, 2 * keys, policy) - base) / keys
    history = min(MAX_HISTORY_KEYS, max(8, entries // 8))
    return int(base + (entries - small) * entry + (history - keys) * remembered)


def _counted(entries: int, history: int, policy: Factory) -> int:
    total = 0

    def memory(nbytes: int) -> memoryview:
        nonlocal total
        total += nbytes
        return memoryview(bytearray(nbytes))

    Index(
        capacity_bytes=1 << 30,
        max_entries=entries,
        history_keys=history,
        seed=0,
        policy=policy,
        memory=memory,
        kept=memory,
    )
    return total


def room_of(
    memory_nbytes: int,
    split: Split | None,
    items: Sequence[StoredItem],
    *,
    block_tokens: int,
    prompt_tokens: int,
    entries_of: Callable[[int], int],
    policy: Factory,
) -> Room:
    """What fits. `entries_of`: how many entries a server of so much memory has. A prompt is its whole blocks."""
    entries = entries_of(memory_nbytes)
    blocks = by_memory = prompts = 0
    if split is not None:
        by_memory = memory_nbytes // split.stored_nbytes
        blocks = min(by_memory, entries // split.parts)
        prompts = blocks // max(1, prompt_tokens // block_tokens)
    counts = [min(memory_nbytes // item.stored_nbytes, entries) for item in items]
    return Room(
        memory_nbytes,
        entries,
        index_nbytes(entries, policy),
        blocks * block_tokens,
        prompts,
        tuple(counts),
        blocks < by_memory,
    )
