"""Names of pictures in SGLang's encoder that other kinds of engines use too (shared_embeddings.py), where it may.

It may if all arguments that could change an embedding are SGLang's own defaults, but for those that change rounding, or
end in the features. Knows SGLang's arguments by name; takes its objects as they come.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch

from mmcache_connectors.sglang.facts import IN_BUT
from mmcache_connectors.shared_embeddings import Normalisation, shared_item, why_not

# Groups of SGLang's arguments that change rounding, end in the features, or change nothing of a picture's embedding. In
# every other group each must be SGLang's default, but for those that are FREE.
FREE_GROUPS: Final = frozenset(
    (
        "device", "disagg", "exec.comm", "exec.deterministic", "exec.dllm", "exec.graph", "exec.kernel", "exec.mamba",
        "exec.moe", "exec.offload", "exec.overlap", "memory", "mm", "observability", "parallel", "processing",
        "schedule", "serving", "spec",
    )
)  # fmt: skip
FREE: Final = IN_BUT["model"] | {"context_length", "dtype", "kv_cache_dtype", "trust_remote_code"}
PLAIN: Final = ("enable_precise_embedding_interpolation", "enable_tf32_matmul")  # of the free groups
FORMATS: Final = ("auto", "safetensors")
NORMALISING: Final = ("do_rescale", "do_normalize", "rescale_factor", "image_mean", "image_std")


def unshared(
    version: str, architecture: str, quantized: bool, values: Mapping[str, tuple[str, Any]], own: Mapping[str, Any]
) -> str | None:
    """Why this encoder's embeddings may be others than what engines make of the model's folder; None if they are those.

    `values` are SGLang's arguments (name: group, value), `own` its defaults.
    """
    reason = why_not("sglang", version, architecture)
    if reason is not None:
        return reason
    if quantized:
        return "the model is quantised"
    for name, (group, value) in values.items():
        plain = (group not in FREE_GROUPS and name not in FREE) or name in PLAIN
        if name == "load_format" and value in FORMATS:
            continue
        if plain and value != own.get(name) and (own.get(name) is not None or value):
            return f"{name} is {value!r}"
    return None


def shared_picture(encoder: Any, items: list[Any]) -> bytes | None:
    """Which picture an item is that SGLang's model is shown as `items`; None for what has no shared name."""
    if len(items) != 1 or items[0].modality.name != "IMAGE" or items[0].precomputed_embeddings is not None:
        return None
    values, fields = items[0].feature, items[0].model_specific_data
    grid = fields.get("image_grid_thw")
    processor = encoder.preprocessor.image_processor
    norm = Normalisation.of_processor({name: getattr(processor, name, None) for name in NORMALISING})
    if norm is None or len(fields) != 1 or not (isinstance(values, torch.Tensor) and isinstance(grid, torch.Tensor)):
        return None
    if values.dtype is not torch.float32 or grid.numel() != 3:  # floats are what its tower takes as they are
        return None
    return shared_item(values, grid.reshape(-1).tolist(), norm)
