"""SGLang's storage classes and pools in this process, without an engine around them: what they are told of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.engines.sglang.harness import BACKEND
from tests.engines.sglang.models import write_text_model


def start(url: str, layout: str, page: int, folder: Path) -> dict[str, Any]:
    """Tell SGLang of an engine that was started with mmcache, its model in `folder`; returns mmcache's settings."""
    from sglang.srt.mem_cache.pool_host import base
    from sglang.srt.runtime_context import publish
    from sglang.srt.server_args import ServerArgs

    base.HICACHE_HOST_MEMORY_RESERVE_BYTES = 0
    write_text_model(folder)
    settings = {"url": url, "model_identity": "tiny@1", "deadline_s": 5.0}
    arguments = ServerArgs(
        model_path=str(folder),
        device="cpu",
        attention_backend="torch_native",
        page_size=page,
        enable_hierarchical_cache=True,
        hicache_storage_backend="dynamic",
        hicache_storage_backend_extra_config=json.dumps(BACKEND | settings),
        hicache_mem_layout=layout,
        hicache_io_backend="direct",
    )
    arguments.resolve_once()
    publish(arguments, role="scheduler")
    return settings


def config(extra: dict[str, Any], **changes: Any) -> Any:
    """What SGLang tells a backend of the process it is made in: the only one, but for `changes`."""
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig

    alone: dict[str, Any] = {
        **dict.fromkeys(("tp_size", "pp_size", "attn_cp_size"), 1),
        **dict.fromkeys(("tp_rank", "pp_rank", "attn_cp_rank"), 0),
        **dict.fromkeys(("is_mla_model", "enable_storage_metrics", "is_page_first_layout"), False),
        "model_name": "tiny",
    }
    return HiCacheStorageConfig(extra_config=extra, **alone | changes)


def heads_pool(tokens: int, page: int, layout: str, **shape: int) -> Any:
    """SGLang's host pool of keys and values; `shape` is head_num, head_dim, layer_num, in bfloat16."""
    import torch
    from sglang.srt.mem_cache.hybrid_cache.hybrid_pool_assembler import _mha_host_inputs
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    more: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cpu", "enable_memory_saver": False}
    device = MHATokenToKVPool(size=2 * page, page_size=page, **shape, **more)
    kind, info, rest = _mha_host_inputs(device)
    return kind(info, 1.0, 0, page, layout, host_token_capacity=tokens, **rest)
