"""vLLM: the KV connector. `--kv-transfer-config` names this module and MMCacheKVConnector; docs/vllm.md has the flag.

The class is imported when it is asked for, so that the parts which need no vLLM can be used, and tested, without it.
"""

from __future__ import annotations

from typing import Any

__all__ = ["MMCacheKVConnector"]


def __getattr__(name: str) -> Any:
    if name == "MMCacheKVConnector":
        from mmcache_connectors.vllm.connector import MMCacheKVConnector

        return MMCacheKVConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
