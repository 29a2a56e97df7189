"""SGLang's encoder server on a machine without a GPU: `python encoder_driver.py ARGUMENTS OF sglang.launch_server`.

Its global cache copies from a GPU into page-locked memory; here the same code gets ordinary memory and copies at once.
Each pass of the encoder is a line in the log; SIGUSR1 has another say which modules of mmcache are imported. SGLang's
own processes import this module too.
"""

from __future__ import annotations

import json
import runpy
import signal
import sys
from typing import Any

import torch
from sglang.srt.disaggregation.encoder.server import MMEncoder
from sglang.srt.mem_cache.embedding_cache_controller import AsyncCopyHandle, EmbeddingCacheController


class OnGPU(torch.Tensor):  # type: ignore[misc]
    """A tensor that says it lies on a GPU, where the pool's copies have to begin."""

    device = property(lambda self: torch.device("cuda"))


class AtOnce:
    """A stream whose work is done."""

    def synchronize(self) -> None:
        """Nothing is left to wait for."""


def copy_now(self: Any, tensor: Any, entry: Any, pool: Any) -> AsyncCopyHandle:
    """The pool's copy, done when it returns."""
    source = tensor.detach().as_subclass(torch.Tensor).contiguous()
    self._copy_embedding_page_runs(src=source, dst=pool.tensor, entry=entry, pool=pool, src_is_pool=False)
    return AsyncCopyHandle(event=None, entry_hash=entry.hash)


def install() -> None:
    """Put the twins in the GPU's place, and count passes."""
    empty, store = torch.empty, EmbeddingCacheController.store_to_pool_async
    encode = MMEncoder._encode_missing

    def ordinary(*sizes: Any, pin_memory: bool = False, **more: Any) -> torch.Tensor:
        return empty(*sizes, **more)

    def store_from_gpu(self: Any, hashes: Any, tensors: Any, modality: Any = None) -> Any:
        return store(self, hashes, [tensor.as_subclass(OnGPU) for tensor in tensors], modality)

    def counted(self: Any, feature: Any, result: Any, indices: Any, *more: Any, **named: Any) -> Any:
        print(f"encoder pass over {len(indices)} items", flush=True)
        return encode(self, feature, result, indices, *more, **named)

    def say_modules(*_: Any) -> None:
        print("modules of mmcache:" + json.dumps(sorted(name for name in sys.modules if "mmcache" in name)), flush=True)

    signal.signal(signal.SIGUSR1, say_modules)
    torch.empty = ordinary
    torch.cuda.current_stream = lambda device=None: AtOnce()
    EmbeddingCacheController.store_to_pool_async = store_from_gpu
    EmbeddingCacheController._copy_tensor_to_pool = copy_now
    MMEncoder._encode_missing = counted


install()
if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=False)
