"""What is measured, and how samples become figures. PURE: numbers in, numbers out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

KiB, MiB = 1 << 10, 1 << 20
OPS: Final = ("put", "get")
VIEW: Final = "view"  # of a batch, by peers that can


@dataclass(frozen=True)
class Case:
    """Values of `size_bytes`, `batch` a call, and how many calls a round makes."""

    size_bytes: int
    batch: int
    calls: int

    @property
    def count(self) -> int:
        """Values a round."""
        return self.batch * self.calls

    @property
    def nbytes(self) -> int:
        """Bytes a round, of one client."""
        return self.count * self.size_bytes


@dataclass(frozen=True)
class Plan:
    """Each peer is started in each of `turns` and makes `pairs` rounds of every case there, for each number of clients.

    A round is a pair: memcpy, then the peer. One more round before them warms up.
    """

    turns: int
    pairs: int
    cases: tuple[Case, ...]
    clients: tuple[int, ...] = (1, 4)

    @property
    def client_nbytes(self) -> int:
        """The most bytes a client moves in a round."""
        return max(case.nbytes for case in self.cases)


FULL: Final = Plan(3, 5, (Case(64 * KiB, 1, 128), Case(MiB, 1, 16), Case(16 * MiB, 1, 4), Case(MiB, 64, 1)))
QUICK: Final = Plan(1, 2, (Case(64 * KiB, 1, 16), Case(MiB, 1, 4), Case(16 * MiB, 1, 2), Case(MiB, 64, 1)))
# Of controls nothing is measured: each case once is enough to see that they are caught.
CONTROL_PAIRS: Final = 1


@dataclass(frozen=True)
class Sample:
    """One round of all clients: nanoseconds from the first's start to the last's end, for the same bytes.

    `whole_ns` is memcpy of each value at once, `sliced_ns` in slices of 256 KiB, `op_ns` the peer; `each_ns` its calls.
    """

    nbytes: int
    whole_ns: int
    sliced_ns: int
    op_ns: int
    each_ns: tuple[int, ...]
    wrong: int = 0
    compared: int = 0


@dataclass(frozen=True)
class Row:
    """The figures of one peer, operation, case and number of clients; docs/bench.md explains the fields."""

    peer: str
    op: str
    size_bytes: int
    batch: int
    clients: int
    pairs: int
    gbps: float
    memcpy_gbps: float
    memcpy_whole_gbps: float
    ratio_q1: float
    ratio: float
    ratio_q3: float
    p50_us: float
    p99_us: float
    verified: bool
    compared: int
    wrong: int


def name_of(case: Case, turn: int, pair: int, client: int, index: int) -> str:
    """The key of a value, the same for every peer, never used again."""
    return f"{case.size_bytes}x{case.batch}/{turn}.{pair}/{client}/{index}"


def readers_of(clients: int, alone: bool) -> list[int]:
    """Which worker reads what worker 0, 1, ... has put: another one, unless each is `alone`."""
    if alone:
        return list(range(clients))
    return [1] if clients == 1 else [(client + 1) % clients for client in range(clients)]


def row_of(peer: str, verified: bool, op: str, case: Case, clients: int, samples: Sequence[Sample]) -> Row:
    """Medians and quartiles over the samples; ratios are of each pair: sliced memcpy's time over the peer's."""
    ratios = [sample.sliced_ns / sample.op_ns for sample in samples]
    q1, ratio, q3 = (float(f"{cut:.4g}") for cut in np.percentile(ratios, [25, 50, 75]))  # however small
    each_us = np.array([ns for sample in samples for ns in sample.each_ns]) / 1e3
    p50, p99 = (round(float(cut), 1) for cut in np.percentile(each_us, [50, 99]))
    return Row(
        peer=peer, op=op, size_bytes=case.size_bytes, batch=case.batch, clients=clients, pairs=len(samples),
        gbps=_gbps(samples, [sample.op_ns for sample in samples]),
        memcpy_gbps=_gbps(samples, [sample.sliced_ns for sample in samples]),
        memcpy_whole_gbps=_gbps(samples, [sample.whole_ns for sample in samples]),
        ratio_q1=q1, ratio=ratio, ratio_q3=q3, p50_us=p50, p99_us=p99, verified=verified,
        compared=sum(sample.compared for sample in samples), wrong=sum(sample.wrong for sample in samples),
    )  # fmt: skip


def _gbps(samples: Sequence[Sample], times_ns: Sequence[int]) -> float:
    rates = [sample.nbytes / time_ns for sample, time_ns in zip(samples, times_ns, strict=True)]
    return round(float(np.median(rates)), 3)
