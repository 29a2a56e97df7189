"""What real host pools are named by processes of several kinds: `python real_names.py URL FOLDER`; prints JSON.

For each process the keys of one page, first pool or further one. The model has two layers and two kv heads.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sglang.srt.mem_cache.hybrid_cache.hybrid_pool_assembler import build_kv_host_pool
from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool
from sglang.srt.mem_cache.memory_pool_host import DeepSeekV4PagedHostPool, LogicalHostPool

from mmcache_connectors.sglang.engine import describe_first, describe_further
from tests.engines.sglang.in_process import config, heads_pool, start

PAGE, PAGES, HASH, LAYOUT = 4, 2, "0c" * 32, "page_first_direct"


def heads(layout: str = LAYOUT) -> Callable[[int], Any]:
    """Keys and values of a rank of so many."""
    return lambda ranks: heads_pool(PAGES * PAGE, PAGE, layout, layer_num=2, head_num=2 // ranks, head_dim=8)


def latent(ranks: int) -> Any:
    """MLA's, which every rank holds whole."""
    shape = {"kv_lora_rank": 8, "qk_rope_head_dim": 4, "layer_num": 2}
    return build_kv_host_pool(
        kv_pool=MLATokenToKVPool(
            size=PAGES * PAGE, page_size=PAGE, dtype=torch.bfloat16, device="cpu", enable_memory_saver=False, **shape
        ),
        page_size=PAGE,
    )


def compressed(ranks: int) -> Any:
    """Compressed pages, which every rank of a model with MLA holds whole."""
    layers = [torch.zeros(PAGES, 48, dtype=torch.uint8) for _ in range(2)]
    return DeepSeekV4PagedHostPool("c4", layers, 48, PAGES, PAGE, layout=LAYOUT, pin_memory=False)


def places(ranks: int) -> Any:
    """A first pool without memory."""
    return LogicalHostPool(PAGES * PAGE, PAGE)


def processes(stages: int = 1, lcm: int | None = None, **fixed: Any) -> dict[str, Any]:
    """What SGLang tells each process of one rank, and of two."""
    told = {}
    for ranks in (1, 2):
        for rank in range(ranks):
            for stage in range(stages):
                more = {"tp_rank": rank, "tp_size": ranks, "pp_rank": stage, "pp_size": stages, "tp_lcm_size": lcm}
                split = lcm is not None and lcm > ranks
                name = f"{rank}/{ranks}" + (f" {stage}/{stages}" if stages > 1 else "")
                told[name] = config({}, should_split_heads=split, **more, **fixed)
    return told


def named(told: dict[str, Any], pool: Callable[[int], Any], further: Callable[[int], Any] | None = None) -> Any:
    """The keys of one page by process."""
    found = {}
    for name, process in told.items():
        first = describe_first(process, pool(process.tp_size), "tiny@1", True)
        keys = first.keys([HASH], [])
        if further is not None:
            keys = describe_further(process, first, further(process.tp_size), "other").keys(first, [HASH], [])
        found[name] = [key.hex() for key in keys]
    return found


def main() -> None:
    """Every kind."""
    start(sys.argv[1], LAYOUT, PAGE, Path(sys.argv[2]))
    mla = {"is_mla_model": True}
    print(
        json.dumps(
            {
                "heads": named(processes(), heads()),
                "heads, cut": named(processes(lcm=2), heads("page_head")),
                "heads, stages": named(processes(stages=2), heads()),
                "latent": named(processes(**mla), latent),
                "latent, stages": named(processes(stages=2, **mla), latent),
                "window": named(processes(), heads(), heads()),
                "compressed": named(processes(**mla), places, compressed),
                "compressed, stages": named(processes(stages=2, **mla), places, compressed),
            }
        )
    )


if __name__ == "__main__":
    main()
