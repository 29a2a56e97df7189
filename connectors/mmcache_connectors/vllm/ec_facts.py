"""What an encoder IS, as facts of an embedding namespace, and what form its output has.

Engines that differ only in their language model's memory, schedule or role share embeddings: encoder_fields.toml.
Source: vLLM 0.32.0 (config/, v1/worker/gpu_model_runner.py, lora/model_manager.py).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Final

from mmcache_connectors.vllm.ec_items import Form
from mmcache_connectors.vllm.facts import config_facts, device_fact
from mmcache_connectors.vllm.fields import read_encoder_table
from mmcache_connectors.vllm.identities import shared_identities
from mmcache_connectors.vllm.settings import EncoderSettings

log = logging.getLogger("mmcache.vllm")
START_WAIT_S: Final = 2.0  # for the weights' digest; a larger model's is ready later, and nothing is cached until then


class EncoderFacts:
    """Everything but content that decides an embedding's bytes. Complete once the weights have a digest."""

    def __init__(self, vllm_config: Any, settings: EncoderSettings) -> None:
        self._config = vllm_config
        lora = vllm_config.lora_config
        self.adapters_count = lora is not None and bool(lora.enable_tower_connector_lora)
        self._dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
        self.settings_facts = _facts(vllm_config, with_lora=self.adapters_count)
        self._facts = {"engine": "vllm", "dtype": self._dtype, **self.settings_facts}
        self._facts |= {f"user.{name}": text for name, text in settings.extra_facts.items()}
        self._named_epoch = settings.weights_epoch
        self._shared = shared_identities(vllm_config)
        self._weights = self._shared.weights(vllm_config, settings.model_identity)
        self._weights.ready(START_WAIT_S)
        self._said_why = False

    @property
    def epoch(self) -> str:
        """Names in-place updates of the weights; '' for none."""
        return self._named_epoch or self._shared.epoch

    def get(self) -> Mapping[str, object] | None:
        """The facts, or None, with the reason logged once, while they are not complete."""
        weights = self._weights.ready(0.0)
        if weights is None:
            if not self._said_why:
                self._said_why = True
                why = self._weights.error or "the model's files are still being read"
                log.warning("mmcache: no embedding is cached yet: %s", why)
            return None
        epoch = self.epoch
        return {**self._facts, "model": weights} | ({"weights_epoch": epoch} if epoch else {})

    def form(self, modality: str, rows: int) -> Form:
        """Of an item with so many embeddings. A producer's engine has measured the width; another's is reckoned."""
        widths = self._config.ec_transfer_config.mm_encoder_output_widths
        return Form(rows, widths.get(modality) or _reckoned_width(self._config), self._dtype, modality in widths)


def _facts(vllm_config: Any, *, with_lora: bool) -> dict[str, str]:
    import torch
    import vllm

    table = read_encoder_table()
    if with_lora:
        table["VllmConfig"]["lora_config"] = "in: adapters change the encoder's output"
    facts = config_facts(vllm_config, table=table)
    device = device_fact()
    if device.startswith("cpu"):
        device += f" {torch.backends.cpu.get_cpu_capability()}"  # the instructions its kernels are chosen by
    versions = {"vllm_version": str(vllm.__version__), "torch_version": ".".join(torch.__version__.split(".")[:2])}
    return facts | {"device": device, **versions}


def _reckoned_width(vllm_config: Any) -> int:
    """An embedding as wide as the language model's, once more for each level that DeepStack adds to its columns."""
    vision = getattr(vllm_config.model_config.hf_config, "vision_config", None)
    levels = getattr(vision, "deepstack_visual_indexes", None) or ()
    return int(vllm_config.model_config.get_inputs_embeds_size()) * (1 + len(levels))
