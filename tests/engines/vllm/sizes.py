"""Sizes of frames that `mmcache size` says for a model."""

from __future__ import annotations

import json
from pathlib import Path

from mmcache.frame import layout_of
from mmcache.size.fields import Fields
from mmcache.size.kv import kv_of
from tests.engines.vllm.harness import Settings, made


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
