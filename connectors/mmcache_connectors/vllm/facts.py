"""What a vLLM engine IS, as facts of a KV namespace: its configuration, its environment, its kernels.

A KV block's bytes depend on all of them. config_fields.toml decides field by field; what is not known is in, as a
needless difference only costs a miss. Names and layouts of weights are not here (weights.py, the connector).
Source: vLLM 0.32.0 (vllm/config/, vllm/envs.py, vllm/v1/attention/backends/cpu_attn.py).
"""

from __future__ import annotations

import logging
import os
import platform
import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from mmcache_connectors.vllm.fields import ENVIRONMENT, Table, canonical_text, config_texts, read_table, text_or

log = logging.getLogger("mmcache.vllm")

_PREFIX: Final = "VLLM_"
# The addresses of a service that happens to be called vllm-something. Source: Kubernetes, "Environment variables".
_SERVICE: Final = re.compile(r"VLLM\w*_(SERVICE_(HOST|PORT\w*)|PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?)")


def config_facts(
    vllm_config: Any, environment: Mapping[str, str] = os.environ, table: Table | None = None
) -> dict[str, str]:
    """Every IN field of the engine's configuration and every VLLM_ variable set, as "place.field" -> text.

    The same in every start of the same engine, whatever process, hash seed or host name; about 140 facts. Fields the
    table does not list are in, with one warning that names them. A value without a canonical form (a lambda, a local
    path) becomes a random text, other at every call, with one warning: such an engine shares nothing with others, so
    call this in one process of it and tell the others. Raises nothing for any value.
    """
    table = read_table() if table is None else table
    strangers: list[str] = []
    unknowns: list[str] = []
    unknown = _random_text(unknowns)
    facts = config_texts(vllm_config, table, unlisted=strangers.append, unknown=unknown)
    facts |= _environment_facts(environment, table, unknown)
    if strangers:
        log.warning(
            "mmcache does not know these fields of vLLM's configuration: %s. They count as part of what a stored "
            "value is, so engines that differ in them share nothing; use the release of mmcache for this vLLM",
            ", ".join(sorted(set(strangers))),
        )
    if unknowns:
        log.warning(
            "mmcache cannot tell what these settings are: %s. This engine shares nothing with another one, nor "
            "with itself after a restart; set them to plain values",
            "; ".join(unknowns),
        )
    return facts


def _random_text(seen: list[str]) -> Callable[[str, str], str]:
    def unknown(place: str, why: str) -> str:
        seen.append(f"{place} ({why})")
        return f"unknown {secrets.token_hex(16)}"

    return unknown


def _environment_facts(
    environment: Mapping[str, str], table: Table, unknown: Callable[[str, str], str]
) -> dict[str, str]:
    out = table[ENVIRONMENT]
    names = [name for name in sorted(environment) if name.startswith(_PREFIX) and name not in out]
    names = [name for name in names if not _SERVICE.fullmatch(name)]
    return {f"{ENVIRONMENT}.{name}": text_or(unknown, environment[name], f"{ENVIRONMENT}.{name}") for name in names}


def worker_facts(vllm_config: Any, layer_names: Iterable[str]) -> dict[str, str]:
    """What only a worker knows, once its layers exist: kernels and versions. `layer_names`: those that hold KV.

    - `attention.<class>.<window>`: backend, KV dtype, head sizes, and on a CPU the instruction set, of each kind of
      layer: backends compute otherwise, and the instruction set orders the bytes inside a block.
    - `device`: the processor's architecture or the GPU's compute capability: other kernels run on others.
    - `vllm_version`, `torch_version` (major.minor): other releases hold other kernels.

    The same in every worker of an engine and after every start; a pipeline stage gives the kinds of its own layers, so
    the engine's facts are the union. What cannot be read is a random text, with one warning, as in `config_facts`.
    """
    import torch
    import vllm

    unknowns: list[str] = []
    unknown = _random_text(unknowns)
    layers = vllm_config.compilation_config.static_forward_context
    kinds: dict[str, set[str]] = {}
    for name in layer_names:
        kind, text = _layer_fact(vllm_config, name, layers.get(name), unknown)
        kinds.setdefault(kind, set()).add(text)
    facts = {f"attention.{kind}": "; ".join(sorted(texts)) for kind, texts in kinds.items()}
    facts["device"] = text_or(unknown, device_fact(), "device")
    facts["vllm_version"] = canonical_text(str(vllm.__version__))
    facts["torch_version"] = ".".join(torch.__version__.split(".")[:2])
    if unknowns:
        log.warning(
            "mmcache cannot tell what this engine's attention layers are: %s. It shares KV blocks with no other "
            "engine; use the release of mmcache for this vLLM",
            "; ".join(unknowns),
        )
    return facts


def _layer_fact(vllm_config: Any, name: str, layer: Any, unknown: Callable[[str, str], str]) -> tuple[str, str]:
    """("Attention.full", "backend=... ...") of one layer; ("unknown", random text) if it is not as expected."""
    try:
        backend = layer.get_attn_backend()
        window = getattr(layer, "sliding_window", None)
        facts = {
            "backend": f"{backend.__module__}.{backend.__qualname__}",
            "kv_cache_dtype": str(getattr(layer, "kv_cache_dtype", None)),
            "head_size": str(getattr(layer, "head_size", None)),
            "head_size_v": str(getattr(layer, "head_size_v", None)),
        }
        if backend.get_name() == "CPU_ATTN":
            facts["isa"] = _cpu_isa(vllm_config, layer)
        return f"{type(layer).__name__}.{window or 'full'}", " ".join(f"{key}={facts[key]}" for key in sorted(facts))
    except Exception as error:  # vLLM's own code, in another release: a miss, never a dead engine
        return "unknown", unknown(f"layer {name}", f"{type(error).__name__}: {error}")


def _cpu_isa(vllm_config: Any, layer: Any) -> str:
    """The instruction set CPUAttentionMetadataBuilder chooses for this layer (cpu_attn.py, `_get_attn_isa`)."""
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    spec = layer.get_kv_cache_spec(vllm_config)
    dtype = vllm_config.model_config.dtype
    return str(_get_attn_isa(dtype, spec.block_size, spec.head_size, vllm_config.cache_config.cache_dtype))


def device_fact() -> str:
    """ "cpu x86_64", "cuda 9.0": never one machine's or one card's own name."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return f"cpu {platform.machine().lower()}"
    capability = current_platform.get_device_capability()
    return f"{current_platform.device_type} {capability.as_version_str() if capability else 'without capability'}"
