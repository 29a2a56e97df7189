"""AsyncClient beside Client: verified gets from a real server process, one at a time and 32 at once.

    python benchmarks/bench_async.py [--rounds 15] [--json FILE|-]

A round is the same gets by the blocking client (32 at once: 32 threads, pooled) and by the asyncio one (32 tasks), one
after the other, so that a busy machine slows both; both may have 8 connections. The first two rounds are thrown away.
Every destination is compared once, outside the timed part. `lag` is how late a timer of 1 ms fired at worst while the
loop read 64 MiB in one call.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

import mmcache
from mmcache.keyset import Key, Keys
from mmcache.testing.process import ServerProcess

KiB, MiB = 1 << 10, 1 << 20
SIZES = {64 * KiB: 512, MiB: 128}  # gets in one timed run
STORED = 64
Array = np.ndarray[Any, np.dtype[np.uint8]]


def namespace(nbytes: int) -> mmcache.Namespace:
    """Keys of one size."""
    return mmcache.Namespace(kind="kv", model=f"benchmark/{nbytes}", dtype="uint8", layout="LBHNC", block_size=16)


async def gather(count: int, work: Callable[[int], Awaitable[object]], at_once: int) -> None:
    """`work(0..count-1)`, `at_once` of them at a time."""
    positions = iter(range(count))

    async def worker() -> None:
        for position in positions:
            await work(position)

    await asyncio.gather(*(worker() for _ in range(at_once)))


class Case:
    """One size and one concurrency over one way to the server."""

    def __init__(self, path: str, nbytes: int, at_once: int) -> None:
        self.path, self.nbytes, self.at_once, self.gets = path, nbytes, at_once, SIZES[nbytes]
        self.keys: Keys = namespace(nbytes).block_keys(range(STORED * 16))
        self.each: list[Key] = list(self.keys)
        rng = np.random.default_rng(nbytes)
        self.values: list[Array] = [rng.integers(0, 256, nbytes, dtype=np.uint8) for _ in self.each]
        self.targets: list[Array] = [np.zeros(nbytes, np.uint8) for _ in self.each]

    def check(self) -> None:
        """The bytes are those stored; forget them."""
        if not all(map(np.array_equal, self.values, self.targets)):
            raise SystemExit("BAD DATA: a read that was a hit has other bytes than were stored")
        for target in self.targets:
            target[:] = 0xA5

    def blocking(self, cache: mmcache.Client, pool: ThreadPoolExecutor) -> float:
        """Seconds a get takes, all gets' time over their number."""

        def get(position: int) -> None:
            row = position % STORED
            if not cache.get_into(self.each[row], [self.targets[row]])[0]:
                raise SystemExit("a read was no hit")

        start = time.perf_counter()
        if self.at_once == 1:
            for position in range(self.gets):
                get(position)
        else:
            list(pool.map(get, range(self.gets)))
        return (time.perf_counter() - start) / self.gets

    async def asynchronous(self, cache: mmcache.AsyncClient) -> float:
        """The same with tasks."""

        async def get(position: int) -> None:
            row = position % STORED
            if not (await cache.get_into(self.each[row], [self.targets[row]]))[0]:
                raise SystemExit("a read was no hit")

        start = time.perf_counter()
        await gather(self.gets, get, self.at_once)
        return (time.perf_counter() - start) / self.gets


async def lag_of(work: Awaitable[object]) -> float:
    """The most a timer of 1 ms was late while `work` ran, in seconds."""
    task = asyncio.ensure_future(work)
    worst = 0.0
    while not task.done():
        start = time.perf_counter()
        await asyncio.sleep(0.001)
        worst = max(worst, time.perf_counter() - start - 0.001)
    await task
    return worst


def row(case: Case, runs: list[tuple[float, float]]) -> dict[str, Any]:
    """One line of the report; the ratio is of speeds: blocking time / asyncio time."""
    low, middle, high = statistics.quantiles([one / other for one, other in runs], n=4)
    return {
        "path": case.path,
        "nbytes": case.nbytes,
        "at_once": case.at_once,
        "blocking_us": round(statistics.median(one for one, _ in runs) * 1e6, 1),
        "async_us": round(statistics.median(other for _, other in runs) * 1e6, 1),
        "ratio": round(middle, 2),
        "ratio_q1": round(low, 2),
        "ratio_q3": round(high, 2),
    }


async def measure(url: str, path: str, rounds: int) -> tuple[list[dict[str, Any]], float]:
    """All rows of one way to the server, and the median lag in seconds."""
    rows = []
    with mmcache.connect(url) as blocking, ThreadPoolExecutor(32) as pool:
        async with mmcache.AsyncClient(url) as cache:
            for nbytes in SIZES:
                for at_once in (1, 32):
                    case = Case(path, nbytes, at_once)
                    if not all(await cache.put(case.keys, case.values)):
                        raise SystemExit("a put was not stored")
                    runs = []
                    for _ in range(rounds + 2):
                        one = case.blocking(blocking, pool)
                        case.check()
                        runs.append((one, await case.asynchronous(cache)))
                        case.check()
                    rows.append(row(case, runs[2:]))
            lags = [await lag_of(cache.get_into(case.keys, case.targets)) for _ in range(rounds)]
    return rows, statistics.median(lags)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="interleaved pairs a row (default 15)")
    parser.add_argument("--json", metavar="FILE", help="also write JSON, - for standard output")
    options = parser.parse_args()
    report: dict[str, Any] = {"rows": [], "lag_ms": {}}
    with ServerProcess("1GiB", "--prefault") as server:
        for path in ("shm", "tcp"):
            rows, lag_s = asyncio.run(measure(f"{server.url}?transport={path}", path, options.rounds))
            report["rows"] += rows
            report["lag_ms"][path] = round(lag_s * 1e3, 2)
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {platform.python_version()}")
    for entry in report["rows"]:
        print(
            "{path} {nbytes:>8} bytes, {at_once:>2} at once: {async_us:>7} us a get, blocking {blocking_us:>7}, "
            "ratio {ratio:.2f} [{ratio_q1:.2f}, {ratio_q3:.2f}], verified".format(**entry)
        )
    print("lag of the loop during a get of 64 MiB, median, ms: {shm} (shm), {tcp} (tcp)".format(**report["lag_ms"]))
    if options.json == "-":
        print(json.dumps(report, indent=1))
    elif options.json:
        with open(options.json, "w") as file:
            file.write(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
