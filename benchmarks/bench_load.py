"""How fast a vLLM worker's side loads blocks into paged memory on a processor, beside a memcpy in the same process.

    python benchmarks/bench_load.py [--pairs 15]

A real server in another process, prefaulted; 128 blocks over 24 layers, 100 MB, in the layout vLLM has on CPUs, every
byte verified; blocks lie apart, in random order. What is in the paged memory at the end is compared with what was
stored.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "connectors"), str(ROOT / "kernels")]

import numpy as np  # noqa: E402
import torch  # noqa: E402

import mmcache  # noqa: E402
from mmcache.keyset import Part  # noqa: E402
from mmcache.testing.process import ServerProcess  # noqa: E402
from mmcache_connectors.paged import PagedGroup  # noqa: E402
from mmcache_connectors.vllm.plan import Blocks, Job  # noqa: E402
from mmcache_connectors.vllm.settings import Settings  # noqa: E402
from mmcache_connectors.vllm.worker import GroupMemory, WorkerSide  # noqa: E402

LAYERS, BLOCKS, HEADS, TOKENS, CONTENT = 24, 1365, 2, 32, 128
COUNT = 128


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def main() -> None:
    """Store, load, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    pairs = max(2, parser.parse_args().pairs)
    memory = torch.randn(LAYERS, BLOCKS, HEADS, TOKENS, CONTENT)
    paged = PagedGroup(list(memory.unbind(0)), num_blocks=BLOCKS, block_tokens=TOKENS)
    random = np.random.default_rng(0)
    places = 1 + random.permutation(BLOCKS - 1)
    source, target = places[:COUNT].tolist(), places[COUNT : 2 * COUNT].tolist()
    nbytes = COUNT * paged.spec().nbytes
    here, there = np.ones(nbytes, np.uint8), np.zeros(nbytes, np.uint8)
    facts = mmcache.Namespace(kind="kv", model="bench", dtype="float32", layout="LHNC", block_size=TOKENS)
    keys = facts.block_keys(range(COUNT * TOKENS))
    with ServerProcess("1GiB", "--prefault") as server:
        client = mmcache.connect(server.url)
        part = Part(kv_group=(0, 1), layers=None, kv_heads=(0, HEADS, HEADS))
        worker = WorkerSide(Settings(url=server.url), client, [GroupMemory(paged, part, True)])
        worker.save([Job("store", (Blocks(0, keys, source),))])
        assert worker.flush(30)
        load = [Job("load", (Blocks(0, keys, target),))]
        worker.start_loads(load, asynchronous=False)  # the first one maps the server's memory
        copies, loads, cpu_s = [], [], 0.0
        for _ in range(pairs):
            copies.append(timed(lambda: np.copyto(there, here)))
            begin_s = time.process_time()
            loads.append(timed(lambda: worker.start_loads(load, asynchronous=False)))
            cpu_s += (time.process_time() - begin_s) / pairs
        assert not worker.take_invalid()
        client.close()
    assert torch.equal(memory[:, target], memory[:, source]), "the blocks that were loaded are wrong"
    ratios = [copy / one for copy, one in zip(copies, loads, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    seconds = statistics.median(loads)
    print(f"load of {nbytes / 1e6:.0f} MB, verified: {seconds * 1e3:.1f} ms, {nbytes / seconds / 1e9:.1f} GB/s")
    print(f"of this process's CPUs: {cpu_s * 1e3:.1f} ms")
    print(f"beside a memcpy on one thread: {middle:.2f} [{low:.2f}, {high:.2f}] of {pairs} interleaved pairs")


if __name__ == "__main__":
    main()
