"""Which store SGLang's encoder processes make: registered in the process that loads plugins, and in those it spawns.

SGLang 0.5.23 loads plugins in an encoder server's first process only. The others of a tensor-parallel or data-parallel
one begin at functions of SGLang's; here they begin at these, which register the store and go on as SGLang has it.
Imports SGLang.
"""

from __future__ import annotations

import contextlib
from typing import Any, Final

from sglang.srt.disaggregation.encoder import runtime, server
from sglang.srt.mem_cache.embedding_store import EmbeddingStoreFactory

from mmcache.errors import ConfigError

BACKEND: Final = "mooncake"  # the one name --mm-global-cache-backend takes
WORKERS: Final = ("launch_encoder", "launch_dp_worker")  # what SGLang's runtime starts processes with


def register() -> None:
    """Put the store in the place of SGLang's own, here and in processes started from here. May be called again."""
    EmbeddingStoreFactory.register_backend(BACKEND, "mmcache_connectors.sglang.embeddings", "MMCacheEmbeddingStore")
    for name in WORKERS:
        if not callable(getattr(runtime, name, None)):
            raise ConfigError(f"this SGLang's encoder runtime has no {name}; use a version named in docs/sglang.md")
    runtime.launch_encoder, runtime.launch_dp_worker = launch_encoder, launch_dp_worker
    with contextlib.suppress(ImportError):  # its own packages are not there: no server of it either
        from sglang.srt.disaggregation.encoder import grpc_server

        grpc_server.launch_encoder = launch_encoder


def launch_encoder(*arguments: Any) -> None:
    """A further rank of a tensor-parallel encoder, in a process of its own."""
    register()
    server.launch_encoder(*arguments)


def launch_dp_worker(*arguments: Any) -> None:
    """One of a data-parallel encoder's ranks, in a process of its own."""
    launch = runtime.launch_dp_worker
    register()
    launch(*arguments)
