"""What a decision of each eviction policy costs at size, beside LRU, in one process.

    python benchmarks/bench_policy.py [--rows 1000000] [--operations 200000] [--json FILE|-]

Fills each policy, then does what a busy cache does: three uses of a row, mostly a recent one, and one eviction with an
insertion in its place; one name in three comes back as a ghost. Every call is timed alone, so a figure has the two
clock readings in it, printed as `clock`. `victim` is the decision; `evict` and `insert` take the row out and in again.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmcache.store.columns import NIL, heap
from mmcache.store.policies import POLICIES
from mmcache.store.policy import Policy


def name(number: int) -> bytes:
    """36 bytes, as the index gives them."""
    return number.to_bytes(36, "little")


def anything(_row: int) -> bool:
    """Every row may leave."""
    return True


def figures(times_ns: list[int]) -> dict[str, float]:
    """Microseconds: the median, the 99th in a hundred, the longest."""
    times_ns.sort()
    at = {"p50": len(times_ns) // 2, "p99": len(times_ns) * 99 // 100, "longest": -1}
    return {label: round(times_ns[place] / 1000, 2) for label, place in at.items()}


def timed(kept: list[int], call: Callable[[], Any]) -> Any:
    """Runs `call` and keeps its processor time."""
    started = time.thread_time_ns()
    result = call()
    kept.append(time.thread_time_ns() - started)
    return result


def decide(policy: Policy) -> int:
    """The next victim. A call looks at 16 rows at most, as the index asks."""
    row = policy.victim(anything, 16)
    while row is None:
        row = policy.victim(anything, 16)
    return row


def measure(policy: Policy, rows: int, operations: int) -> dict[str, dict[str, float]]:
    """Times by call."""
    rng = random.Random(1)
    names = list(range(rows))
    for row in range(rows):
        policy.insert(row, name(row), 1, NIL)
    fresh = rows
    decisions: list[int] = []
    evictions: list[int] = []
    inserts: list[int] = []
    touches: list[int] = []
    clock: list[int] = []
    gone: list[int] = []
    for _ in range(operations):
        for _ in range(3):
            row = int(rows * rng.random() ** 0.25)
            timed(touches, lambda row=row: policy.touch(row))  # type: ignore[misc]
        row = timed(decisions, lambda: decide(policy))
        timed(evictions, lambda row=row: policy.evict(row, name(names[row])))  # type: ignore[misc]
        gone.append(names[row])
        if rng.random() < 1 / 3:
            names[row] = gone[rng.randrange(len(gone))] if len(gone) < 9 else gone[-8]
        else:
            names[row], fresh = fresh, fresh + 1
        timed(inserts, lambda row=row: policy.insert(row, name(names[row]), 1, NIL))  # type: ignore[misc]
        timed(clock, lambda: None)
    kept = {"victim": decisions, "evict": evictions, "touch": touches, "insert": inserts, "clock": clock}
    return {call: figures(times_ns) for call, times_ns in kept.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--operations", type=int, default=200_000, help="evictions; uses are three times as many")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON ('-': to standard output)")
    arguments = parser.parse_args()
    found: dict[str, Any] = {"rows": arguments.rows, "policies": {}}
    for label, policy in POLICIES.items():
        print(f"{label}: {arguments.rows} rows", file=sys.stderr)
        found["policies"][label] = measure(policy(arguments.rows, heap, 1), arguments.rows, arguments.operations)
    if arguments.json == "-":
        print(json.dumps(found, indent=2))
        return
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=2) + "\n")
    print(f"{arguments.rows} rows; microseconds of processor time")
    print(f"{'policy':10}{'call':8}{'p50':>8}{'p99':>8}{'longest':>10}")
    for label, calls in found["policies"].items():
        for call, times in calls.items():
            print(f"{label:10}{call:8}{times['p50']:8}{times['p99']:8}{times['longest']:10}")


if __name__ == "__main__":
    main()
