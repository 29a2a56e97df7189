"""A plugin of SGLang-diffusion that counts: each pass of a text encoder is a line of the worker's output, with those of
mmcache's modules that are imported there."""

from __future__ import annotations

import sys
from typing import Any

STAGE = "sglang.multimodal_gen.runtime.pipelines_core.stages.text_encoding.TextEncodingStage"
LINE = "a text encoder ran"


def activate() -> None:
    """Called by SGLang in each of its processes."""
    from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry, HookType

    HookRegistry.register(f"{STAGE}._forward_text_encoder", ran, HookType.AFTER)


def ran(*args: Any, **kwargs: Any) -> None:
    """Say so."""
    print(LINE, *sorted(name for name in sys.modules if name.startswith("mmcache")), flush=True)
