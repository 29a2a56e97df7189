"""`mmcache bench serve` on real vLLM servers: one restarted before a cache that another filled, beside one without.

    .engines/vllm/bin/python -m benchmarks.bench_vllm_serve --model vision|timing|timing-vision
        [--workload captioning] [--requests 40] [--text-tokens N] [--images N] [--html FILE] [--json FILE]

A cache server; a first engine, which the requests fill the cache with; then a restarted one beside a plain one without
any prefix cache, both asked the same in turns. `vision` is tiny, its answers real; of 0.5B parameters with random
weights are `timing` (text) and `timing-vision` (a vision tower of ViT-B's size), in bfloat16 where the processor
multiplies that fast. Exits 1 if a request failed, an answer differed, or less than 90% came from the cache.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from pathlib import Path

from rich.console import Console

from benchmarks.bench_vllm import fast_dtype
from benchmarks.vllm_rounds import stored_everything
from mmcache.bench.page import page
from mmcache.bench.serving import ServeOptions, run
from mmcache.testing.process import ServerProcess
from tests.engines.vllm.api_server import ApiServer

BIG = ("--load-format", "dummy", "--dtype", fast_dtype(), "--max-model-len", "8192", "--max-num-batched-tokens", "8192")
FLAGS = {"vision": ("--max-model-len", "2048"), "timing": BIG, "timing-vision": BIG}
ALL_CORES = {"OMP_NUM_THREADS": str(os.cpu_count()), "VLLM_CPU_KVCACHE_SPACE": "2"}
ENVIRONMENT: dict[str, dict[str, str]] = {"vision": {}, "timing": ALL_CORES, "timing-vision": ALL_CORES}
ASKED = {"vision": (2, 300, (168, 112)), "timing": (0, 2048, (448, 336)), "timing-vision": (2, 256, (448, 336))}


def show(done: int, total: int) -> None:
    """Progress, also in a log."""
    if not done % 8 or done == total:
        print(f"{done} of {total} answers", file=sys.stderr)


def main() -> int:
    """Start, fill, restart, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=FLAGS, required=True)
    parser.add_argument("--workload", default="captioning")
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--images", type=int)
    parser.add_argument("--text-tokens", type=int)
    parser.add_argument("--max-tokens", type=int, default=8)
    parser.add_argument("--html", type=Path)
    parser.add_argument("--json", type=Path)
    wanted = parser.parse_args()
    images, text_tokens, size = ASKED[wanted.model]
    asked = {
        "workload": wanted.workload,
        "requests": wanted.requests,
        "images": images if wanted.images is None else wanted.images,
        "image_size": size,
        "text_tokens": text_tokens if wanted.text_tokens is None else wanted.text_tokens,
        "max_tokens": wanted.max_tokens,
        "extra_body": {"ignore_eos": True},
    }

    def engine(url: str) -> ApiServer:
        return ApiServer(url, *FLAGS[wanted.model], model=wanted.model, **ENVIRONMENT[wanted.model])

    with ServerProcess("3GiB") as cache:
        with engine(cache.url) as first:
            run(ServeOptions(urls=[first.url], **asked), show)
            stored_everything(cache.url)
        with engine("") as plain, engine(cache.url) as again:
            load = os.getloadavg()[0]
            report = run(
                ServeOptions(urls=[plain.url, again.url], names=["without", "mmcache, restarted"], **asked), show
            )
    report.print(Console())
    print(f"load before: {load:.1f}; {time.strftime('%Y-%m-%d')}")
    found = report.to_dict()
    if wanted.html:
        wanted.html.write_text(page(found, shlex.join(["python", "-m", "benchmarks.bench_vllm_serve", *sys.argv[1:]])))
    if wanted.json:
        wanted.json.write_text(json.dumps(found))
    same, share = found["pairs"]["same_answers"] == wanted.requests, found["servers"][1]["cached_share"]
    return 0 if report.ok and same and share and share >= 0.9 else 1


if __name__ == "__main__":
    sys.exit(main())
