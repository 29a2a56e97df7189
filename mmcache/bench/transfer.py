"""`mmcache bench transfer`: how fast values move between a client and a server in another process, beside memcpy.

Rows over shared memory, unix sockets, TCP and, where it is asked for, NIXL; get, put and acquire; by size, batch and
number of clients, each client a process (transfer_worker.py). Every round times memcpy of the same values in the same
process and then the operation, so a busy machine slows both, and is compared afterwards. Medians of the rounds. Then,
for each transport, small gets while another client streams large values, in turns with the same gets while nobody does.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mmcache.bench.transfer_process import Worker, all_do, cpu_ns, workers_of
from mmcache.bench.transfer_report import TransferReport
from mmcache.bench.transfer_rows import LEAST_FOR_P999, MixedRow, OneRound, Round, Row, mixed_row_of, row_of
from mmcache.bench.transfer_worker import MOST_NBYTES, calls_of
from mmcache.errors import ConfigError, TransportError
from mmcache.testing.process import ServerProcess, children_of
from mmcache.transport.nixl import LOOPBACK

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30
OPS = ("get", "put", "acquire")
USUAL = ("shm", "unix", "tcp")
TRANSPORTS = (*USUAL, "nixl")  # which may not be installed
CLIENTS = (1, 2)
MOST_CLIENTS = 16
SMALL_NBYTES = 64 * KiB
STREAM_NBYTES = 16 * MiB


@dataclass(frozen=True)
class Plan:
    """What is measured: (bytes of a value, values a call) pairs, and how long and often a row's rounds go on.

    A row takes `row_s`, or its share of what is left of `all_s` if that is less, but `least_rounds` in any case, and
    of small gets as many as make `least_small_calls` calls by each client. `read` is the pair that is also read after
    the copy. Of mixed load there are `mixed_turns` of `mixed_rounds` without and with it.
    """

    cases: tuple[tuple[int, int], ...]
    read: tuple[int, int]
    row_s: float
    all_s: float
    least_rounds: int
    most_rounds: int
    memcpy_rounds: int
    round_nbytes: int  # about what a round of calls for few bytes moves
    least_small_calls: int
    mixed_turns: int
    mixed_rounds: int


FULL = Plan(
    cases=((SMALL_NBYTES, 1), (MiB, 1), (MiB, 64), (16 * MiB, 1)),
    read=(MiB, 64),
    row_s=0.3,
    all_s=40.0,
    least_rounds=15,
    most_rounds=40,
    memcpy_rounds=15,
    round_nbytes=16 * MiB,
    least_small_calls=2 * LEAST_FOR_P999,
    mixed_turns=15,
    mixed_rounds=5,
)
QUICK = Plan(
    cases=((SMALL_NBYTES, 1), (MiB, 4)),
    read=(MiB, 4),
    row_s=0.03,
    all_s=5.0,
    least_rounds=2,
    most_rounds=5,
    memcpy_rounds=2,
    round_nbytes=4 * MiB,
    least_small_calls=0,
    mixed_turns=2,
    mixed_rounds=2,
)


@dataclass(frozen=True, kw_only=True)
class TransferOptions:
    """What to run.

    Attributes:
        quick: fewer rows and rounds.
        transports: of TRANSPORTS.
        clients: numbers of processes at once, 1 to 16; each is measured.
        verify: let the client verify what it gets.
        copy_threads: of a client, for large batches from shared memory.
        seed: of the values; 0 or more.
    """

    quick: bool = False
    transports: tuple[str, ...] = USUAL
    clients: tuple[int, ...] = CLIENTS
    verify: bool = True
    copy_threads: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for transport in self.transports:
            if transport not in TRANSPORTS:
                raise ConfigError(f"transport {transport!r} is unknown; choose {', '.join(TRANSPORTS)}")
        for clients in self.clients:
            if not 1 <= clients <= MOST_CLIENTS:
                raise ConfigError(f"{clients} clients asked for: choose 1 to {MOST_CLIENTS}")
        if not self.transports or not self.clients:
            raise ConfigError("no transport, or no number of clients, to measure: name one of each")
        if self.copy_threads < 1:
            raise ConfigError(f"{self.copy_threads} copy threads asked for: choose 1 or more")
        if self.seed < 0:
            raise ConfigError(f"seed {self.seed} is negative: choose 0 or more")
        object.__setattr__(self, "transports", tuple(dict.fromkeys(self.transports)))
        object.__setattr__(self, "clients", tuple(sorted(set(self.clients))))

    @property
    def memory_nbytes(self) -> int:
        """Of the server: what all clients store at once is under the half of it that leases may take."""
        return max(GiB, 3 * MOST_NBYTES * max(self.clients))


def run(options: TransferOptions, progress: Callable[[int, int], None] | None = None) -> TransferReport:
    """Measure every row. `progress` is called with (rows done, rows in all).

    Raises TransportError if a server or a measuring process cannot be started, or ends.
    """
    plan = QUICK if options.quick else FULL
    started = time.perf_counter()
    words = ["--prefault", *(["--nixl", LOOPBACK] if "nixl" in options.transports else [])]
    with (
        ServerProcess(f"{options.memory_nbytes >> 20}MiB", *words) as server,
        workers_of(max(2, *options.clients)) as workers,
    ):
        bench = _Bench(options, plan, server, workers, started + plan.all_s)
        for transport in options.transports:
            bench.measure(transport, progress)
        bench.add_up()
        raw_tcp = workers[0].do(do="raw", rounds=plan.memcpy_rounds)["gbps"]
        longest_step_nbytes = workers[0].do(do="longest_step")["nbytes"]
    return TransferReport(
        rows=bench.rows,
        mixed=bench.mixed,
        longest_step_nbytes=longest_step_nbytes,
        memcpy_gbps={name: round(statistics.median(found), 2) for name, found in bench.memcpy.items()},
        raw_tcp_gbps=round(statistics.median(raw_tcp), 2),
        workload={
            "quick": options.quick,
            "transports": list(options.transports),
            "clients": list(options.clients),
            "verify": options.verify,
            "copy_threads": options.copy_threads,
            "seed": options.seed,
            "server_memory": f"{options.memory_nbytes >> 20}MiB",
        },
        wall_s=time.perf_counter() - started,
        **bench.sums,
    )


class _Bench:
    """One run under way: its processes, and what has been found so far."""

    def __init__(
        self, options: TransferOptions, plan: Plan, server: ServerProcess, workers: Sequence[Worker], until: float
    ) -> None:
        self._options, self._plan, self._server, self._workers = options, plan, server, workers
        cases = [(op, *case) for op in OPS for case in plan.cases]
        cases.insert(len(plan.cases), ("get+read", *plan.read))
        self._todo = [(clients, *case) for clients in options.clients for case in cases]
        self._total = len(self._todo) * len(options.transports)
        self._until = until
        self._pids = [server.pid]  # at the server's end: with its NIXL agent, where that is read
        self.rows: list[Row] = []
        self.mixed: list[MixedRow] = []
        self.memcpy: dict[str, list[float]] = {}
        self.sums: dict[str, Any] = {"compared": 0, "wrong": 0, "failed": 0, "reason": ""}

    def measure(self, transport: str, progress: Callable[[int, int], None] | None) -> None:
        """All rows of one transport."""
        self._open(transport)
        for name, found in self._workers[0].do(do="memcpy", rounds=self._plan.memcpy_rounds).items():
            self.memcpy.setdefault(name, []).extend(found)
        for clients, op, size_bytes, batch in self._todo:
            left_s = self._until - time.perf_counter()
            row_s = min(self._plan.row_s, left_s / (self._total - len(self.rows)))
            rounds = self._rounds(self._workers[:clients], row_s, (op, size_bytes, batch))
            verified = op == "put" or (op in ("get", "get+read") and self._options.verify)
            calls = len(rounds[0].parts[0].call_ns)
            self.rows.append(row_of((transport, op, size_bytes, batch, clients), rounds, calls, verified))
            if progress is not None:
                progress(len(self.rows), self._total)
        self.mixed.append(self._measure_mixed(transport))

    def _open(self, transport: str) -> None:
        """Connect all. Raises TransportError if the values would not travel as asked for."""
        options, server = self._options, self._server
        if transport == "unix":
            url = f"mmcache+unix://{server.unix_path}?transport=tcp"  # framed, as over TCP
        else:
            url = f"{server.url}?transport={transport}"
        url += f"&copy_threads={options.copy_threads}"
        for place, worker in enumerate(self._workers):
            worker.ask(do="open", url=url, verify=options.verify, seed=options.seed * MOST_CLIENTS + place)
        for worker in self._workers:
            answer = worker.answer()
            if answer["transport"] != transport:
                found = f"{answer['transport']}: {answer['why']}"
                raise TransportError(f"asked for {transport}, but the values would travel by {found}")
        self._pids = [server.pid, *(children_of(server.pid) if transport == "nixl" else [])]

    def _rounds(self, workers: Sequence[Worker], row_s: float, what: tuple[str, int, int]) -> list[Round]:
        """The rounds of one row, all clients of a round at the same time; the first round only warms up."""
        op, size_bytes, batch = what
        plan, calls = self._plan, calls_of(size_bytes, batch, self._plan.round_nbytes)
        small = op == "get" and (size_bytes, batch) == (SMALL_NBYTES, 1)
        least = max(plan.least_rounds, -(-plan.least_small_calls // calls) if small else 0)
        all_do(workers, do="prepare", op=op, size_bytes=size_bytes, batch=batch, calls=calls)
        rounds: list[Round] = []
        ends = time.monotonic() + row_s
        while len(rounds) <= least or (len(rounds) <= plan.most_rounds and time.monotonic() < ends):
            rounds.append(self._round(workers))
            self.sums["compared"] += batch * calls * len(workers)
        all_do(workers, do="finish")
        return rounds[1:]

    def _round(self, workers: Sequence[Worker]) -> Round:
        copies = all_do(workers, do="copy")
        all_do(workers, do="reset")
        before_ns = sum(map(cpu_ns, self._pids))
        times = all_do(workers, do="call")
        server_ns = sum(map(cpu_ns, self._pids)) - before_ns
        all_do(workers, do="check")
        parts = [OneRound(copy["ns"], one["ns"], one["cpu_ns"]) for copy, one in zip(copies, times, strict=True)]
        return Round(parts, server_ns)

    def _measure_mixed(self, transport: str) -> MixedRow:
        """Small gets by one client, in turns alone and while another one streams."""
        small, streamer = self._workers[:2]
        calls = calls_of(SMALL_NBYTES, 1, self._plan.round_nbytes)
        small.do(do="prepare", op="get", size_bytes=SMALL_NBYTES, batch=1, calls=calls)
        self._small_gets(small, calls)  # only warms up
        idle_ns: list[int] = []
        busy_ns: list[int] = []
        nbytes = taken_ns = 0
        for _ in range(self._plan.mixed_turns):
            idle_ns += self._small_gets(small, calls)
            streamer.do(do="stream", size_bytes=STREAM_NBYTES)
            busy_ns += self._small_gets(small, calls)
            streamed = streamer.do(do="streamed")
            nbytes, taken_ns = nbytes + streamed["nbytes"], taken_ns + streamed["ns"]
            self.sums["compared"] += streamed["compared"]
        small.do(do="finish")
        return mixed_row_of((transport, SMALL_NBYTES, STREAM_NBYTES), idle_ns, busy_ns, (nbytes, taken_ns))

    def _small_gets(self, worker: Worker, calls: int) -> list[int]:
        times: list[int] = []
        for _ in range(self._plan.mixed_rounds):
            worker.do(do="reset")
            times += worker.do(do="call")["ns"]
            worker.do(do="check")
            self.sums["compared"] += calls
        return times

    def add_up(self) -> None:
        """What all the clients found wrong or did not get."""
        for answer in all_do(self._workers, do="totals"):
            self.sums["wrong"] += answer["wrong"]
            self.sums["failed"] += answer["failed"]
            self.sums["reason"] = self.sums["reason"] or answer["reason"]
