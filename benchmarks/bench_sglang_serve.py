"""`mmcache bench serve` on real SGLang servers: one restarted before a cache that another filled, beside one without.

    .engines/sglang/bin/python -m benchmarks.bench_sglang_serve --model chat|timing
        [--workload captioning] [--requests 40] [--text-tokens N] [--images N] [--html FILE] [--json FILE]

A cache server; a first engine, which the requests fill the cache with; then a restarted one beside a plain one without
any prefix cache, both asked the same in turns. `chat` is tiny, its answers real; `timing` has 0.5B parameters behind a
vision tower of ViT-B's size, and random weights. Exits 1 if a request failed, an answer differed, or less than 90% came
from the cache.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from mmcache.bench.page import page
from mmcache.bench.serving import ServeOptions, run
from tests.engines.sglang.api_server import ApiServer
from tests.engines.sglang.harness import HERE, Cache, shim_environment

# Weights that are drawn are known by their seed.
FLAGS = {"chat": [], "timing": ["--load-format", "dummy", "--random-seed", "7"]}
ASKED: dict[str, dict[str, Any]] = {
    "chat": {"images": 2, "text_tokens": 300, "image_size": (168, 112)},
    "timing": {"images": 2, "text_tokens": 256, "image_size": (448, 336)},
}


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
    given = {name: getattr(wanted, name) for name in ("images", "text_tokens") if getattr(wanted, name) is not None}
    asked = ASKED[wanted.model] | given
    asked |= {"workload": wanted.workload, "requests": wanted.requests, "max_tokens": wanted.max_tokens}
    with tempfile.TemporaryDirectory() as folder:
        script = [sys.executable, "-W", "ignore", str(HERE / "models.py"), folder, wanted.model]
        subprocess.run(script, env=shim_environment(), check=True, stderr=subprocess.DEVNULL)
        report = measure(Path(folder) / wanted.model, FLAGS[wanted.model], asked)
    found = report.to_dict()
    if wanted.html:
        words = ["python", "-m", "benchmarks.bench_sglang_serve", *sys.argv[1:]]
        wanted.html.write_text(page(found, shlex.join(words)))
    if wanted.json:
        wanted.json.write_text(json.dumps(found))
    same, share = found["pairs"]["same_answers"] == wanted.requests, found["servers"][1]["cached_share"]
    return 0 if report.ok and same and share and share >= 0.9 else 1


def measure(model: Path, flags: list[str], asked: dict[str, Any]) -> Any:
    """The report of a restarted server beside a plain one, printed."""
    asked = asked | {"extra_body": {"ignore_eos": True}}
    reported = [*flags, "--enable-cache-report"]
    with Cache("3GiB") as cache:
        with ApiServer(model, cache.url, *reported) as first:
            run(ServeOptions(urls=[first.url], **asked), show)
            cache.settle()
        with ApiServer(model, "", *reported) as plain, ApiServer(model, cache.url, *reported) as again:
            load = os.getloadavg()[0]
            urls, names = [plain.url, again.url], ["without", "mmcache, restarted"]
            report = run(ServeOptions(urls=urls, names=names, **asked), show)
    report.print(Console())
    print(f"load before: {load:.1f}; {time.strftime('%Y-%m-%d')}")
    return report


if __name__ == "__main__":
    sys.exit(main())
