"""Pages of SGLang's real host pools through the backend: `python real_pools.py URL FOLDER`; prints JSON of what came.

Two models: one with attention, a sliding window and states; one whose first pool is only a count of places, with
compressed pages beside it, as DeepSeek V4 has.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from sglang.srt.mem_cache.device_pool_info import MambaStateBufferInfo
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageExtraInfo, PoolHitPolicy, PoolName, PoolTransfer
from sglang.srt.mem_cache.memory_pool_host import DeepSeekV4PagedHostPool, LogicalHostPool
from sglang.srt.mem_cache.pool_host.mamba import MambaPoolHost

from mmcache_connectors.sglang.hicache import MMCacheHiCacheStorage
from tests.engines.sglang.in_process import config, heads_pool, start

PAGE, PAGES, LAYOUT = 4, 6, "page_first_direct"
HASHES = [sha256(bytes([page])).hexdigest() for page in range(PAGES)]
Pools = dict[PoolName, Any]


def hybrid() -> Pools:
    """Attention of two layers, a window of one, states of three."""
    shape = {"head_num": 2, "head_dim": 8}
    states = MambaStateBufferInfo(
        temporal=torch.zeros(3, PAGES, 4, 5, dtype=torch.float32), conv=(torch.zeros(3, PAGES, 6, 3).bfloat16(),)
    )
    return {
        PoolName.KV: heads_pool(PAGES * PAGE, PAGE, LAYOUT, layer_num=2, **shape),
        PoolName.SWA: heads_pool(PAGES * PAGE, PAGE, LAYOUT, layer_num=1, **shape),
        PoolName.MAMBA: MambaPoolHost(states, 1.0, 0, device_capacity=PAGES, pin_memory=False, layout=LAYOUT),
    }


def compressed() -> Pools:
    """Places without memory, and pages of 48 bytes of each of two layers."""
    layers = [torch.zeros(PAGES, 48, dtype=torch.uint8) for _ in range(2)]
    return {
        PoolName.KV: LogicalHostPool(PAGES * PAGE, PAGE),
        PoolName.DEEPSEEK_V4_C4: DeepSeekV4PagedHostPool(
            "c4", layers, 48, PAGES, PAGE, layout=LAYOUT, pin_memory=False
        ),
    }


def tensors(pool: Any) -> list[Any]:
    """The memory of a host pool, as bytes."""
    held = pool.kv_buffer
    flat = held if isinstance(held, (list, tuple)) else [held] if held is not None else []
    return [one.view(torch.uint8) for one in flat]


def transfers(pools: Pools, policies: dict[PoolName, PoolHitPolicy], hashes: list[str]) -> list[Any]:
    """A PoolTransfer for each further pool, of the pages at the end of `hashes`."""
    made = []
    for name, policy in policies.items():
        keys = hashes[-1:] if policy == PoolHitPolicy.TRAILING_PAGES else hashes
        size = pools[name].page_size
        first = (len(hashes) - len(keys)) * size
        made.append(PoolTransfer(name, torch.arange(first, len(hashes) * size), keys=keys, hit_policy=policy))
    return made


def moved(url_settings: dict[str, Any], make: Callable[[], Pools], policies: dict[PoolName, PoolHitPolicy]) -> Any:
    """Store pages of one set of pools, read them into another; what was found, and whether all bytes are the same."""
    source, target = make(), make()
    told: list[Any] = []
    for pools in (source, target):
        storage = MMCacheHiCacheStorage(config(url_settings | {"interface_v1": 1}, enable_storage_metrics=True), {})
        storage.register_mem_pool_host(pools[PoolName.KV])
        for name, pool in pools.items():
            storage.register_mem_host_pool_v2(pool, name)
        storage.on_host_pools_registered()
        at, info = torch.arange(PAGES * PAGE), HiCacheStorageExtraInfo(prefix_keys=[])
        asked = transfers(pools, policies, HASHES)
        # As SGLang does: the pages before those of a call, also where they are the last ones only.
        trailing = PoolHitPolicy.TRAILING_PAGES in policies.values()
        before = HiCacheStorageExtraInfo(prefix_keys=HASHES[:-1] if trailing else [])
        if pools is source:
            for one in (held for pool in pools.values() for held in tensors(pool)):
                one.random_(1, 200)
            told.append(storage.batch_set_v1(HASHES, at, info))
            told += [storage.batch_set_v2([one], before) for one in asked]
            continue
        found = storage.batch_exists_v2(HASHES, asked, info)
        told.append([found.kv_hit_pages, found.extra_pool_hit_pages, found.restorable_prefix_pages])
        told.append(storage.batch_get_v1(HASHES, at, info))
        told.append(storage.batch_get_v2(asked, before))
        stats = storage.get_stats()
        told.append([stats.prefetch_pgs, stats.backup_pgs, min(stats.prefetch_bandwidth) > 0])
    return told, {name: same(source[name], target[name]) for name in source}


def same(one: Any, other: Any) -> list[int]:
    """For each tensor of two pools how many bytes are alike and not zero."""
    pairs = zip(tensors(one), tensors(other), strict=True)
    return [int(((held == found) & (held != 0)).sum()) for held, found in pairs]


def main() -> None:
    """Both models."""
    settings = start(sys.argv[1], LAYOUT, PAGE, Path(sys.argv[2]))
    every, last = PoolHitPolicy.ALL_PAGES, PoolHitPolicy.TRAILING_PAGES
    print(
        json.dumps(
            [
                moved(settings, hybrid, {PoolName.SWA: last, PoolName.MAMBA: last}),
                moved(settings, compressed, {PoolName.DEEPSEEK_V4_C4: every}),
            ]
        )
    )


if __name__ == "__main__":
    main()
