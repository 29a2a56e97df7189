"""What this SGLang process says of itself: the namespace and part of the pages in its host pool. Imports SGLang."""

from __future__ import annotations

import importlib
from typing import Any

import sglang
from sglang.srt.arg_groups.arg_utils import namespace_of
from sglang.srt.arg_groups.overrides import resolution_result
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController
from sglang.srt.runtime_context import get_server_args

from mmcache.errors import ConfigError
from mmcache.keys import Namespace, Part
from mmcache_connectors.sglang import facts, hooks
from mmcache_connectors.sglang.pages import rank_part, split_heads
from mmcache_connectors.sglang.plugin import ATTACH
from mmcache_connectors.sglang.pools import FirstPool, FurtherPool, page_sizes
from mmcache_connectors.sglang.store import Wait
from mmcache_connectors.sglang.weights import Contents, model_identity, process_start_s


def describe_first(config: Any, pool: Any, identity: str) -> FirstPool:
    """Name the pages of SGLang's first host pool, given its HiCacheStorageConfig and the setting `model_identity`.

    Reads every byte of a local model unless `identity` is set. Raises ConfigError if it cannot tell which weights these
    are, ChangedFiles if they may not be those that were loaded, KeyInputError if a file it has to read cannot be.
    """
    contents = Contents(process_start_s())
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
        "model": model_identity({name: held for name, (_, held) in values.items()}, identity, contents),
        "shard": shard,
        "settings": facts.engine_settings(values, value("random_seed"), contents),
        **_form(pool),
    }
    buffers, flat = (
        Namespace(kind="kv", block_size=pool.page_size, page=page, **named) for page in ("buffers", "flat")
    )
    pieces = config.tp_lcm_size // config.tp_size if config.should_split_heads and shard is None else 1
    return FirstPool(pool, buffers, flat, part, split_heads(part, pool.head_num, pieces) if pieces > 1 else [part])


def describe_further(config: Any, first: FirstPool, pool: Any, name: str) -> FurtherPool:
    """Name the pages of another host pool. Raises ValueError if they cannot be reached.

    Of these it is only known whether all tensor-parallel ranks hold the same, so what holds a share is shared by equal
    ranks of equal numbers of them alone.
    """
    same = config.is_mla_model and any(base.__name__ in facts.REPLICATED for base in type(pool).__mro__)
    named: dict[str, object] = {key: held for key, held in first.buffers.facts.items() if key != "block_size"} | {
        "page": f"buffers of {name}",
        "shard": _ranks(config, tp=not same) if config.tp_size * config.pp_size * config.attn_cp_size > 1 else None,
        "page_buffers": page_sizes(pool),
        **_form(pool),
    }
    return FurtherPool(pool, Namespace(kind="kv", block_size=first.buffers.block_size, **named))


def _form(pool: Any) -> dict[str, object]:
    """What of a pool's memory decides what bytes mean."""
    return {
        "dtype": str(pool.dtype).removeprefix("torch."),
        "layout": pool.layout,
        "pool": type(pool).__name__,
        "pool_format": pool.storage_format_tag,
        "pool_layers": getattr(pool, "layer_num", None) or getattr(pool, "num_mamba_layers", None),
        "pool_state_dtype": str(getattr(pool, "temporal_dtype", "")).removeprefix("torch."),
        "pool_page_size": pool.page_size,
        "head_dim": getattr(pool, "head_dim", None),
        "v_head_dim": getattr(pool, "v_head_dim", None),
    }


def check_start(backend: type) -> tuple[bool, Wait]:
    """Whether SGLang was started to say which pages come before those it asks for, and how long it waits for them.

    Raises ConfigError if this process was started neither with `backend` nor with the hooks: attached later, over HTTP,
    it would not know whether weights were replaced before, nor have identified the media whose pages SGLang already
    holds. What is attached later is no argument of `get_server_args`.
    """
    arguments = get_server_args()
    name = resolution_result(arguments, "hicache_storage_backend")
    settings = resolution_result(arguments, "hicache_storage_backend_extra_config")
    parsed = HybridCacheController.parse_storage_backend_extra_config(settings)
    found: Any = None
    if name == "dynamic" and "module_path" in parsed[0]:
        found = getattr(importlib.import_module(parsed[0]["module_path"]), parsed[0].get("class_name", ""), None)
    if found is not backend and not hooks.installed():
        raise ConfigError(
            "mmcache cannot be attached to this running engine, as it has to see every change of weights and all media "
            f"from the start: start SGLang with {ATTACH}=1 in its environment, or with "
            "--hicache-storage-backend dynamic and its extra config"
        )
    return (bool(parsed[4]), Wait(parsed[2], parsed[3])) if found is backend else (False, Wait())


def untold_media() -> str | None:
    """Why this model's media cannot be told apart in its pages; None if they can."""
    names = ModelConfig.from_server_args(get_server_args()).hf_config.architectures or ()
    for name in names:
        if name in facts.ONE_NUMBER:
            return f"{name} puts one number of 62 bits in place of a whole picture, too few to tell pictures by"
    return None


def media_transport() -> str | None:
    """How SGLang brings features to the scheduler: "cpu", "cuda_ipc", "cuda_vmm"."""
    found: str | None = resolution_result(get_server_args(), "mm_feature_transport")
    return found


def _part(config: Any, pool: Any, arguments: Any) -> tuple[Part, str | None]:
    """The part this rank holds; where ranges cannot say it, the whole, and a fact that says whose it is.

    Of pipeline stages they cannot: the pools of hybrid models count their own layers from 0 on in every stage. Source:
    SWAKVPool and HybridLinearKVPool of SGLang 0.5.23.
    """
    heads = 0 if config.is_mla_model else getattr(pool, "head_num", 0)
    layers, heads_total = pool.end_layer, heads
    if config.tp_size > 1:
        model = ModelConfig.from_server_args(arguments)
        layers, heads_total = model.num_hidden_layers, heads and model.get_total_num_kv_heads()
    here = (pool.start_layer, pool.end_layer)
    whole = config.pp_size == config.attn_cp_size == config.dcp_size == 1 and (config.is_mla_model or heads > 0)
    part = rank_part(here, layers, heads, heads_total, config.tp_rank, config.tp_size) if whole else None
    if part is not None:
        return part, None
    return Part(), _ranks(config, tp=not config.is_mla_model)


def _ranks(config: Any, *, tp: bool) -> str:
    """Which of how many processes this is, in every way SGLang divides the work; with `tp`, tensor parallelism too."""
    stages = [("pp", config.pp_rank, config.pp_size), ("cp", config.attn_cp_rank, config.attn_cp_size)]
    stages += [("dcp", config.dcp_rank, config.dcp_size)]
    stages += [("tp", config.tp_rank, config.tp_size)] if tp else []
    return " ".join(f"{name}{rank}/{size}" for name, rank, size in stages)
