"""First figures of the data path: real server process, verified reads, ratios to a baseline in the same process.

    python benchmarks/bench_spine.py [--rounds 15] [--json FILE|-]      exits 1 if a bar was missed

Every round times the baseline and then the measured operation on the same bytes (interleaved pairs), so a busy machine
slows both. Destinations are poisoned before each read and their digests compared after it, outside the timed part.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import blake3
import numpy as np

import mmcache
from mmcache.keyset import Keys
from mmcache.testing.process import ServerProcess

MiB = 1 << 20
BLOCKS, BLOCK_NBYTES = 64, MiB
SMALL_NBYTES = 64 << 10
RAW_SERVER = """
import os, socket, sys
total, piece = int(sys.argv[1]), int(sys.argv[2])
data = [memoryview(os.urandom(piece)) for _ in range(total // piece)]
listener = socket.create_server(("127.0.0.1", 0)); print(listener.getsockname()[1], flush=True)
peer, _ = listener.accept(); peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
while True:
    asked = b""
    while len(asked) < 64:
        got = peer.recv(64 - len(asked))
        if not got: sys.exit()
        asked += got
    for view in data: peer.sendall(view)
"""


class RawPeer:
    """The floor for TCP: 64 bytes out, the same number of bytes back, one stream, blocking sockets, no checks."""

    def __init__(self) -> None:
        words = [sys.executable, "-c", RAW_SERVER, str(BLOCKS * BLOCK_NBYTES), str(BLOCK_NBYTES)]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.sock = socket.create_connection(("127.0.0.1", int(self.process.stdout.readline())))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def fetch(self, targets: list[np.ndarray[Any, Any]]) -> None:
        """One request, every target filled."""
        self.sock.sendall(bytes(64))
        for target in targets:
            view = target.data
            while len(view):
                view = view[self.sock.recv_into(view, 0, socket.MSG_WAITALL) :]

    def close(self) -> None:
        """End the peer."""
        self.sock.close()
        self.process.wait(10)


def digests_of(arrays: list[np.ndarray[Any, Any]]) -> list[bytes]:
    """BLAKE3 of each: tells whether the bytes arrived without reading the source, which would warm it for one side."""
    return [blake3.blake3(array.data).digest() for array in arrays]


def timed(work: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def quartiles(values: list[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return statistics.quantiles(values, n=4)


def pairs(rounds: int, baseline: Callable[[], object], measured: Callable[[], float]) -> list[tuple[float, float]]:
    """(baseline seconds, measured seconds) of interleaved runs; two warm-up rounds are thrown away."""
    return [(timed(baseline), measured()) for _ in range(rounds + 2)][2:]


def row(name: str, bar: float | None, runs: list[tuple[float, float]], nbytes: int) -> dict[str, Any]:
    """One line of the report: the ratio of speeds (baseline time / measured time) with quartiles."""
    low, middle, high = quartiles([base / own for base, own in runs])
    return {
        "name": name,
        "ratio": round(middle, 3),
        "ratio_q1": round(low, 3),
        "ratio_q3": round(high, 3),
        "bar": bar,
        "ok": bar is None or middle >= bar,
        "gbps": round(nbytes / statistics.median(own for _, own in runs) / 1e9, 2),
        "baseline_gbps": round(nbytes / statistics.median(base for base, _ in runs) / 1e9, 2),
        "pairs": len(runs),
    }


def measure(rounds: int) -> list[dict[str, Any]]:
    """All rows."""
    rng = np.random.default_rng(0)
    sources = [rng.integers(0, 256, BLOCK_NBYTES, dtype=np.uint8) for _ in range(BLOCKS)]
    targets = [np.full(BLOCK_NBYTES, 0xA5, np.uint8) for _ in range(BLOCKS)]
    namespace = mmcache.Namespace(kind="kv", model="benchmark/none", dtype="uint8", layout="LBHNC", block_size=16)
    keys = namespace.block_keys(range(BLOCKS * 16))
    nbytes = BLOCKS * BLOCK_NBYTES
    digests = digests_of(sources)

    def copy_blocks() -> None:
        for source, target in zip(sources, targets, strict=True):
            np.copyto(target, source)

    def verified_get(cache: mmcache.Client) -> float:
        for target in targets:
            target[:] = 0xA5
        start = time.perf_counter()
        results = cache.get_into(keys, targets)
        seconds = time.perf_counter() - start
        if not all(results) or digests_of(targets) != digests:
            raise SystemExit("BAD DATA: a read was not a hit with the right bytes")
        return seconds

    def put(cache: mmcache.Client) -> float:
        cache.delete(keys)
        start = time.perf_counter()
        results = cache.put(keys, sources)
        seconds = time.perf_counter() - start
        if any(result.outcome != "stored" for result in results):
            raise SystemExit(f"a put was not stored: {results}")
        return seconds

    rows = []
    with ServerProcess("1GiB", "--prefault") as server:
        with mmcache.connect(server.url) as cache:
            if cache.stat()["transport"] != "shm":
                raise SystemExit("shared memory is not in use")
            rows.append(
                row(
                    "put 64 x 1 MiB, shared memory / memcpy",
                    0.35,
                    pairs(rounds, copy_blocks, lambda: put(cache)),
                    nbytes,
                )
            )
            runs = pairs(rounds, copy_blocks, lambda: verified_get(cache))
            rows.append(row("verified get 64 x 1 MiB, shared memory, 2 copy threads / memcpy", 0.70, runs, nbytes))
            rows.append(small_gets(cache, namespace.block_keys(range(256 * 16))[BLOCKS:]))
        with mmcache.connect(server.url + "?copy_threads=1") as single:
            runs = pairs(rounds, copy_blocks, lambda: verified_get(single))
            rows.append(row("verified get 64 x 1 MiB, shared memory, 1 copy thread / memcpy", None, runs, nbytes))
        raw = RawPeer()
        with mmcache.connect(server.url + "?transport=tcp") as cache:
            runs = pairs(rounds, lambda: raw.fetch(targets), lambda: verified_get(cache))
            rows.append(row("verified get 64 x 1 MiB, TCP / raw socket", 0.80, runs, nbytes))
        raw.close()
    return rows


def small_gets(cache: mmcache.Client, keys: Keys) -> dict[str, Any]:
    """Latency of single verified 64 KiB gets."""
    rng = np.random.default_rng(1)
    values = [rng.integers(0, 256, SMALL_NBYTES, dtype=np.uint8) for _ in keys]
    assert all(cache.put(keys, values))
    target = np.zeros(SMALL_NBYTES, np.uint8)
    seconds = []
    for repeat in range(12):
        for key, value in zip(keys, values, strict=True):
            target[:] = 0xA5
            start = time.perf_counter()
            result = cache.get_into(key, [target])
            if repeat > 1:
                seconds.append(time.perf_counter() - start)
            if not all(result) or not np.array_equal(target, value):
                raise SystemExit("BAD DATA: a 64 KiB read was not a hit with the right bytes")
    cuts = statistics.quantiles(seconds, n=100)
    return {
        "name": "verified get 64 KiB, shared memory, p50 us",
        "p50_us": round(cuts[49] * 1e6, 1),
        "p99_us": round(cuts[98] * 1e6, 1),
        "bar": 80,
        "ok": cuts[49] * 1e6 <= 80,
        "gets": len(seconds),
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="interleaved pairs a row (default 15)")
    parser.add_argument("--json", metavar="FILE", help="also write JSON, - for standard output")
    options = parser.parse_args()
    rows = measure(options.rounds)
    load, python = os.getloadavg()[0], platform.python_version()
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {load:.1f}, Python {python}")
    for entry in rows:
        if "ratio" in entry:
            text = "{ratio:.2f} [{ratio_q1:.2f}, {ratio_q3:.2f}] of {baseline_gbps} GB/s".format(**entry)
        else:
            text = f"{entry['p50_us']} us (p99 {entry['p99_us']})"
        verdict = "ok  " if entry["ok"] else "MISS"
        print(f"{verdict} {entry['name']}: {text}, bar {entry['bar'] or 'none'}, verified")
    if options.json:
        text = json.dumps({"rows": rows, "load": load}, indent=1)
        if options.json == "-":
            print(text)
        else:
            with open(options.json, "w") as file:
                file.write(text + "\n")

    if not all(entry["ok"] for entry in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
