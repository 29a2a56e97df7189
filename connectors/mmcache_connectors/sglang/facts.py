"""The namespace of an engine's pages: everything but the tokens that decides their bytes. Reads SGLang's configuration.

SGLang's arguments come in groups (`sglang.srt.arg_groups`). A group not named here is in whole, so is a new one; of a
group that is out, what is named is in, and the other way round. What is out names addresses, sizes of pools, order of
work, what is reported: nothing a page's bytes depend on. A page's place and part are not here (pages.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, Final

from mmcache.errors import ConfigError
from mmcache.identity import directory_digest, file_digest

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
    "model": frozenset(
        {
            "checkpoint_engine_wait_weights_before_ready",
            "delete_ckpt_after_loading",
            "download_dir",
            "engine_info_bootstrap_port",
            "model_path",  # its contents are the fact `model`
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


def counts(group: str, name: str) -> bool:
    """Whether an argument of SGLang is part of the namespace."""
    return name in OUT_BUT[group] if group in OUT_BUT else name not in IN_BUT.get(group, ())


def engine_settings(values: Mapping[str, tuple[str, Any]], random_seed: int | None) -> dict[str, object]:
    """Arguments (name: group, value) that are part of the namespace, in plain values; a path becomes what it holds.

    The seed counts where it makes the weights. Raises KeyInputError if a file that is named cannot be read.
    """
    facts = {name: _plain(value) for name, (group, value) in values.items() if counts(group, name)}
    if values.get("load_format", ("", None))[1] == "dummy":
        facts["random_seed"] = random_seed
    return facts


def _plain(value: Any) -> object:
    if isinstance(value, str) and os.sep in value and os.path.exists(value):
        return directory_digest(value) if os.path.isdir(value) else file_digest(value)
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    if isinstance(value, Mapping):
        return {str(name): _plain(held) for name, held in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(held) for held in value]
    if isinstance(value, (set, frozenset)):
        return sorted(repr(held) for held in value)
    names = _field_names(value)
    return {name: _plain(getattr(value, name)) for name in names} if names else repr(value)


def _field_names(value: Any) -> tuple[str, ...]:
    return tuple(
        getattr(type(value), "__struct_fields__", None) or getattr(type(value), "__dataclass_fields__", None) or ()
    )


def check_adapters(paths: Iterable[str | None]) -> None:
    """Raises ConfigError for an adapter known by name: SGLang seeds its pages with name and path, not with contents."""
    for path in paths:
        if path is not None and not os.path.isdir(path):
            raise ConfigError(
                f"--lora-paths names {path!r}, which is no folder here, and other weights can come under one name; "
                "download the adapter and give its folder"
            )


def model_identity(path: str, revision: str | None, given: str) -> str:
    """Which weights: `given` if set, else a digest of the folder, else repository and commit as downloaded here.

    Reads every byte of a folder. Raises ConfigError if a repository's commit cannot be told.
    """
    if given:
        return given
    if os.path.isdir(path):
        return directory_digest(path)
    from huggingface_hub import try_to_load_from_cache  # what SGLang itself downloads with

    file = try_to_load_from_cache(path, "config.json", revision=revision)
    if isinstance(file, str):
        return f"{path}@{os.path.basename(os.path.dirname(file))}"
    raise ConfigError(
        f'cannot tell which weights {path!r} stands for; give "model_identity" in the extra config: any text that '
        "changes when they do, such as repository@commit"
    )
