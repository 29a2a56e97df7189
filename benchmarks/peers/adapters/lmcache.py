"""LMCache: its CPU backend in the process, its lm:// server, and its native client for Redis.

The first two go the way an engine does: allocate a memory object, copy in, put; get, copy out. The native client, which
its multiprocess mode uses, takes the buffers as they are.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import select
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.peers.adapters.base import Bytes, Client, free_port, listens, reused, spawn
from benchmarks.peers.install import python_of

ENVIRONMENT = {
    "LMCACHE_DISABLE_BANNER": "1",
    "LMCACHE_TRACK_USAGE": "false",
    "LMCACHE_LOG_LEVEL": "ERROR",
    "DO_NOT_TRACK": "1",
}
LAYERS, HEADS, HEAD_SIZE, CHUNK_TOKENS = 8, 2, 64, 256
TOKEN_NBYTES = 2 * LAYERS * HEADS * HEAD_SIZE * 2  # keys and values, bfloat16
WAIT_S = 60.0


def serve(run: Path, environments: Path, stack: ExitStack) -> dict[str, Any]:
    """Start the lm:// server, which keeps values in memory."""
    port = free_port()
    command = [python_of(environments, "lmcache").with_name("lmcache_server"), "127.0.0.1", str(port), "cpu"]
    spawn(stack, run, command, listens(port), ENVIRONMENT)
    return {"url": f"lm://127.0.0.1:{port}"}


class LocalCpu(Client):
    """The backend for CPU memory, in this process."""

    def __init__(self, options: Mapping[str, Any], source: Bytes, target: Bytes) -> None:
        super().__init__(options, source, target)
        import torch
        from lmcache.v1.config import LMCacheEngineConfig
        from lmcache.v1.memory_management import MemoryFormat
        from lmcache.v1.metadata import LMCacheMetadata
        from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend

        torch.set_num_threads(1)
        self._torch, self._format = torch, MemoryFormat.KV_2LTD
        url = options.get("url")
        self._config = LMCacheEngineConfig.from_defaults(
            chunk_size=CHUNK_TOKENS, local_cpu=url is None, max_local_cpu_size=1.0, remote_url=url,
            remote_serde="naive" if url else None,
        )  # fmt: skip
        self._metadata = LMCacheMetadata(
            model_name="none", world_size=1, local_world_size=1, worker_id=0, local_worker_id=0,
            kv_dtype=torch.bfloat16, kv_shape=(LAYERS, 2, CHUNK_TOKENS, HEADS, HEAD_SIZE),
        )  # fmt: skip
        self._memory = LocalCPUBackend(config=self._config, metadata=self._metadata, dst_device="cpu")
        self._backend: Any = self._memory

    def prepare(self, names: Sequence[str], buffers: Sequence[Bytes]) -> Any:
        return [self._key(name) for name in names], [self._torch.from_numpy(buffer) for buffer in buffers]

    def _key(self, name: str) -> Any:
        from lmcache.utils import CacheEngineKey

        chunk_hash = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
        return CacheEngineKey(
            model_name="none", world_size=1, worker_id=0, chunk_hash=chunk_hash, dtype=self._torch.bfloat16
        )  # fmt: skip

    def put(self, batch: Any) -> None:
        under_way = []
        for key, tensor in zip(*batch, strict=True):
            shape = self._torch.Size([2, LAYERS, tensor.numel() // TOKEN_NBYTES, HEADS * HEAD_SIZE])
            memory = self._memory.allocate(shape, self._torch.bfloat16, self._format)
            if memory is None:
                raise RuntimeError("allocate found no memory")
            memory.raw_data.view(self._torch.uint8).flatten()[: tensor.numel()].copy_(tensor)
            under_way.append((memory, self._backend.submit_put_task(key, memory)))
        for memory, future in under_way:
            if future is not None:
                future.result(WAIT_S)
            memory.ref_count_down()

    def get(self, batch: Any) -> None:
        for key, tensor in zip(*batch, strict=True):
            memory = self._backend.get_blocking(key)
            if memory is None:
                raise RuntimeError("get_blocking found nothing")
            tensor.copy_(memory.raw_data.view(self._torch.uint8).flatten()[: tensor.numel()])
            memory.ref_count_down()

    def delete(self, names: Sequence[str]) -> None:
        for name in names:
            self._backend.remove(self._key(name))


class Remote(LocalCpu):
    """The remote backend with an lm:// server behind it."""

    def __init__(self, options: Mapping[str, Any], source: Bytes, target: Bytes) -> None:
        super().__init__(options, source, target)
        from lmcache.v1.storage_backend.remote_backend import RemoteBackend

        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, daemon=True).start()
        self._backend = RemoteBackend(
            config=self._config, metadata=self._metadata, loop=loop, local_cpu_backend=self._memory, dst_device="cpu"
        )  # fmt: skip

    def settle(self, batch: Any) -> None:
        """lm:// does not acknowledge a put; a question on the same connection is answered after it."""
        if not self._backend.contains(batch[0][-1]):
            raise RuntimeError("the value put last is not there")

    def _key(self, name: str) -> Any:
        return super()._key(reused(name))

    def delete(self, names: Sequence[str]) -> None:
        """The protocol has no such operation."""


class NativeResp(Client):
    """The C++ client for Redis, with two threads; no server of LMCache's is involved."""

    def __init__(self, options: Mapping[str, Any], source: Bytes, target: Bytes) -> None:
        super().__init__(options, source, target)
        from lmcache import lmcache_redis

        self._client = lmcache_redis.LMCacheRedisClient("127.0.0.1", options["port"], 2, "", "")
        self._event_fd = self._client.event_fd()

    def prepare(self, names: Sequence[str], buffers: Sequence[Bytes]) -> Any:
        return [reused(name) for name in names], [buffer.data for buffer in buffers]

    def put(self, batch: Any) -> None:
        self._wait(self._client.submit_batch_set(*batch))

    def get(self, batch: Any) -> None:
        self._wait(self._client.submit_batch_get(*batch))

    def _wait(self, future: int) -> None:
        while True:
            if not select.select([self._event_fd], [], [], WAIT_S)[0]:
                raise RuntimeError(f"no answer in {WAIT_S:.0f} s")
            os.read(self._event_fd, 8)
            for done in self._client.drain_completions():
                if done[0] == future:
                    if not done[1]:
                        raise RuntimeError(f"it failed: {done[2:]}")
                    return
