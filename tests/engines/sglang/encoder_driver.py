"""SGLang's encoder server on a machine without a GPU: `python encoder_driver.py ARGUMENTS OF sglang.launch_server`.

Its global cache copies from a GPU into page-locked memory; here the same code gets ordinary memory and copies at once.
ENCODER_POOL_NBYTES makes its host memory so small, in pages of ENCODER_PAGE_NBYTES. In the log each pass of the encoder
has a line, each lookup its names, and, after SIGUSR1, the modules of mmcache that are imported. SGLang's own processes
import this module too.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
from typing import Any

import torch
from sglang.srt.disaggregation.encoder.server import MMEncoder
from sglang.srt.mem_cache import embedding_cache_controller
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


def stand_in_for_the_gpu() -> None:
    """Put the twins in the GPU's place."""
    empty, store = torch.empty, EmbeddingCacheController.store_to_pool_async

    def ordinary(*sizes: Any, pin_memory: bool = False, **more: Any) -> torch.Tensor:
        return empty(*sizes, **more)

    def store_from_gpu(self: Any, hashes: Any, tensors: Any, modality: Any = None) -> Any:
        return store(self, hashes, [tensor.as_subclass(OnGPU) for tensor in tensors], modality)

    torch.empty = ordinary
    torch.cuda.current_stream = lambda device=None: AtOnce()
    EmbeddingCacheController.store_to_pool_async = store_from_gpu
    EmbeddingCacheController._copy_tensor_to_pool = copy_now


def shrink_pools() -> None:
    """Make the host memory as small as the environment says."""
    if "ENCODER_POOL_NBYTES" not in os.environ:
        return
    create = EmbeddingCacheController._create_pools

    def create_small(self: Any, pin_memory: bool) -> Any:
        self.total_pool_size_bytes = int(os.environ["ENCODER_POOL_NBYTES"])
        return create(self, pin_memory)

    embedding_cache_controller.TARGET_PAGE_BYTES = int(os.environ["ENCODER_PAGE_NBYTES"])
    EmbeddingCacheController._create_pools = create_small


def say_what_happens() -> None:
    """Have it in the log."""
    encode, look_up = MMEncoder._encode_missing, EmbeddingCacheController.batch_is_exist

    def say_pass(self: Any, feature: Any, result: Any, indices: Any, *more: Any, **named: Any) -> Any:
        print(f"encoder pass over {len(indices)} items", flush=True)
        return encode(self, feature, result, indices, *more, **named)

    async def say_names(self: Any, names: Any) -> Any:
        print(f"names asked for: {' '.join(names)}", flush=True)
        return await look_up(self, names)

    def say_modules(*_: Any) -> None:
        print("modules of mmcache:" + json.dumps(sorted(name for name in sys.modules if "mmcache" in name)), flush=True)

    MMEncoder._encode_missing = say_pass
    EmbeddingCacheController.batch_is_exist = say_names
    signal.signal(signal.SIGUSR1, say_modules)


stand_in_for_the_gpu()
shrink_pools()
say_what_happens()
if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=False)
