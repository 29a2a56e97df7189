"""The figures of `mmcache bench transfer`: rows from the times of rounds. PURE: numbers in, numbers out."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

LEAST_FOR_P999: Final = 1000  # with fewer calls it would be the slowest one, or made up


@dataclass(frozen=True)
class OneRound:
    """One client's part of a round: nanoseconds of memcpy, of each call, and of CPU time of all its calls together."""

    copy_ns: int
    call_ns: Sequence[int]
    cpu_ns: int


@dataclass(frozen=True)
class Round:
    """What all clients did at the same time, and the CPU time that the server used meanwhile."""

    parts: Sequence[OneRound]
    server_cpu_ns: int


@dataclass(frozen=True)
class Row:
    """One measurement; docs/bench.md explains the fields."""

    transport: str
    op: str
    size_bytes: int
    batch: int
    clients: int
    rounds: int
    gbps: float
    ratio_to_memcpy: float
    ratio_quartiles: tuple[float, float]
    p50_us: float
    p99_us: float
    p999_us: float | None
    client_cpu_s_per_gb: float
    server_cpu_s_per_gb: float
    verified: bool


@dataclass(frozen=True)
class MixedRow:
    """Small gets while the server is otherwise idle, and while another client streams; docs/bench.md explains it."""

    transport: str
    size_bytes: int
    stream_bytes: int
    calls: int
    idle_p50_us: float
    idle_p99_us: float
    busy_p50_us: float
    busy_p99_us: float
    streamed_gbps: float


def row_of(what: tuple[str, str, int, int, int], rounds: Sequence[Round], calls: int, verified: bool) -> Row:
    """The figures of a row from its rounds, each of so many calls by each client."""
    transport, op, size_bytes, batch, clients = what
    nbytes = size_bytes * batch * calls
    per_client = [[one.parts[client] for one in rounds] for client in range(clients)]
    gbps = sum(nbytes / statistics.median(sum(one.call_ns) for one in own) for own in per_client)
    ratios = [one.copy_ns / sum(one.call_ns) for own in per_client for one in own]
    low, middle, high = (float(f"{cut:.4g}") for cut in np.percentile(ratios, [25, 50, 75]))  # however small
    calls_us = np.array([ns for own in per_client for one in own for ns in one.call_ns]) / 1e3
    p50, p99, p999 = (round(float(cut), 1) for cut in np.percentile(calls_us, [50, 99, 99.9]))
    client_ns = statistics.median(sum(part.cpu_ns for part in one.parts) for one in rounds)
    server_ns = statistics.median(one.server_cpu_ns for one in rounds)
    return Row(
        transport=transport,
        op=op,
        size_bytes=size_bytes,
        batch=batch,
        clients=clients,
        rounds=len(rounds),
        gbps=round(gbps, 3),
        ratio_to_memcpy=middle,
        ratio_quartiles=(low, high),
        p50_us=p50,
        p99_us=p99,
        p999_us=p999 if len(calls_us) >= LEAST_FOR_P999 else None,
        client_cpu_s_per_gb=round(client_ns / (nbytes * clients), 4),  # ns a byte are seconds a GB
        server_cpu_s_per_gb=round(server_ns / (nbytes * clients), 4),
        verified=verified,
    )


def mixed_row_of(
    what: tuple[str, int, int], idle_ns: Sequence[int], busy_ns: Sequence[int], streamed: tuple[int, int]
) -> MixedRow:
    """The figures of (transport, bytes of a small value, of a streamed one). `streamed`: bytes, in so many ns."""
    idle, busy = (
        [round(float(cut) / 1e3, 1) for cut in np.percentile(times, [50, 99])] for times in (idle_ns, busy_ns)
    )
    nbytes, ns = streamed
    return MixedRow(
        transport=what[0],
        size_bytes=what[1],
        stream_bytes=what[2],
        calls=len(busy_ns),
        idle_p50_us=idle[0],
        idle_p99_us=idle[1],
        busy_p50_us=busy[0],
        busy_p99_us=busy[1],
        streamed_gbps=round(nbytes / max(1, ns), 3),
    )
