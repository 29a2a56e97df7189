"""vLLM: the KV connector and the encoder-cache connector. `--kv-transfer-config` and `--ec-transfer-config` name this
module and MMCacheKVConnector or MMCacheECConnector; docs/vllm.md has the flags.

The classes are imported when they are asked for, so that the parts which need no vLLM can be used, and tested, without.
"""

from __future__ import annotations

from typing import Any

__all__ = ["MMCacheECConnector", "MMCacheKVConnector"]


def __getattr__(name: str) -> Any:
    if name == "MMCacheKVConnector":
        from mmcache_connectors.vllm.connector import MMCacheKVConnector

        return MMCacheKVConnector
    if name == "MMCacheECConnector":
        from mmcache_connectors.vllm.ec_connector import MMCacheECConnector

        return MMCacheECConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
