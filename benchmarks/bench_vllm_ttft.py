"""Time to the first token in a real vLLM on a CPU: computed, or from vLLM's own cache, ExampleConnector or mmcache.

    .engines/vllm/bin/python -m benchmarks.bench_vllm_ttft [--rounds 5] [--hits 3] [--dtype float32] [--json FILE|-]

exits 1 if a hit in mmcache is not faster than one in ExampleConnector (vLLM's own, to files; here in memory). A model
of 0.5B parameters with random weights; 12,288 bytes of KV a token in bfloat16, 24,576 in float32, which is taken where
the processor has no instructions for bfloat16: there a miss of 4,096 tokens takes a minute. Four engines, a process
each, take turns with the same prompt, so a busy machine slows all. Before a hit vLLM's own cache is emptied (but for
its own row); one token is generated, and must be the one that was computed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from typing import Any

import numpy as np

import mmcache
from mmcache.testing.process import ServerProcess
from tests.engines.vllm.harness import Answer, Engine, Settings, ask

LENGTHS = (2048, 4096)  # tokens that a hit saves
MORE = 2  # tokens of the prompt, since an engine must compute one; of one more, ExampleConnector finds nothing
MODEL: dict[str, Any] = {
    "load_format": "dummy",
    "max_model_len": 8192,
    "max_num_batched_tokens": 8192,
    "enable_prefix_caching": True,
}
ENVIRONMENT = {"OMP_NUM_THREADS": str(os.cpu_count())}
ROWS = {
    "plain miss": "recompute, no cache",
    "plain hit": "vLLM's own prefix cache, hit",
    "example hit": "ExampleConnector, hit",
    "async hit": "mmcache, hit, asynchronous load",
    "sync hit": "mmcache, hit, synchronous load",
    "example miss": "ExampleConnector, miss (computes and stores)",
    "async miss": "mmcache, miss (computes and stores), asynchronous",
    "sync miss": "mmcache, miss (computes and stores), synchronous",
}
Times = dict[tuple[str, int], list[float]]


def fast_dtype() -> str:
    """The dtype this processor multiplies fast."""
    with open("/proc/cpuinfo") as file:
        return "bfloat16" if {"amx_bf16", "avx512_bf16"} & set(file.read().split()) else "float32"


def engines(stack: contextlib.ExitStack, url: str, dtype: str) -> dict[str, Engine]:
    """Four engines by name, alive until the stack is left."""
    folder = stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm", prefix="mmcache-bench-"))
    example = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": folder},
    }
    model = MODEL | {"dtype": dtype}
    files = Settings("timing", model | {"kv_transfer_config": example, "disable_hybrid_kv_cache_manager": True})
    plain = Settings("timing", model)
    # Apart, so that one mode does not find what the other stored.
    modes = {mode: {"url": url, "load_mode": mode, "extra_facts": {"bench": mode}} for mode in ("async", "sync")}
    wanted = {"plain": Engine(plain, None, ENVIRONMENT), "example": Engine(files, None, ENVIRONMENT)}
    wanted |= {mode: Engine(plain, cache, ENVIRONMENT) for mode, cache in modes.items()}
    return {name: stack.enter_context(engine) for name, engine in wanted.items()}


def stored_everything(url: str, patience_s: float = 30.0) -> None:
    """Wait until the server has stored nothing more for a while."""
    with mmcache.connect(url) as client:
        last, since = -1, time.monotonic()
        while time.monotonic() - since < 0.3 and time.monotonic() < since + patience_s:
            now = client.stat()["counters"]["stored"]
            if now != last:
                last, since = now, time.monotonic()
            time.sleep(0.02)


def measure(rounds: int, hits_each: int, dtype: str) -> Times:
    """Seconds to the first token of every round, by row and prompt length. The first round warms up and is left out.

    Each prompt is asked `hits_each` times once it is stored: hits are short, so the machine's noise is large in them.
    """
    times: Times = {(row, length): [] for row in ROWS for length in LENGTHS}
    random = np.random.default_rng(0)
    with ServerProcess("3GiB", "--prefault") as server, contextlib.ExitStack() as stack:
        running = engines(stack, server.url, dtype)
        for number in range(rounds + 1):
            for length in LENGTHS:
                wanted = ask(tokens=random.integers(0, 256, length + MORE).tolist(), max_tokens=1)
                found = _round(running, wanted, hits_each, server.url)
                for row, seconds in found.items():
                    print(
                        f"round {number}, {length} tokens, {row}: {statistics.median(seconds):.3f} s", file=sys.stderr
                    )
                    if number:
                        times[row, length] += seconds
    return times


def _round(running: dict[str, Engine], wanted: dict[str, Any], hits_each: int, url: str) -> dict[str, list[float]]:
    """Seconds by row for one new prompt: every engine computes it once, then they take turns at answering it again."""
    misses = {}
    for name, engine in running.items():
        misses[name] = _first(engine, wanted, fresh=True)
        stored_everything(url)
    (truth, *_), times = misses.values(), {f"{name} miss": [miss.seconds] for name, miss in misses.items()}
    hits: dict[str, list[Answer]] = {name: [] for name in running}
    for _ in range(hits_each):
        for name, engine in running.items():
            hits[name].append(_first(engine, wanted, fresh=name != "plain"))
    for name, miss in misses.items():
        assert miss.cached == 0, f"{name}: {miss.cached} tokens of a new prompt were known"
        assert all(one.hit for one in hits[name]), f"{name}: {[one.cached for one in hits[name]]} of {wanted}"
        assert all(one.tokens == truth.tokens for one in (miss, *hits[name])), f"{name}: not {truth.tokens}"
        times[f"{name} hit"] = [one.seconds for one in hits[name]]
    return times


def _first(engine: Engine, wanted: dict[str, Any], *, fresh: bool) -> Answer:
    (answer,) = engine.fresh(wanted) if fresh else engine.generate(wanted)
    return answer


def table(times: Times) -> list[str]:
    """Markdown: seconds, median [quartiles], and the median's share of the recompute's."""
    lines = ["| | " + " | ".join(f"{length} tokens: s | of recompute" for length in LENGTHS) + " |"]
    lines.append("|---" * (1 + 2 * len(LENGTHS)) + "|")
    for row, title in ROWS.items():
        cells = []
        for length in LENGTHS:
            seconds = times[row, length]
            low, middle, high = statistics.quantiles(seconds if len(seconds) > 1 else seconds * 2, method="inclusive")
            whole = statistics.median(times["plain miss", length])
            cells += [f"{middle:.3f} [{low:.3f}, {high:.3f}]", f"{middle / whole:.3f}"]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return lines


def main() -> int:
    """Measure, print, and say whether mmcache's hits beat ExampleConnector's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hits", type=int, default=3, help="of each prompt in a round")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default=fast_dtype())
    parser.add_argument("--json", help="also write every time there; -: to stdout, and nothing else")
    arguments = parser.parse_args()
    times = measure(max(1, arguments.rounds), max(2, arguments.hits), arguments.dtype)
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "dtype": arguments.dtype,
        "rounds": arguments.rounds,
        "seconds": {f"{row} {length}": values for (row, length), values in times.items()},
    }
    if arguments.json == "-":
        print(json.dumps(result))
    else:
        print(f"{arguments.dtype}, {arguments.rounds} rounds of {arguments.hits} hits")
        print("\n".join(table(times)))
        if arguments.json:
            with open(arguments.json, "w") as file:
                json.dump(result, file)
    slower = [
        f"{mode}, {length} tokens"
        for mode in ("async", "sync")
        for length in LENGTHS
        if statistics.median(times[f"{mode} hit", length]) >= statistics.median(times["example hit", length])
    ]
    if slower:
        print(f"a hit is not faster than ExampleConnector's: {'; '.join(slower)}", file=sys.stderr)
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
