"""What this SGLang process says of itself: the namespace and part of the pages in its host pool. Imports SGLang."""

from __future__ import annotations

import importlib
import os
from functools import cache
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
from mmcache_connectors.sglang.store import NO_LIMIT, Wait
from mmcache_connectors.sglang.weights import Contents, model_identity, process_start_s, weights_of


@cache
def _contents() -> Contents:
    """Of this process: files are read once, however often the backend is attached."""
    return Contents(process_start_s())


def describe_first(config: Any, pool: Any, identity: str, in_memory: bool) -> FirstPool:
    """Name the pages of SGLang's first host pool, given its HiCacheStorageConfig and the setting `model_identity`.

    `in_memory`: SGLang points to pages, by interface v1. Reads every byte of a local model unless `identity` is set.
    Raises ConfigError if it cannot tell which weights these are, or reach or cut the pages; ChangedFiles if the weights
    may not be those that were loaded, KeyInputError if a file it has to read cannot be.
    """
    contents = _contents()
    arguments = get_server_args()
    values = {
        name: (group, resolution_result(arguments, name)) for name, group in namespace_of(type(arguments)).items()
    }

    def value(name: str) -> Any:
        return values[name][1]

    facts.check_adapters(getattr(adapter, "lora_path", None) for adapter in value("lora_paths") or ())
    draft = value("speculative_draft_model_path")
    if draft is not None and not identity and not os.path.exists(draft):  # what a folder holds, the settings say
        draft = weights_of(draft, value("speculative_draft_model_revision"), value("download_dir"), contents)
    part, shard = _part(config, pool, arguments)
    named: dict[str, object] = {
        "engine": "sglang",
        "engine_version": sglang.__version__,
        "model": model_identity({name: held for name, (_, held) in values.items()}, identity, contents),
        "draft": draft,
        "shard": shard,
        "settings": facts.engine_settings(values, value("random_seed"), contents),
        **_form(pool),
    }
    parts = _parts(config, pool, part) if shard is None else [part]
    held = in_memory and getattr(pool, "kv_buffer", pool) is not None
    sizes = [nbytes // len(parts) for nbytes in _reachable(pool)] if held else None
    buffers = Namespace(kind="kv", block_size=pool.page_size, page="buffers", page_buffers=sizes, **named)
    flat = Namespace(kind="kv", block_size=pool.page_size, page="flat", **named)
    return FirstPool(pool, buffers, flat, part, parts)


def _reachable(pool: Any) -> list[int]:
    """`page_sizes`, or ConfigError."""
    try:
        return page_sizes(pool)
    except Exception as error:
        raise ConfigError(
            f"the pages of a {type(pool).__name__} with layout {pool.layout!r} cannot be reached ({error!r}); "
            "use --hicache-mem-layout page_first_direct"
        ) from error


def _parts(config: Any, pool: Any, part: Part) -> list[Part]:
    """What a page is stored in: as many pieces as SGLang says to cut it into. Raises ConfigError if it cannot."""
    if not config.should_split_heads:
        return [part]
    pieces = config.tp_lcm_size // config.tp_size
    try:
        return split_heads(part, pool.head_num, pieces)
    except ValueError as error:
        raise ConfigError(
            f'"tp_lcm_size": {config.tp_lcm_size} does not fit this model: {error}; give a multiple of every --tp-size '
            "that divides the model's kv heads"
        ) from None


def describe_further(config: Any, first: FirstPool, pool: Any, name: str) -> FurtherPool:
    """Name the pages of another host pool. Raises ValueError if they cannot be reached.

    Of these it is only known whether all tensor-parallel ranks hold the same, so what holds a share is shared by equal
    ranks of equal numbers of them alone.
    """
    same = config.is_mla_model and any(base.__name__ in facts.REPLICATED for base in type(pool).__mro__)
    divided = config.pp_size * config.attn_cp_size * config.dcp_size * (1 if same else config.tp_size)
    named: dict[str, object] = {key: held for key, held in first.buffers.facts.items() if key != "block_size"} | {
        "page": f"buffers of {name}",
        "shard": _ranks(config, tp=not same) if divided > 1 else None,
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


def check_start(backend: type) -> tuple[bool | None, Wait]:
    """Whether SGLang says which pages come before those it asks for, and how long it waits for them.

    None, and SGLang's defaults, of a backend that is attached later: nothing here says what it was attached with.

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
    waits = resolution_result(arguments, "hicache_storage_prefetch_policy") == "timeout"
    at_start = found is backend and not hooks.installed()
    base_s, per_ki_token_s = parsed[2:4] if at_start else (1.0, 0.25)
    return bool(parsed[4]) if at_start else None, Wait(base_s, per_ki_token_s) if waits else NO_LIMIT


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
    """The part this rank holds; where ranges of heads cannot say it, the whole, and a fact that says whose it is.

    Ranges of layers are not relied on: in every pipeline stage the pools of hybrid models count their own from 0 on.
    Source: SWAKVPool and HybridLinearKVPool of SGLang 0.5.23.
    """
    heads = 0 if config.is_mla_model else getattr(pool, "head_num", 0)
    total = heads
    if heads and config.tp_size > 1:
        total = ModelConfig.from_server_args(arguments).get_total_num_kv_heads()
    whole = config.pp_size == config.attn_cp_size == config.dcp_size == 1 and (config.is_mla_model or heads > 0)
    part = rank_part(heads, total, config.tp_rank, config.tp_size) if whole else None
    if part is not None:
        return part, None
    return Part(), _ranks(config, tp=not config.is_mla_model)


def _ranks(config: Any, *, tp: bool) -> str:
    """Which of how many processes this is, in every way SGLang divides the work; with `tp`, tensor parallelism too."""
    stages = [("pp", config.pp_rank, config.pp_size), ("cp", config.attn_cp_rank, config.attn_cp_size)]
    stages += [("dcp", config.dcp_rank, config.dcp_size)]
    stages += [("tp", config.tp_rank, config.tp_size)] if tp else []
    return " ".join(f"{name}{rank}/{size}" for name, rank, size in stages)
