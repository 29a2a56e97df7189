"""`mmcache bench transfer`: how fast values move between a client and a server in another process, beside memcpy.

Rows over shared memory, unix sockets and TCP; get, put and acquire; by size, batch and number of clients, each client
a process (transfer_worker.py). Every round times memcpy of the same values in the same process and then the operation,
so a busy machine slows both, and is compared afterwards. Medians of the rounds.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape

from mmcache.bench.report import bullets, data_table, host
from mmcache.bench.transfer_page import size_text
from mmcache.bench.transfer_worker import calls_of
from mmcache.errors import ConfigError, TransportError
from mmcache.testing.process import ServerProcess
from mmcache.units import count

KiB, MiB = 1 << 10, 1 << 20
OPS = ("get", "put", "acquire")
TRANSPORTS = ("shm", "unix", "tcp")
CLIENTS = (1, 2)
SERVER_MEMORY = "1GiB"
MEASURED = (
    "time of each call of clients in processes of their own, a server in another, all on this machine",
    "memcpy in the same processes, in turns with the calls: the same values, one copy each, on one thread",
    "a bare TCP socket, blocking, one stream of 64 MiB, nothing checked: the floor for TCP",
    "what was delivered: destinations poisoned before each round and digests compared after it; a put is read back",
)
MODELLED = ("values: random bytes, all different; nothing else is made up",)
NOTES = (
    "ratio to memcpy: median over the rounds of memcpy's time over the operation's, the same bytes on the same number "
    "of processes at once; GB/s is that of all clients together",
    "verified: checksums of the bytes as they arrived were checked within the time shown: a get's by the client where "
    "they were delivered, a put's by the server before it counts as stored; acquire's views are unverified",
    "acquire: over shared memory no byte moves, so its GB/s says how much came into view a second; over sockets it "
    "receives whole values into new memory",
)


@dataclass(frozen=True)
class Plan:
    """What is measured: (bytes of a value, values a call) pairs, and how long and often a row's rounds go on.

    A row takes `row_s`, or its share of what is left of `all_s` if that is less, but `least_rounds` in any case.
    """

    cases: tuple[tuple[int, int], ...]
    row_s: float
    all_s: float
    least_rounds: int
    most_rounds: int
    memcpy_rounds: int
    round_nbytes: int  # about what a round of calls for few bytes moves


FULL = Plan(((64 * KiB, 1), (MiB, 1), (MiB, 64), (16 * MiB, 1)), 0.3, 40.0, 3, 40, 9, 16 * MiB)
QUICK = Plan(((64 * KiB, 1), (MiB, 4)), 0.03, 5.0, 2, 5, 2, 4 * MiB)


@dataclass(frozen=True, kw_only=True)
class TransferOptions:
    """What to run.

    Attributes:
        quick: fewer rows and rounds.
        verify: let the client verify what it gets.
        copy_threads: of a client, for large batches from shared memory.
        seed: of the values; 0 or more.
    """

    quick: bool = False
    verify: bool = True
    copy_threads: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.copy_threads < 1:
            raise ConfigError(f"{self.copy_threads} copy threads asked for: choose 1 or more")
        if self.seed < 0:
            raise ConfigError(f"seed {self.seed} is negative: choose 0 or more")


@dataclass(frozen=True)
class Row:
    """One measurement; docs/bench.md explains the fields."""

    transport: str
    op: str
    size_bytes: int
    batch: int
    clients: int
    gbps: float
    ratio_to_memcpy: float
    p50_us: float
    p99_us: float
    verified: bool


@dataclass(frozen=True)
class TransferReport:
    """The rows; memcpy of 64 MiB (whole and in slices of 256 KiB) and a bare TCP socket; what was wrong or failed."""

    rows: Sequence[Row]
    memcpy_gbps: Mapping[str, float]
    raw_tcp_gbps: float
    compared: int
    wrong: int
    failed: int
    reason: str
    options: TransferOptions
    wall_s: float

    @property
    def ok(self) -> bool:
        """Whether all is as it must be."""
        return not self.complaints()

    def complaints(self) -> list[str]:
        """What is not as it must be, in words."""
        found = [f"{count(self.wrong, 'value')} differed from what was stored"] if self.wrong else []
        failed = f"{count(self.failed, 'value')} did not come back or were not stored (first reason: {self.reason})"
        return found + ([failed] if self.failed else [])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the field names are documented in docs/bench.md."""
        return {
            "workload": {"name": "transfer", **asdict(self.options), "server_memory": SERVER_MEMORY},
            "rows": [asdict(row) for row in self.rows],
            "memcpy_gbps": dict(self.memcpy_gbps),
            "raw_tcp_gbps": self.raw_tcp_gbps,
            "compared": self.compared,
            "wrong": self.wrong,
            "failed": self.failed,
            "ok": self.ok,
            "complaints": self.complaints(),
            "wall_s": round(self.wall_s, 3),
            "host": host(),
            "measured": list(MEASURED),
            "modelled": list(MODELLED),
            "notes": list(NOTES),
        }

    def print(self, console: Console) -> None:
        """The table and the verdict, for people."""
        whole, sliced = (f"{self.memcpy_gbps[name]:.1f} GB/s" for name in ("single", "sliced"))
        console.print(
            f"[bold]mmcache bench transfer[/]: memcpy of 64 MiB {whole} whole, {sliced} in slices of 256 KiB; "
            f"a bare TCP socket {self.raw_tcp_gbps:.1f} GB/s; {self.wall_s:.1f} s",
            highlight=False,
        )
        table = data_table("path", "op", "a call", "GB/s", "/memcpy", "p50 us", "p99 us", "verified")
        before = ""
        for row in self.rows:
            path = row.transport if row.clients == 1 else f"{row.transport} x {row.clients}"
            if before not in ("", path):
                table.add_section()
            table.add_row(
                path if path != before else "",
                row.op,
                f"{row.batch} x {size_text(row.size_bytes)}",
                f"{row.gbps:,.2f}",
                f"{row.ratio_to_memcpy:,.2f}",
                f"{row.p50_us:,.0f}",
                f"{row.p99_us:,.0f}",
                "yes" if row.verified else "no",
            )
            before = path
        console.print(table)
        console.print(bullets(["x 2: by two clients at once", *NOTES]), highlight=False)
        if self.ok:
            console.print(
                f"[bold green]as it must be[/]: {count(self.compared, 'value')} compared, none wrong", highlight=False
            )
        else:
            console.print(f"[bold red]NOT as it must be[/]: {escape('; '.join(self.complaints()))}", highlight=False)


class _Worker:
    """A measuring process. Ask, then take the answer: several asked before any answers work at the same time."""

    def __init__(self) -> None:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  # closed in `end`
        words = [sys.executable, "-m", "mmcache.bench.transfer_worker"]
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, text=True
        )

    def ask(self, **order: Any) -> None:
        """Send one order. Raises TransportError if the process has ended."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        except OSError:
            self._raise()

    def answer(self) -> dict[str, Any]:
        """Wait for its answer. Raises TransportError, with its own last words, if there is none."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._raise()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _raise(self) -> None:
        self._process.wait(10)
        self._stderr.seek(0)
        said = self._stderr.read().decode(errors="replace").strip().splitlines()
        raise TransportError(f"a measuring process ended: {said[-1] if said else 'it said nothing'}")

    def end(self) -> None:
        """Close its stdin, on which it ends; kill it if it does not."""
        try:
            self._process.communicate(timeout=10)
        except (subprocess.TimeoutExpired, OSError):
            self._process.kill()
            self._process.communicate()
        self._stderr.close()


def run(options: TransferOptions, progress: Callable[[int, int], None] | None = None) -> TransferReport:
    """Measure every row. `progress` is called with (rows done, rows in all).

    Raises TransportError if a server or a measuring process cannot be started, or ends.
    """
    plan = QUICK if options.quick else FULL
    todo = [(clients, op, *case) for clients in CLIENTS for op in OPS for case in plan.cases]
    rows: list[Row] = []
    sums: dict[str, Any] = {"compared": 0, "wrong": 0, "failed": 0, "reason": ""}
    memcpy: dict[str, list[float]] = {"single": [], "sliced": []}
    started = time.perf_counter()
    with ServerProcess(SERVER_MEMORY, "--prefault") as server, _workers() as workers:
        for transport in TRANSPORTS:
            _open(workers, f"{_url(server, transport)}&copy_threads={options.copy_threads}", transport, options)
            _memcpy(workers[0], memcpy, plan.memcpy_rounds)
            for clients, op, size_bytes, batch in todo:
                left_s = started + plan.all_s - time.perf_counter()
                row_s = min(plan.row_s, left_s / (len(todo) * len(TRANSPORTS) - len(rows)))
                rounds = _rounds(workers[:clients], plan, row_s, (op, size_bytes, batch), sums)
                verified = op == "put" or (op == "get" and options.verify)
                calls = len(rounds[0][0].call_ns)
                rows.append(row_of((transport, op, size_bytes, batch, clients), rounds, calls, verified))
                if progress is not None:
                    progress(len(rows), len(todo) * len(TRANSPORTS))
        _add_up(workers, sums)
        workers[0].ask(do="raw", rounds=plan.memcpy_rounds)
        raw_tcp = workers[0].answer()["gbps"]
    return TransferReport(
        rows=rows,
        memcpy_gbps={name: round(statistics.median(found), 2) for name, found in memcpy.items()},
        raw_tcp_gbps=round(statistics.median(raw_tcp), 2),
        options=options,
        wall_s=time.perf_counter() - started,
        **sums,
    )


@dataclass(frozen=True)
class OneRound:
    """One client's part of a round: nanoseconds of memcpy, and of each call."""

    copy_ns: int
    call_ns: Sequence[int]


def _rounds(
    workers: Sequence[_Worker], plan: Plan, row_s: float, what: tuple[str, int, int], sums: dict[str, Any]
) -> list[list[OneRound]]:
    """The rounds of one row, all clients of a round at the same time; the first round only warms up."""
    op, size_bytes, batch = what
    calls = calls_of(size_bytes, batch, plan.round_nbytes)
    _all(workers, do="prepare", op=op, size_bytes=size_bytes, batch=batch, calls=calls)
    rounds: list[list[OneRound]] = []
    ends = time.monotonic() + row_s
    while len(rounds) <= plan.least_rounds or (len(rounds) <= plan.most_rounds and time.monotonic() < ends):
        copies = _all(workers, do="copy")
        _all(workers, do="reset")
        times = _all(workers, do="call")
        _all(workers, do="check")
        sums["compared"] += batch * calls * len(workers)
        rounds.append([OneRound(copy["ns"], each["ns"]) for copy, each in zip(copies, times, strict=True)])
    _all(workers, do="finish")
    return rounds[1:]


def row_of(
    what: tuple[str, str, int, int, int], rounds: Sequence[Sequence[OneRound]], calls: int, verified: bool
) -> Row:
    """The figures of a row from its rounds (a part for each client) of so many calls."""
    transport, op, size_bytes, batch, clients = what
    nbytes = size_bytes * batch * calls
    per_client = [[part[client] for part in rounds] for client in range(clients)]
    gbps = sum(nbytes / statistics.median(sum(one.call_ns) for one in own) for own in per_client)
    ratio = statistics.median(one.copy_ns / sum(one.call_ns) for own in per_client for one in own)
    calls_us = np.array([ns for own in per_client for one in own for ns in one.call_ns]) / 1e3
    p50, p99 = (round(float(cut), 1) for cut in np.percentile(calls_us, [50, 99]))
    return Row(transport, op, size_bytes, batch, clients, round(gbps, 3), round(ratio, 3), p50, p99, verified)


def _all(workers: Sequence[_Worker], **order: Any) -> list[dict[str, Any]]:
    """Give all the same order, and wait for all."""
    for worker in workers:
        worker.ask(**order)
    return [worker.answer() for worker in workers]


def _memcpy(worker: _Worker, found: dict[str, list[float]], rounds: int) -> None:
    worker.ask(do="memcpy", rounds=rounds)
    for name, values in worker.answer().items():
        found[name] += values


def _add_up(workers: Sequence[_Worker], sums: dict[str, Any]) -> None:
    for answer in _all(workers, do="totals"):
        sums["wrong"] += answer["wrong"]
        sums["failed"] += answer["failed"]
        sums["reason"] = sums["reason"] or answer["reason"]


@contextmanager
def _workers() -> Iterator[list[_Worker]]:
    """As many processes as clients are ever needed."""
    with ExitStack() as stack:
        workers = []
        for _ in range(max(CLIENTS)):
            workers.append(_Worker())
            stack.callback(workers[-1].end)
        yield workers


def _open(workers: Sequence[_Worker], url: str, transport: str, options: TransferOptions) -> None:
    """Connect all. Raises TransportError if the values would not travel as asked for."""
    for place, worker in enumerate(workers):
        worker.ask(do="open", url=url, verify=options.verify, seed=options.seed * max(CLIENTS) + place)
    for worker in workers:
        path = worker.answer()["transport"]
        if path != transport:
            raise TransportError(f"asked for {transport}, but the values would travel by {path}")


def _url(server: ServerProcess, transport: str) -> str:
    if transport == "unix":
        return f"mmcache+unix://{server.unix_path}?transport=tcp"  # framed, as over TCP
    return f"{server.url}?transport={transport}"
