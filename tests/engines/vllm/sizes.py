"""Sizes of frames: those that an engine left in a cache, and those that `mmcache size` says for its model."""

from __future__ import annotations

import json
from pathlib import Path

from mmcache.frame import Kind, layout_of
from mmcache.size.fields import Fields
from mmcache.size.kv import kv_of
from mmcache.store.rows import LIVE, RECORD
from tests.engines.vllm.harness import Cache, Settings, made


def fields_of(path: Path) -> Fields:
    """A config, as `mmcache size` reads it."""
    return Fields(json.loads(path.read_text()))


def kv_frames_said(settings: Settings) -> set[int]:
    """Bytes of the frames of a block, with their headers: one for each KV group and range of heads."""
    llm = settings.resolved(None)["llm"]
    kv = kv_of(fields_of(made(settings.model) / "config.json"), dtype=llm["dtype"])
    parts = [(group, min(llm.get("tensor_parallel_size", 1), group.max_shards)) for group in kv.groups]
    blocks = [group.token_nbytes(kv.itemsize) * llm["block_size"] // shards for group, shards in parts]
    return {layout_of([nbytes]).frame_nbytes for nbytes in blocks}


def kv_frames_stored(cache: Cache) -> set[int]:
    """Bytes of the frames of KV in a cache."""
    with cache.server.shard.lock:
        rows = cache.server.shard.index.rows
        live = [row for row in sorted(rows.table.check_integrity()) if rows.state[row] == LIVE]
        return {RECORD.unpack_from(rows.records, row * RECORD.size)[1] for row in live if rows.kind[row] == Kind.KV}
