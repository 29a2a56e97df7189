"""The index at size: bytes an entry, the longest pause of one operation, and the speed of batches.

    python benchmarks/bench_index.py [--entries 2000000] [--operations 20000] [--runs 2] [--policy value] [--held]

Fills an index with chains of blocks (every column touched), then runs a mix of acquire, contains, reserve + commit
with eviction, delete and release, timing every single call by the wall and by the thread's processor time. Garbage
collection is on, as in a server. Where the machine itself pauses (a virtual one does, and its processor time then
counts the pause), the longest call says little: so the longest gap of a loop that does nothing is printed too, and,
as the work is the same in each run, the longest call by the least processor time it took in any run. `--held`: the
columns that outlive a server lie in memory shared with another process, as under `serve --hold`.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import mmap
import os
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mmcache.store.answers import Refusal, Reserved
from mmcache.store.columns import Memory, heap
from mmcache.store.index import Index
from mmcache.store.policies import POLICIES

CHAIN = 64
MEAN_NBYTES = 4096
LEASE_S = 2.0  # of the simulated clock, which an operation advances by 1 ms: leases do expire during the run
SUM = bytes(16)


def rss_bytes() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def shared(nbytes: int) -> memoryview:
    """Zeros that a forked process would share."""
    return memoryview(mmap.mmap(-1, nbytes))


def key(chain: int, block: int) -> bytes:
    """32 bytes that look random and cost no memory to remember."""
    return random.Random(chain * CHAIN + block).randbytes(32)


class Bench:
    """One index under load; `wall_us` and `cpu_us` hold every call's time by operation."""

    def __init__(self, entries: int, policy: str, kept: Memory) -> None:
        self.rng = random.Random(1)
        self.entries = entries
        before = rss_bytes()
        # Rows and bytes run out at about the same time.
        self.index = Index(
            capacity_bytes=entries * (MEAN_NBYTES + 64),
            max_entries=entries,
            seed=self.rng.getrandbits(64),
            lease_s=LEASE_S,
            policy=POLICIES[policy],
            kept=kept,
        )
        self.chains: list[int] = []
        self.next_chain = self.next_id = 0
        self.now = 0.0
        self.wall_us: dict[str, list[float]] = defaultdict(list)
        self.cpu_us: dict[str, list[float]] = defaultdict(list)
        started = time.perf_counter()
        while self.index.stats().entries + CHAIN < entries:
            self.put_chain(lambda _name, call: call(), MEAN_NBYTES)
        self.fill_s = time.perf_counter() - started
        self.rss_growth_bytes = rss_bytes() - before
        self.stats = self.index.stats()
        self.filled = self.stats.entries

    def timed(self, name: str, call: Callable[[], Any]) -> Any:
        """Runs `call` and keeps its times under `name`."""
        wall, cpu = time.perf_counter_ns(), time.thread_time_ns()
        result = call()
        cpu, wall = time.thread_time_ns() - cpu, time.perf_counter_ns() - wall
        self.wall_us[name].append(wall / 1000)
        self.cpu_us[name].append(cpu / 1000)
        return result

    def put_chain(self, run: Callable[[str, Callable[[], Any]], Any], mean_nbytes: int) -> None:
        """Stores the blocks of a new chain, parents first."""
        chain, parent = self.next_chain, bytes(32)
        self.next_chain += 1
        self.chains.append(chain)
        for block in range(CHAIN):
            name = key(chain, block)
            nbytes = self.rng.randint(mean_nbytes // 2, mean_nbytes * 3 // 2)
            answer: Reserved | Refusal = Refusal.AGAIN
            while answer is Refusal.AGAIN:
                self.next_id += 1
                reserve = partial(
                    self.index.reserve, 0, name, parent, nbytes, reservation_id=self.next_id, now=self.now
                )
                answer = run("reserve", reserve)
            if not isinstance(answer, Reserved):
                return
            self.index.begin_write(self.next_id, self.now)
            self.index.end_write(self.next_id)
            commit = partial(self.index.commit, header_nbytes=512, header_sum=SUM, expires_at=math.inf, now=self.now)
            stored = run("commit", partial(commit, self.next_id))
            assert stored
            parent = name

    def step(self) -> None:
        """One of the mixed operations, on a chain that is mostly a recent one."""
        self.now += 0.001
        self.next_id += 1
        chain = self.chains[int(len(self.chains) * self.rng.random() ** 0.25)]
        draw = self.rng.random()
        if draw < 0.45:
            keys, lease_id = [key(chain, block) for block in range(CHAIN)], self.next_id
            self.timed("acquire 64", lambda: self.index.acquire(0, keys, lease_id=lease_id, now=self.now, prefix=True))
            if draw < 0.40:  # the others let it expire
                self.timed("release 64", lambda: self.index.release(0, lease_id, self.now))
        elif draw < 0.85:
            keys = [key(chain + block // CHAIN, block % CHAIN) for block in range(4 * CHAIN)]
            self.timed("contains 256", lambda: self.index.contains(0, keys, self.now))
        elif draw < 0.90:
            keys = [key(chain, block) for block in range(CHAIN // 2, CHAIN)]
            self.timed("delete 32", lambda: self.index.delete(0, keys, self.now))
        else:
            # One in fifty is of large blocks: each evicts hundreds.
            self.put_chain(self.timed, MEAN_NBYTES * (256 if draw > 0.998 else 1))


def own_pause_ms(seconds: float) -> float:
    """The longest gap between two readings of the clock: what the machine does to a loop that does nothing."""
    longest, last = 0, time.perf_counter_ns()
    end = last + int(seconds * 1e9)
    while last < end:
        now = time.perf_counter_ns()
        longest, last = max(longest, now - last), now
    return longest / 1e6


def operation_figures(runs: list[Bench], name: str) -> dict[str, float]:
    """Times of one operation in microseconds: by the wall in the first run, and the least processor time of all."""
    wall = sorted(runs[0].wall_us[name])
    cpu = sorted(map(min, zip(*(run.cpu_us[name] for run in runs), strict=True)))
    return {
        "calls": len(wall),
        "calls_per_s": round(1e6 / statistics.fmean(cpu)),
        "p50": round(wall[len(wall) // 2], 1),
        "p99": round(wall[len(wall) * 99 // 100], 1),
        "longest": round(wall[-1], 1),
        "p99_cpu": round(cpu[len(cpu) * 99 // 100], 1),
        "longest_cpu": round(cpu[-1], 1),
    }


def report(runs: list[Bench]) -> dict[str, Any]:
    """Everything measured, by name; times in microseconds."""
    first = runs[0]
    operations = {name: operation_figures(runs, name) for name in sorted(first.wall_us)}
    return {
        "entries": first.filled,
        "bytes_per_entry": round(first.rss_growth_bytes / first.filled, 1),
        "fill_s": round(first.fill_s, 1),
        "runs": len(runs),
        "longest_pause_ms": round(max(times["longest"] for times in operations.values()) / 1000, 2),
        "longest_pause_cpu_ms": round(max(times["longest_cpu"] for times in operations.values()) / 1000, 2),
        "machine_pause_ms": round(own_pause_ms(5), 2),
        "evictions": first.stats.evictions,
        "expired_leases": first.stats.expired_leases,
        "operations_us": operations,
    }


def run(entries: int, operations: int, policy: str, *, held: bool) -> Bench:
    """Fills an index, works on it and lets it go; the figures stay."""
    bench = Bench(entries, policy, shared if held else heap)
    gc.collect()
    for _ in range(operations):
        bench.step()
    bench.stats = bench.index.stats()
    del bench.index
    return bench


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=2_000_000)
    parser.add_argument("--operations", type=int, default=20_000, help="mixed operations a run; a put counts as one")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--policy", choices=list(POLICIES), default="value")
    parser.add_argument("--held", action="store_true")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON ('-': to standard output)")
    arguments = parser.parse_args()
    runs: list[Bench] = []
    for number in range(arguments.runs):
        print(f"run {number + 1} of {arguments.runs}: {arguments.entries} entries", file=sys.stderr)
        runs.append(run(arguments.entries, arguments.operations, arguments.policy, held=arguments.held))
    figures = report(runs)
    if arguments.json == "-":
        print(json.dumps(figures, indent=2))
        return
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=2) + "\n")
    print("{entries} entries, {bytes_per_entry} bytes an entry (resident), filled in {fill_s} s".format(**figures))
    print(
        "longest call {longest_pause_ms} ms by the wall, {longest_pause_cpu_ms} ms processor time in the better of "
        "{runs} runs; a loop that does nothing pauses {machine_pause_ms} ms".format(**figures)
    )
    print(f"{'operation':14}{'calls':>9}{'calls/s':>10}{'p50 us':>9}{'p99 us':>9}{'longest':>10}{'longest cpu':>13}")
    for name, times in figures["operations_us"].items():
        print(
            f"{name:14}{times['calls']:9}{times['calls_per_s']:10}{times['p50']:9}{times['p99']:9}"
            f"{times['longest']:10}{times['longest_cpu']:13}"
        )


if __name__ == "__main__":
    main()
