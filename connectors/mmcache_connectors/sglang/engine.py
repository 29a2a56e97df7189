"""What this SGLang process says of itself: the namespace and part of the pages in its host pool. Imports SGLang."""

from __future__ import annotations

from typing import Any, NamedTuple

import sglang
from sglang.srt.arg_groups.arg_utils import namespace_of
from sglang.srt.arg_groups.overrides import resolution_result
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController
from sglang.srt.runtime_context import get_server_args

from mmcache.keys import Namespace, Part
from mmcache_connectors.sglang import facts
from mmcache_connectors.sglang.pages import rank_part


class Pages(NamedTuple):
    """How pages are named here. SGLang's two interfaces hand over one page as other tensors, so they share nothing."""

    buffers: Namespace
    flat: Namespace
    part: Part


def describe_pages(config: Any, pool: Any, model_identity: str) -> Pages:
    """Name the pages of a HostKVCache, given SGLang's HiCacheStorageConfig and the setting of that name.

    Reads every byte of a model folder unless `model_identity` is set. Raises ConfigError if it cannot tell which
    weights these are, KeyInputError if a file it has to read cannot be.
    """
    arguments = get_server_args()
    values = {
        name: (group, resolution_result(arguments, name)) for name, group in namespace_of(type(arguments)).items()
    }

    def value(name: str) -> Any:
        return values[name][1]

    facts.check_adapters(getattr(adapter, "lora_path", None) for adapter in value("lora_paths") or ())
    part, shard = _part(config, pool, arguments)
    named: dict[str, object] = {
        "engine": "sglang",
        "engine_version": sglang.__version__,
        "model": facts.model_identity(value("model_path"), value("revision"), model_identity),
        "dtype": str(pool.dtype).removeprefix("torch."),
        "layout": pool.layout,
        "pool": type(pool).__name__,
        "pool_format": pool.storage_format_tag,
        "pool_layers": pool.layer_num,
        "head_dim": getattr(pool, "head_dim", None),
        "v_head_dim": getattr(pool, "v_head_dim", None),
        "shard": shard,
        "settings": facts.engine_settings(values, value("random_seed")),
    }
    buffers, flat = (
        Namespace(kind="kv", block_size=pool.page_size, page=page, **named) for page in ("buffers", "flat")
    )
    return Pages(buffers, flat, part)


def passes_prefix() -> bool:
    """Whether SGLang was started to say which pages come before those it asks for."""
    settings = resolution_result(get_server_args(), "hicache_storage_backend_extra_config")
    return bool(HybridCacheController.parse_storage_backend_extra_config(settings)[-1])


def _part(config: Any, pool: Any, arguments: Any) -> tuple[Part, str | None]:
    """The part this rank holds; where ranges cannot say it, the whole, and a fact that says whose it is."""
    heads = 0 if config.is_mla_model else getattr(pool, "head_num", 0)
    layers, heads_total = pool.end_layer, heads
    if config.tp_size > 1 or config.pp_size > 1:
        model = ModelConfig.from_server_args(arguments)
        layers, heads_total = model.num_hidden_layers, heads and model.get_total_num_kv_heads()
    here = (pool.start_layer, pool.end_layer)
    whole = config.attn_cp_size == config.dcp_size == 1 and (config.is_mla_model or heads > 0)
    part = rank_part(here, layers, heads, heads_total, config.tp_rank, config.tp_size) if whole else None
    if part is not None:
        return part, None
    ranks = ("tp", config.tp_rank, config.tp_size), ("cp", config.attn_cp_rank, config.attn_cp_size)
    stages = ("pp", config.pp_rank, config.pp_size), ("dcp", config.dcp_rank, config.dcp_size)
    return Part(), " ".join(f"{name}{rank}/{size}" for name, rank, size in (*ranks, *stages))
