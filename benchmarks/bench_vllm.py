"""What mmcache costs and saves in a real vLLM on a CPU, beside vLLM's own prefix cache and its ExampleConnector.

    .engines/vllm/bin/python -m benchmarks.bench_vllm [--rounds 5] [--hits 7] [--dtype float32] [--json FILE|-]

A model of 0.5B parameters with random weights; 12,288 bytes of KV a token in bfloat16, 24,576 in float32, which is
taken where the processor has no instructions for bfloat16. Four engines, a process each, and a server, all on this
machine; every read of mmcache is verified. Before a hit vLLM's own cache is emptied, but for its own row (the floor).
Answers must be those that were computed. Exits 1 if a bar is missed:

- time to the first token of a full hit: at most 1.25 times the floor, and below ExampleConnector's;
- 16 requests at once with one beginning: at most 1.5 times the floor;
- of a full miss: at most 3% above an engine without mmcache;
- CPU seconds a decode step: at most 2% above the same engine's without its connector, in turns (ABBA), with its
  interval (a bootstrap);
- calls from vLLM's scheduler to its connector: 99% within 2 ms.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from benchmarks.vllm_rounds import CROWD, CROWD_LENGTH, DECODE_STEPS, DECODERS, LENGTHS, OURS, Times, measure

TITLES: Final = {
    "plain": "vLLM alone",
    "example": "ExampleConnector (files in memory, unverified)",
    "async": "mmcache, asynchronous loads",
    "sync": "mmcache, synchronous loads",
    "bypassed": "the same engine without its connector",
    "clocked": "the same engine with clocks on its connector's calls",
}


class Verdict(NamedTuple):
    """One bar: what was found, what it must be at most, and how sure that is."""

    what: str
    found: float
    bar: float
    interval: tuple[float, float] | None = None

    @property
    def met(self) -> bool:
        """Whether the bar is met."""
        return self.found <= self.bar


def fast_dtype() -> str:
    """The dtype this processor multiplies fast."""
    with open("/proc/cpuinfo") as file:
        return "bfloat16" if {"amx_bf16", "avx512_bf16"} & set(file.read().split()) else "float32"


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """(the ratio of the medians, its 95% interval by a bootstrap over the pairs)."""
    pairs = np.array([ours, theirs])
    picks = np.random.default_rng(0).integers(0, pairs.shape[1], (2000, pairs.shape[1]))
    upper, lower = np.median(pairs[:, picks], axis=2)
    low, high = np.quantile(upper / lower, [0.025, 0.975])
    middle = np.median(pairs, axis=1)
    return float(middle[0] / middle[1]), (float(low), float(high))


def blocks(runs: Sequence[Mapping[str, float]]) -> list[float]:
    """CPU seconds a step of each ABBA: the mean of its two runs in which the same was done."""
    return [statistics.mean(one["cpu_s"] for one in runs[start : start + 2]) for start in range(0, len(runs), 2)]


def drift_free(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """(the median of the ratios of neighbours, its 95% interval by a bootstrap): a machine whose speed changes slowly
    changes both."""
    ratios = np.array(ours) / np.array(theirs)
    picks = np.random.default_rng(0).integers(0, len(ratios), (2000, len(ratios)))
    low, high = np.quantile(np.median(ratios[picks], axis=1), [0.025, 0.975])
    return float(np.median(ratios)), (float(low), float(high))


def verdicts(times: Times) -> list[Verdict]:
    """Every bar."""
    found = []
    for mode in OURS:
        for length in LENGTHS:
            hit = times.hit[mode, length]
            what = f"{mode}: full hit of {length} tokens"
            found.append(Verdict(f"{what} / vLLM's own hit", *_bar(hit, times.hit["plain", length], 1.25)))
            found.append(Verdict(f"{what} / ExampleConnector's", *_bar(hit, times.hit["example", length], 1.0)))
        crowd = _bar(times.crowd[mode], times.crowd["plain"], 1.5)
        found.append(Verdict(f"{mode}: {CROWD} requests at once / vLLM's own hit", *crowd))
        for length in LENGTHS:
            miss = _bar(times.miss[mode, length], times.miss["plain", length], 1.03)
            found.append(Verdict(f"{mode}: full miss of {length} tokens / vLLM alone", *miss))
        p99_ms = float(np.quantile(times.calls[mode], 0.99)) * 1e3
        found.append(Verdict(f"{mode}: scheduler calls, p99, ms, of {len(times.calls[mode]):,}", p99_ms, 2.0))
    with_it, without = (blocks(times.decode[name]) for name in ("async", "bypassed"))
    found.append(
        Verdict("CPU seconds a decode step / without the connector", *_with_bar(drift_free(with_it, without), 1.02))
    )
    own = statistics.median(one["own_s"] / one["cpu_s"] for one in times.decode["clocked"])
    found.append(Verdict("share of the connector's own calls and threads in a decode step's CPU seconds", own, 0.02))
    return found


def _bar(ours: Sequence[float], theirs: Sequence[float], bar: float) -> tuple[float, float, tuple[float, float]]:
    return _with_bar(ratio(ours, theirs), bar)


def _with_bar(found: tuple[float, tuple[float, float]], bar: float) -> tuple[float, float, tuple[float, float]]:
    middle, interval = found
    return middle, bar, interval


def tables(times: Times) -> list[str]:
    """Markdown: milliseconds, median [quartiles], then the bars."""
    lines = ["| ms to the first token | " + " | ".join(f"{length} tokens" for length in LENGTHS) + " |"]
    lines.append("|---" * (1 + len(LENGTHS)) + "|")
    for kind, rows in (("hit", times.hit), ("miss", times.miss)):
        for name in ("plain", "example", *OURS):
            cells = [_spread(rows[name, length]) for length in LENGTHS]
            lines.append(f"| {kind}: {TITLES[name]} | " + " | ".join(cells) + " |")
    lines += ["", f"| {CROWD} requests at once that share {CROWD_LENGTH} tokens | ms until the last first token |"]
    lines.append("|---|---|")
    lines += [f"| {TITLES[name]} | {_spread(seconds)} |" for name, seconds in times.crowd.items()]
    lines += ["", f"| a decode step of {DECODERS} requests, {DECODE_STEPS} steps each time | wall, ms | CPU, ms |"]
    lines.append("|---|---|---|")
    for name, runs in times.decode.items():
        cells = [_spread([one[field] for one in runs]) for field in ("wall_s", "cpu_s")]
        lines.append(f"| {TITLES[name]} | " + " | ".join(cells) + " |")
    lines += ["", "| | found | bar | 95% interval | |", "|---|---|---|---|---|"]
    for one in verdicts(times):
        between = f"{one.interval[0]:.3f} to {one.interval[1]:.3f}" if one.interval else ""
        lines.append(f"| {one.what} | {one.found:.3f} | {one.bar} | {between} | {'met' if one.met else '**missed**'} |")
    return lines


def _spread(seconds: Sequence[float]) -> str:
    values = [1e3 * one for one in seconds]
    low, middle, high = statistics.quantiles(values if len(values) > 1 else values * 2, method="inclusive")
    return f"{middle:.1f} [{low:.1f}, {high:.1f}]"


def main() -> int:
    """Measure, print, and say whether every bar is met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="each of new prompts; at least 1")
    parser.add_argument("--hits", type=int, default=7, help="of each prompt in a round; at least 2")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default=fast_dtype())
    parser.add_argument("--json", help="also write every time there; -: to stdout, and nothing else")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    times = measure(max(1, arguments.rounds), max(2, arguments.hits), arguments.dtype)
    found = verdicts(times)
    if arguments.json:
        machine = {"machine": platform.machine(), "cores": os.cpu_count(), "load_before": load}
        run = {"dtype": arguments.dtype, "rounds": arguments.rounds, "hits": arguments.hits, **machine}
        text = json.dumps(run | {"seconds": _plain(times), "bars": [one._asdict() | {"met": one.met} for one in found]})
        if arguments.json == "-":
            print(text)
        else:
            with open(arguments.json, "w") as file:
                file.write(text + "\n")
    if arguments.json != "-":
        print(f"{arguments.dtype}, {arguments.rounds} rounds of {arguments.hits} hits; load before: {load:.1f}")
        print("\n".join(tables(times)))
    missed = [one.what for one in found if not one.met]
    if missed:
        print(f"missed: {'; '.join(missed)}", file=sys.stderr)
    return 1 if missed else 0


def _plain(times: Times) -> dict[str, Any]:
    return {
        row: {" ".join(map(str, key)) if isinstance(key, tuple) else key: values for key, values in found.items()}
        for row, found in vars(times).items()
    }


if __name__ == "__main__":
    sys.exit(main())
