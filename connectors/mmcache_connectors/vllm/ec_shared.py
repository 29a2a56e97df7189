"""Names of a vLLM engine's pictures that other kinds of engines use too (shared_embeddings.py), where it may.

It may if all its settings are vLLM's own, but for those that change rounding or nothing of a picture's embedding: what
is not known here ends the sharing, and the log says why. Imports vLLM.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from typing import Any, Final

import torch

from mmcache_connectors.shared_embeddings import Normalisation, Tower, shared_facts, shared_item, why_not
from mmcache_connectors.vllm.ec_facts import EncoderFacts
from mmcache_connectors.vllm.items import REMEMBERED
from mmcache_connectors.vllm.lookup import Namespaces

log = logging.getLogger("mmcache.vllm")

# Facts (facts.py) that begin so: which kernels run and where, and the configuration that is in the model's folder.
FREE: Final = (
    "attention_config.", "compilation_config.", "device", "environment.", "kernel_config.",
    "model_config.dtype", "model_config.enforce_eager", "model_config.hf_config", "model_config.hf_text_config",
    "model_config.multimodal_config.media_io_kwargs", "model_config.multimodal_config.mm_encoder_attn_backend",
    "model_config.multimodal_config.mm_encoder_tp_mode", "model_config.multimodal_config.mm_processor_kwargs",
    "model_config.multimodal_config.video_pruning_method", "model_config.trust_remote_code",
    "model_config.word_embeddings_untied_by_checkpoint", "optimization_level", "parallel_config.", "performance_mode",
    "load_config.device", "load_config.pt_load_map_location", "load_config.safetensors_load_strategy", "torch_version",
    "vllm_version",
)  # fmt: skip
# Every other fact, and what it must be: as vLLM 0.32.0 has it by itself.
PLAIN: Final[Mapping[str, tuple[str, ...]]] = {
    "additional_config": ('{"map": {}}',),
    "load_config.ignore_patterns": ('["original/**/*"]',),
    "load_config.load_format": ("auto", "hf", "safetensors"),
    "load_config.model_loader_extra_config": ('{"map": {}}',),
    "model_config.code_revision": ("null",),
    "model_config.config_format": ("auto", "hf"),
    "model_config.convert": ("auto", "none"),
    "model_config.is_submodel_config": ("false",),
    "model_config.model_class_overrides": ('{"map": {}}',),
    "model_config.model_impl": ("auto", "vllm"),
    "model_config.multimodal_config.mm_device_do_normalize": ("true",),  # else its features are rounded before
    "model_config.multimodal_config.mm_encoder_attn_dtype": ("null",),
    "model_config.multimodal_config.mm_encoder_fp8_scale_path": ("null",),
    "model_config.multimodal_config.video_pruning_rate": ("null",),  # pictures get further columns with it
    "model_config.quantization": ("null",),
    "model_config.quantization_config": ("null",),
    "model_config.runner": ("auto", "generate"),
    "parallel_config.worker_extension_cls": ('""',),
}


class SharedNames:
    """Of one engine. Thread-safe."""

    def __init__(self, vllm_config: Any, facts: EncoderFacts) -> None:
        self._model, self._facts = vllm_config.model_config, facts
        self._norm: Normalisation | None = None
        self._known: dict[bytes, bytes | None] = {}
        reason = unshared(vllm_config, facts.settings_facts, adapters=facts.adapters_count)
        if reason is None:
            self._norm, reason = _normalisation(vllm_config.model_config)
        if reason is not None:
            log.warning("mmcache: shared_embeddings: nothing is shared with other kinds of engines: %s", reason)
        self.namespaces = Namespaces(self._get, kind="embedding")

    def _get(self) -> Mapping[str, object] | None:
        facts = self._facts.get()
        if facts is None or self._norm is None:
            return None
        narrower = {name: str(text) for name, text in facts.items() if name.startswith(("user.", "weights_epoch"))}
        device = str(facts["device"]).split()[0]
        architecture = self._model.architecture
        return shared_facts(Tower(architecture, str(facts["model"]), str(facts["dtype"]), device, narrower))

    def item(self, feature: Any, own: bytes) -> bytes | None:
        """Which picture an item is; None for what has no shared name. Costs a hash of the pixels the first time that an
        item comes whose own digest is `own`."""
        with contextlib.suppress(KeyError):
            return self._known[own]
        picture = self._picture(feature)
        if len(self._known) >= REMEMBERED:
            self._known.clear()
        self._known[own] = picture
        return picture

    def _picture(self, feature: Any) -> bytes | None:
        fields = {name: element.data for name, element in (feature.data or {}).items()}
        if self._norm is None or feature.modality != "image" or fields.keys() != {"pixel_values", "image_grid_thw"}:
            return None
        pixels, grid = fields["pixel_values"], fields["image_grid_thw"]
        if not (isinstance(pixels, torch.Tensor) and isinstance(grid, torch.Tensor)) or grid.numel() != 3:
            return None
        if pixels.dtype is not torch.uint8:  # what the tower is to normalise
            return None
        return shared_item(pixels, grid.reshape(-1).tolist(), self._norm)


def unshared(vllm_config: Any, facts: Mapping[str, str], *, adapters: bool) -> str | None:
    """Why this engine's embeddings may be others than what engines make of the model's folder; None if they are those.

    `facts` are `config_facts` and `vllm_version`; `adapters`: whether they change the encoder.
    """
    model = vllm_config.model_config
    reason = why_not("vllm", facts["vllm_version"], model.architecture)
    if reason is not None:
        return reason
    if adapters:
        return "adapters change the encoder (enable_tower_connector_lora)"
    if model.hf_overrides or model.hf_config_path:
        return "the model's configuration is not its folder's (hf_overrides, hf_config_path)"
    for name, text in facts.items():
        if name in PLAIN:
            if text not in PLAIN[name]:
                return f"{name} is {text}"
        elif not name.startswith(FREE):
            return f"{name} is not known to mmcache"
    return None


def _normalisation(model: Any) -> tuple[Normalisation | None, str | None]:
    """What the tower does to a picture's bytes, or why there is nothing to share."""
    from vllm.model_executor.layers.fusion.mm_input_norm import _load_norm_params

    try:
        params = _load_norm_params(model)
    except Exception as error:  # vLLM's own code, over a file of anybody's
        return None, f"vLLM cannot say how it normalises pictures ({error})"
    if params.is_identity:
        return None, (
            "vLLM shows its tower pixels that are not normalised, as the model's preprocessor_config.json names no "
            "image_mean and image_std; add them"
        )
    return Normalisation.of(params.image_mean, params.image_std, params.rescale_factor), None
