"""What SGLang-diffusion's plugin loader calls in each of its processes (group `sglang.multimodal_gen.plugins`).

Installed with mmcache, so it runs in engines that never asked for it: there it reads the environment and does no more.
Imports nothing until a setting is found.
"""

from __future__ import annotations

import os
from typing import Final

PREFIX: Final = "MMCACHE_SGLANG_CONDITIONING_"
_RUNTIME: Final = "sglang.multimodal_gen.runtime"
WORKER: Final = f"{_RUNTIME}.managers.gpu_worker.GPUWorker.init_device_and_model"
CACHE: Final = f"{_RUNTIME}.cache.conditioning.ConditioningCache.run"
_done: list[bool] = []


def activate() -> None:
    """Have the embeddings of prompts kept in mmcache, if any variable of the environment begins with PREFIX.

    May be called again. Settings are looked at in the worker, where an error ends the start; SGLang only logs those of
    a plugin. Source: `load_plugins` and `HookRegistry` of SGLang 0.5.23.
    """
    if _done or not any(name.startswith(PREFIX) for name in os.environ):
        return
    from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry, HookType

    from mmcache_connectors.sglang import conditioning

    HookRegistry.register(WORKER, conditioning.loaded, HookType.AFTER)
    HookRegistry.register(CACHE, conditioning.around_run, HookType.AROUND)
    _done.append(True)
