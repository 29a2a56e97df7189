"""The namespace of an engine's pages: everything but the tokens that decides their bytes. Reads SGLang's configuration.

SGLang's arguments come in groups (`sglang.srt.arg_groups`). A group not named here is in whole, so is a new one; of a
group that is out, what is named is in, and the other way round. What is out names addresses, sizes of pools, order of
work, what is reported: nothing a page's bytes depend on. A page's place and part are not here (pages.py).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from mmcache.errors import ConfigError
from mmcache_connectors.sglang.weights import Contents

# Group: the arguments in it that are in, though the group is out.
OUT_BUT: Final[Mapping[str, frozenset[str]]] = {
    "device": frozenset({"device"}),
    "disagg": frozenset(),
    "exec.graph": frozenset(),
    "memory": frozenset({"enable_hisparse", "hisparse_config"}),
    "mm": frozenset({"enable_multimodal", "mm_attention_backend"}),  # the rest ends in the features, which are hashed
    "observability": frozenset({"debug_tensor_dump_input_file", "forward_hooks"}),
    "parallel": frozenset(
        {
            "attn_cp_size",
            "cp_strategy",
            "dcp_replicate_q_proj",
            "dcp_size",
            "dwdp_size",
            "enable_cp_decode_attn_tp",
            "enable_dsa_cache_layer_split",
            "enable_kv_cache_sharding",
            "enable_prefill_cp",
        }
    ),
    "schedule": frozenset({"c128_page_size", "swa_prefix_tails"}),
    "serving": frozenset(),
}
# Group: the arguments in it that are out, though the group is in.
IN_BUT: Final[Mapping[str, frozenset[str]]] = {
    "exec.offload": frozenset({"ple_offload_dir"}),  # written to
    "model": frozenset(
        {
            "checkpoint_engine_wait_weights_before_ready",
            "delete_ckpt_after_loading",
            "download_dir",
            "engine_info_bootstrap_port",
            "model_path",  # its contents are the fact `model`
            "modelopt_checkpoint_save_path",  # written to
            "modelopt_export_path",  # written to
            "remote_instance_weight_loader_backend",
            "remote_instance_weight_loader_seed_instance_ip",
            "remote_instance_weight_loader_seed_instance_service_port",
            "remote_instance_weight_loader_send_weights_group_ports",
            "remote_instance_weight_loader_start_seed_via_transfer_engine",
            "revision",  # in `model` too
            "startup_weight_load_mode",
            "weight_cache_mode",
            "weight_cache_socket",
            "weight_cache_timeout",
            "weight_loader_disable_mmap",
            "weight_loader_drop_cache_after_load",
            "weight_loader_prefetch_checkpoints",
            "weight_loader_prefetch_num_threads",
        }
    ),
    "spec": frozenset({"spec_trace_dir"}),
}
_ADDRESS: Final = re.compile(r" at 0x[0-9a-fA-F]+")


def counts(group: str, name: str) -> bool:
    """Whether an argument of SGLang is part of the namespace."""
    return name in OUT_BUT[group] if group in OUT_BUT else name not in IN_BUT.get(group, ())


def engine_settings(
    values: Mapping[str, tuple[str, Any]], random_seed: int | None, contents: Contents
) -> dict[str, object]:
    """Arguments (name: group, value) that are part of the namespace, in plain values; a path becomes what it holds.

    The seed counts where it makes the weights. Raises ConfigError for a value that cannot be told from others,
    KeyInputError if a file that is named cannot be read, ChangedFiles if it changed after it was loaded.
    """
    facts = {name: _plain(value, name, contents) for name, (group, value) in values.items() if counts(group, name)}
    if values.get("load_format", ("", None))[1] == "dummy":
        facts["random_seed"] = random_seed
    return facts


def _plain(value: Any, name: str, contents: Contents) -> object:
    if isinstance(value, str) and os.path.exists(value):
        return contents.digest(value)
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(held, f"{name}.{key}", contents) for key, held in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(held, name, contents) for held in value]
    if isinstance(value, (set, frozenset)):
        return sorted(_said(held, name) for held in value)
    fields = _field_names(value)
    if fields:
        return {field: _plain(getattr(value, field), f"{name}.{field}", contents) for field in fields}
    return _said(value, name)


def _said(value: object, name: str) -> str:
    text = repr(value)
    if _ADDRESS.search(text):
        raise ConfigError(
            f"the argument {name} is {text}, which is another text in each process, so nothing of it can be part of a "
            "page's name; give plain values, or leave it out"
        )
    return text


def _field_names(value: Any) -> tuple[str, ...]:
    return tuple(
        getattr(type(value), "__struct_fields__", None) or getattr(type(value), "__dataclass_fields__", None) or ()
    )


# Models that put one 62-bit number in place of all of an item's tokens, whatever its identity: two items of one number
# would be one. Source: `pad_input_ids` in models/llava.py, llavavid.py, mllama.py, moss_vl.py of SGLang 0.5.23.
ONE_NUMBER: Final = frozenset(
    {
        "LlavaForConditionalGeneration",
        "LlavaLlamaForCausalLM",
        "LlavaMistralForCausalLM",
        "LlavaQwenForCausalLM",
        "LlavaVidForCausalLM",
        "MllamaForConditionalGeneration",
        "MossVLForConditionalGeneration",
    }
)


# Host pools of which, in a model with MLA, every tensor-parallel rank holds the same. Source: pool_host/*.py and
# memory_pool_host.py of SGLang 0.5.23.
REPLICATED: Final = frozenset(
    {"DSAIndexerPoolHost", "DeepSeekV4PagedHostPool", "DeepSeekV4StateHostPool", "MLATokenToKVPoolHost"}
)


def check_adapters(paths: Iterable[str | None]) -> None:
    """Raises ConfigError for an adapter known by name: SGLang seeds its pages with name and path, not with contents."""
    for path in paths:
        if path is not None and not os.path.isdir(path):
            raise ConfigError(
                f"--lora-paths names {path!r}, which is no folder here, and other weights can come under one name; "
                "download the adapter and give its folder"
            )
