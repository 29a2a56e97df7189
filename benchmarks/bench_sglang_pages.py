"""Batches of pages between SGLang's host pool and its storage backends: mmcache beside what SGLang brings, and memcpy.

    .engines/sglang/bin/python benchmarks/bench_sglang_pages.py [--layout page_first_direct] [--rounds 15] [--json]

The real classes of the installed SGLang, in one process as in its scheduler, without a model around them: two host
pools of Llama-3.1-8B's shape (32 layers, 8 kv heads of 128, bfloat16, 16 tokens a page: 2 MiB), a batch of 128 pages.
Each round stores new pages out of one pool and reads them into the other, every way in turn: mmcache by interface v1,
out of a pool that is lent to the cache and of one that is not, and, like SGLang's own file backend, page by page; the
files in a folder of memory (/dev/shm). SGLang's `shm` backend keeps nothing, which its row shows. Printed are medians
with quartiles, and the ratio to a memcpy of the same buffers in the same round. Verified: checksums of the bytes as
delivered; and what was read is compared with what was stored.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SHIM = str(ROOT / "tests" / "engines" / "sglang" / "shim")
LAYERS, HEADS, DIM, PAGE = 32, 8, 128, 16
FILES = "SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR"


def prepared() -> None:
    """Start this program anew with what SGLang needs where there is no GPU."""
    if SHIM in sys.path:
        return
    sys.path.insert(0, str(ROOT))
    from tests.engines.sglang.harness import shim_environment

    environment = shim_environment() | {FILES: tempfile.mkdtemp(dir="/dev/shm", prefix="sglang-files-")}
    os.execve(sys.executable, [sys.executable, "-W", "ignore", *sys.argv], environment)


class Way(NamedTuple):
    """One way to store and read a batch: both take page hashes and token indices, and say how many pages went well."""

    name: str
    store: Callable[[list[str], Any], int]
    read: Callable[[list[str], Any], int]
    forget: Callable[[list[str]], None]
    verified: str


def pools(layout: str, pages: int, count: int) -> list[Any]:
    """So many of SGLang's host pools, the first with values."""
    import torch

    from tests.engines.sglang.in_process import heads_pool

    shape = {"head_num": HEADS, "head_dim": DIM, "layer_num": LAYERS}
    made = [heads_pool(pages * PAGE, PAGE, layout, **shape) for _ in range(count)]
    made[0].kv_buffer.view(torch.int16).random_()
    made[-1].kv_buffer.zero_()
    return made


def lent_pool(layout: str, pages: int, like: Any) -> Any:
    """As `like`, in memory that a cache may map: as the plugin has SGLang make its pools."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    from mmcache_connectors.sglang import lending

    lending.register()
    HookRegistry.apply_hooks()
    (made,) = pools(layout, pages, 1)
    made.kv_buffer.copy_(like.kv_buffer)
    return made


def ways(settings: dict[str, Any], source: Any, lent: Any, target: Any) -> list[Way]:
    """mmcache in three ways, and what SGLang brings."""
    from sglang.srt.mem_cache.hicache_storage import HiCacheFile, HiCacheStorageExtraInfo
    from sglang.srt.mem_cache.storage.shm.hicache_shm import HiCacheShm

    from mmcache_connectors.sglang.hicache import MMCacheHiCacheStorage
    from tests.engines.sglang.in_process import config

    def ours(v1: int, pool: Any) -> Any:
        storage = MMCacheHiCacheStorage(config(settings | {"interface_v1": v1}), {})
        storage.register_mem_pool_host(pool)
        return storage

    def pointed(storage: Any) -> tuple[Any, Any]:
        def store(hashes: list[str], at: Any) -> int:
            return sum(storage.batch_set_v1(hashes, at, HiCacheStorageExtraInfo()))

        def read(hashes: list[str], at: Any) -> int:
            return sum(reader.batch_get_v1(hashes, at, HiCacheStorageExtraInfo()))

        reader = MMCacheHiCacheStorage(config(settings | {"interface_v1": 1}), {})
        reader.register_mem_pool_host(target)
        return store, read

    def passed(storage: Any) -> tuple[Any, Any]:
        """As `_generic_page_set` and `_generic_page_get` of SGLang's CacheController do."""

        def store(hashes: list[str], at: Any) -> int:
            return len(hashes) * bool(storage.batch_set(hashes, [source.get_data_page(index) for index in at[::PAGE]]))

        def read(hashes: list[str], at: Any) -> int:
            found = storage.batch_get(hashes, [target.get_dummy_flat_data_page() for _ in hashes])
            for index, page in zip(at[::PAGE], found, strict=True):
                if page is not None:
                    target.set_from_flat_data_page(index, page)
            return sum(page is not None for page in found)

        return store, read

    def drop(storage: Any) -> Callable[[list[str]], None]:
        def forget(hashes: list[str]) -> None:
            first = storage._first
            storage._cache.delete(first.keys(hashes, []) if storage._v1 else first.flat_keys(hashes))

        return forget

    v1, by_lending, v0 = ours(1, source), ours(1, lent), ours(0, source)
    files, shm = HiCacheFile(config({})), HiCacheShm(config({}))
    return [
        Way("mmcache, v1, pool lent", *pointed(by_lending), drop(by_lending), "yes"),
        Way("mmcache, v1", *pointed(v1), drop(v1), "yes"),
        Way("mmcache, page by page", *passed(v0), drop(v0), "yes"),
        Way("SGLang file", *passed(files), lambda hashes: files.clear() and None, "no"),
        Way("SGLang shm", *passed(shm), lambda hashes: None, "no"),
    ]


def copied(source: Any, target: Any, at: Any) -> float:
    """Seconds a memcpy of each buffer of the pages takes."""
    from mmcache_connectors.sglang.pools import arrays_at

    here, there = (arrays_at(*pool.get_page_buffer_meta(at)) for pool in (source, target))
    started = time.perf_counter()
    for one, other in zip(here, there, strict=True):
        other[:] = one
    return time.perf_counter() - started


def measure(options: argparse.Namespace, url: str, folder: Path) -> list[dict[str, Any]]:
    """Every way in turn, round after round; seconds of both directions."""
    import torch

    from tests.engines.sglang.in_process import start

    settings = start(url, options.layout, PAGE, folder)
    source, target = pools(options.layout, options.pages, 2)
    lent = lent_pool(options.layout, options.pages, source)
    at = torch.arange(options.pages * PAGE)
    every = ways(settings, source, lent, target)
    taken: dict[str, dict[str, list[float]]] = {way.name: {"store": [], "read": []} for way in every}
    base: list[float] = []
    good: dict[str, int] = dict.fromkeys(taken, 0)
    for number in range(options.rounds + 1):
        hashes = [sha256(f"{number} {page}".encode()).hexdigest() for page in range(options.pages)]
        memcpy_s = copied(source, target, at)
        for way in every:
            target.kv_buffer.zero_()
            started = time.perf_counter()
            way.store(hashes, at)
            stored = time.perf_counter()
            read = way.read(hashes, at)
            ended = time.perf_counter()
            same = read == options.pages and torch.equal(
                source.kv_buffer.view(torch.int16), target.kv_buffer.view(torch.int16)
            )
            way.forget(hashes)
            if number:  # the first round warms up
                good[way.name] += same
                taken[way.name]["store"].append(stored - started)
                taken[way.name]["read"].append(ended - stored)
        if number:
            base.append(memcpy_s)
    nbytes = source.kv_buffer.nbytes
    return [
        row(way, taken[way.name], base, nbytes, "GOOD" if good[way.name] == options.rounds else "BAD DATA")
        for way in every
    ]


def row(way: Way, taken: dict[str, list[float]], base: list[float], nbytes: int, data: str) -> dict[str, Any]:
    """One way's numbers; ratios are of each round's memcpy to it."""
    import numpy as np

    made: dict[str, Any] = {"way": way.name, "verified": way.verified, "data": data}
    for what, seconds in taken.items():
        ratios = np.array(base) / np.array(seconds)
        low, middle, high = np.percentile(ratios, [25, 50, 75])
        made[what] = {
            "gb_per_s": round(nbytes / 1e9 / float(np.median(seconds)), 2),
            "of_memcpy": round(float(middle), 2),
            "quartiles": [round(float(low), 2), round(float(high), 2)],
        }
    made["memcpy_gb_per_s"] = round(nbytes / 1e9 / float(np.median(base)), 2)
    return made


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", default="page_first_direct", choices=["page_first_direct", "layer_first"])
    parser.add_argument("--pages", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    prepared()
    from mmcache.testing.process import ServerProcess
    from mmcache.transport.native import STATE

    try:
        with tempfile.TemporaryDirectory() as folder, ServerProcess("2GiB") as server:
            rows = measure(options, server.url, Path(folder))
    finally:
        shutil.rmtree(os.environ[FILES], ignore_errors=True)
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    print(f"\nmmcache-native: {STATE}")
    print(f"{options.pages} pages of 2 MiB, {options.layout}; memcpy {rows[0]['memcpy_gb_per_s']} GB/s")
    print("| | verified | set, of memcpy | GB/s | get, of memcpy | GB/s | |\n|---|---|---|---|---|---|---|")
    for one in rows:
        cells = [
            f"{one[w]['of_memcpy']:.2f} ({one[w]['quartiles'][0]:.2f}-{one[w]['quartiles'][1]:.2f}) | "
            f"{one[w]['gb_per_s']:.2f}"
            for w in ("store", "read")
        ]
        print(f"| {one['way']} | {one['verified']} | {' | '.join(cells)} | {one['data']} |")


if __name__ == "__main__":
    main()
