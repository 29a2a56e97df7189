"""A soak: a real server under eight client processes for minutes, then thousands of connections; nothing may leak.

    python benchmarks/soak.py --minutes 5 --connects 10000 [--json]

The clients' working set is four times what the server holds. They put, get, lease, ask, delete and let entries lapse,
half of them over shared memory, half over TCP, and compare every value that comes back with its recomputation. Now and
then one is killed with SIGKILL and started again. Exits 1 if a byte was wrong, an entry outlived its time, a data call
raised, or the server's resident memory, descriptors or threads are not flat. FLAT: the median of the last quarter lies
within 5% of the second quarter's (the first one fills the cache), or, for descriptors and threads, within one.
The connections leave no leak if descriptors and threads are no more than before, and memory grew by 5% at most.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import numpy as np  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import Progress, TaskID  # noqa: E402

import mmcache  # noqa: E402
from benchmarks.soak_client import COUNTERS, Board, run_client, working_set  # noqa: E402
from benchmarks.soak_connects import connect_and_leave  # noqa: E402
from mmcache.config import parse_nbytes  # noqa: E402
from mmcache.testing.process import ServerProcess  # noqa: E402

TIMES_CAPACITY = 4
TOLERANCE = 0.05
START_S = 60.0  # for all the clients to be at work
SETTLE_S = 30.0
CALM = 5  # samples alike
DEADLINE_S = 7.0  # a quarter of the leases, so that nobody is warned


class Sample(NamedTuple):
    """What the server process holds: resident bytes, open descriptors, threads."""

    rss: int
    fds: int
    threads: int


def sample(pid: int) -> Sample:
    """Read it from /proc."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    fds = len(os.listdir(f"/proc/{pid}/fd"))
    return Sample(int(status["VmRSS"].split()[0]) * 1024, fds, int(status["Threads"]))


def quarters(samples: Sequence[Sample]) -> list[Sample]:
    """The medians of each quarter of the samples."""
    step = len(samples) / 4
    parts = [samples[int(step * i) : max(int(step * (i + 1)), int(step * i) + 1)] for i in range(4)]
    return [Sample(*(int(statistics.median(column)) for column in zip(*part, strict=True))) for part in parts]


def is_flat(name: str, second: float, last: float) -> bool:
    """Whether a median stayed: see the top of this file."""
    return abs(last - second) <= max(TOLERANCE * second, 0 if name == "rss" else 1)


class Clients:
    """The client processes: started, killed now and then, started again."""

    def __init__(self, server: ServerProcess, count: int, keys: int, file: Path) -> None:
        self._spawn = multiprocessing.get_context("spawn")
        self._server, self._count, self._keys, self._file = server, count, keys, file
        self._seed = self.killed = 0
        self._random = random.Random(0)
        self._processes = [self._start(row) for row in range(count)]

    def _start(self, row: int) -> Any:
        self._seed += 1
        url = f"{self._server.url}?transport={'shm' if row % 2 else 'tcp'}"
        arguments = (url, self._seed, self._keys, self._file, self._count, row)
        process = self._spawn.Process(target=run_client, args=arguments)
        process.start()
        return process

    def kill_one(self) -> None:
        """SIGKILL whichever, and start it again."""
        row = self._random.randrange(self._count)
        os.kill(self._processes[row].pid, signal.SIGKILL)
        self._processes[row].join()
        self._processes[row] = self._start(row)
        self.killed += 1

    def end(self) -> list[int | None]:
        """Wait for all; their exit codes."""
        for process in self._processes:
            process.join(60)
        return [process.exitcode for process in self._processes]


def soak(server: ServerProcess, options: argparse.Namespace, progress: Progress, task: TaskID) -> dict[str, Any]:
    """Run the clients; what they counted, and the server's samples by quarter."""
    seconds = options.minutes * 60
    keys = working_set(TIMES_CAPACITY * parse_nbytes(options.memory))
    samples: list[Sample] = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "counts"
        Board.create(file, options.clients)
        board = Board(file, options.clients)
        clients = Clients(server, options.clients, keys, file)
        end = time.monotonic() + START_S
        while not board.counts[:, COUNTERS.index("ops")].all() and time.monotonic() < end:
            time.sleep(0.05)
        begin = time.monotonic()
        interval_s = min(1.0, seconds / 40)
        next_kill = begin + options.kill_every
        while (now := time.monotonic()) < begin + seconds:
            samples.append(sample(server.pid))
            progress.update(task, completed=now - begin)
            if now >= next_kill:
                clients.kill_one()
                next_kill = time.monotonic() + options.kill_every
            time.sleep(interval_s)
        board.end()
        codes = clients.end()
        counted = dict(zip(COUNTERS, map(int, np.sum(board.counts, axis=0)), strict=True))
    medians = quarters(samples)
    flat = {name: is_flat(name, *(getattr(medians[i], name) for i in (1, 3))) for name in Sample._fields}
    reads = counted["hits"] + counted["misses"]
    return counted | {
        "seconds": round(seconds, 1),
        "clients": options.clients,
        "killed": clients.killed,
        "working_set_keys": keys,
        "ops_per_s": round(counted["ops"] / seconds, 1),
        "hit_rate": round(counted["hits"] / reads, 4) if reads else 0.0,
        "quarters": [median._asdict() for median in medians],
        "flat": flat,
        "ok": all(flat.values())
        and codes == [0] * options.clients
        and counted["compared"] > 0
        and not any(counted[name] for name in ("wrong", "stale", "raised")),
    }


def has_more(now: Sample, then: Sample) -> bool:
    """Descriptors or threads."""
    return now.fds > then.fds or now.threads > then.threads


def settled(server: ServerProcess, wanted: Sample | None = None) -> Sample:
    """A sample once no client is connected: when it has no more than `wanted`, or was the same for a while, as whoever
    asked last may be leaving still, or time is up."""
    end = time.monotonic() + SETTLE_S
    with mmcache.connect(server.url, deadline_s=DEADLINE_S) as cache:
        while cache.stat()["counters"]["connections"] > 1 and time.monotonic() < end:
            time.sleep(0.05)
    now, alike = sample(server.pid), 0
    while time.monotonic() < end and (alike < CALM if wanted is None else has_more(now, wanted)):
        time.sleep(0.2)
        before, now = now, sample(server.pid)
        alike = alike + 1 if now[1:] == before[1:] else 0
    return now


def connects(server: ServerProcess, count: int, progress: Progress, task: TaskID) -> dict[str, Any]:
    """Connect and leave `count` times; what the server held before and after."""
    before = settled(server)
    begin = time.monotonic()
    connect_and_leave(server, count, lambda done: progress.update(task, completed=done))
    seconds = time.monotonic() - begin
    after = settled(server, before)
    with mmcache.connect(server.url, deadline_s=DEADLINE_S) as cache:
        counters = cache.stat()["counters"]
    held = {name: counters[name] for name in ("reservations", "inflight_bytes")}
    no_leak = not has_more(after, before) and after.rss <= (1 + TOLERANCE) * before.rss and not any(held.values())
    return {
        "connects": count,
        "seconds": round(seconds, 1),
        "before": before._asdict(),
        "after": after._asdict(),
        **held,
        "ok": no_leak,
    }


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    ran, ended = report["soak"], report["connects"]
    lines = [
        f"soak: {ran['seconds']:g} s, {ran['clients']} clients ({ran['killed']} killed), {report['memory']} of memory, "
        f"working set {TIMES_CAPACITY} times that",
        f"  {ran['ops']} calls, {ran['ops_per_s']:g}/s, hit rate {100 * ran['hit_rate']:.1f}%, "
        f"{ran['compared']} values ({ran['compared_bytes'] / 1e9:.1f} GB) compared",
        "  "
        + ", ".join(f"{name}={ran[name]}" for name in COUNTERS if name not in ("ops", "compared", "compared_bytes")),
        f"  {'server, median of quarter':28}{'1':>12}{'2':>12}{'3':>12}{'4':>12}  flat",
    ]
    for name, unit in zip(Sample._fields, (1 << 20, 1, 1), strict=True):
        label = "resident MiB" if name == "rss" else name
        cells = "".join(f"{quarter[name] / unit:12.1f}" for quarter in ran["quarters"])
        lines.append(f"  {label:28}{cells}  {'yes' if ran['flat'][name] else 'NO'}")
    if ended:
        lines.append(f"connects: {ended['connects']} in {ended['seconds']:g} s")
        for when in ("before", "after"):
            held = ended[when]
            lines.append(
                f"  {when:8}{held['rss'] / 2**20:10.1f} MiB{held['fds']:6} descriptors{held['threads']:6} threads"
            )
    return "\n".join([*lines, "ok" if report["ok"] else "NOT OK"])


def main(arguments: list[str] | None = None) -> int:
    """Run both, print, and say by the exit code whether all is well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--memory", default="64MiB", help="the server's; the working set is four times that")
    parser.add_argument("--kill-every", type=float, default=15.0, metavar="SECONDS")
    parser.add_argument("--connects", type=int, default=10_000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    with (
        ServerProcess(options.memory, "--lease-s", "30") as server,
        Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress,
    ):
        task = progress.add_task("soak", total=options.minutes * 60)
        ran = soak(server, options, progress, task)
        ended: dict[str, Any] = {}
        if options.connects:
            task = progress.add_task("connects", total=options.connects)
            ended = connects(server, options.connects, progress, task)
        code = server.stop()
        said = server.said
    report = {"memory": options.memory, "soak": ran, "connects": ended, "server_exit": code, "server_said": said}
    report["ok"] = ran["ok"] and (not ended or ended["ok"]) and code == 0 and not said
    print(json.dumps(report) if options.json else table(report))
    if said:
        print(f"the server said:\n{said}", file=sys.stderr)
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
