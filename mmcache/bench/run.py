"""Runs a workload through a real cache and reports: the server it starts or connects to, its memory, the replays."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mmcache.bench.engine import CheckedCache
from mmcache.bench.inject import Injector
from mmcache.bench.oracle import ExactLRU, Step, replay
from mmcache.bench.report import Injection, Latency, Report
from mmcache.client.blocking import Client
from mmcache.config import parse_nbytes
from mmcache.connect import connect
from mmcache.errors import ConfigError
from mmcache.frame import DEFAULT_ALIGNMENT, layout_of
from mmcache.testing import faults
from mmcache.testing.process import ServerProcess

DEADLINE_S = 30.0  # a busy machine must not turn hits into misses here
LEASE_S = 5 * DEADLINE_S  # of its own server: longer than any call
SCALES = ("full", "quick")

Progress = Callable[[int, int], None]
Serve = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to run, for every workload.

    Attributes:
        connect: URL of a running server; None starts one in its own process and stops it again.
        memory: capacity of that own server: a size ("512MiB"), a share of the working set ("10%"), or "auto", enough
            for all of it.
        scale: "full" or "quick".
        inject: damage stored entries between requests; this runs the cache inside this process.
        verify: let the client verify what it reads. Off, only the benchmark's own comparison stands.
        seed: of the values, the order of requests and the injected damage; 0 or more.
    """

    connect: str | None = None
    memory: str = "auto"
    scale: str = "full"
    inject: Injection | None = None
    verify: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise ConfigError(f"scale {self.scale!r} is unknown: choose one of {', '.join(SCALES)}")
        if self.inject not in (None, "wrong", "corrupt"):
            raise ConfigError(f"inject {self.inject!r} is unknown: choose wrong or corrupt")
        if self.inject and self.connect:
            raise ConfigError("damage can only be planted in an own cache: leave out either inject or connect")
        if self.connect and self.memory != "auto":
            raise ConfigError(
                "memory is that of an own server, and connect names one that has its memory already: leave out either "
                "memory or connect"
            )
        if self.seed < 0:
            raise ConfigError(f"seed {self.seed} is negative: choose 0 or more")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Requests, as the replays see them and as an engine serves them.

    Attributes:
        name: the command's.
        about: what the requests are about, in a few words.
        kinds: of entries, in the order of the report.
        steps: one a request, for the replays.
        engine: makes what serves request i through a cache; the salt keeps runs apart on a shared server.
        entry_nbytes: payload of the most usual entry.
        facts: what else the report says of the workload.
        measured, modelled: what is real and what is not, in words.
    """

    name: str
    about: str
    kinds: tuple[str, ...]
    steps: Sequence[Step]
    engine: Callable[[CheckedCache, str], Serve]
    entry_nbytes: int
    facts: Mapping[str, Any]
    measured: tuple[str, ...]
    modelled: tuple[str, ...]


def run_workload(workload: Workload, options: Options, progress: Progress | None = None) -> Report:
    """Run it once and report. `progress` is called with (requests done, requests in all).

    Raises:
        ConfigError: memory that is no size.
        TransportError: the server cannot be reached or started. Later failures of the server are outcomes, and the
            report is not ok.
    """
    endless = _exact_lru(float("inf"))
    ideal = replay(workload.steps, endless, workload.kinds)
    memory_nbytes = _memory_nbytes(options.memory, endless.used_nbytes)
    started = time.perf_counter()
    with _opened(options, memory_nbytes) as (client, injector, where):
        capacity_nbytes = client.stat()["counters"].get("bytes_capacity")
        if capacity_nbytes is None:
            raise ConfigError("the server tells its capacity to admin tokens only: connect with one, ?token_file=FILE")
        cache = CheckedCache(client, workload.kinds, injector, options.seed)
        serve = workload.engine(cache, secrets.token_hex(16))  # every run starts cold, on a shared server too
        for index in range(len(workload.steps)):
            serve(index)
            cache.tallies.mark()
            if progress is not None:
                progress(index + 1, len(workload.steps))
        verify_failures = client.counters["verify_failures"]
    wall_s = time.perf_counter() - started
    return Report(
        workload={
            "name": workload.name,
            "about": workload.about,
            "scale": options.scale,
            "seed": options.seed,
            **workload.facts,
            "working_set_nbytes": endless.used_nbytes,
            "capacity_nbytes": capacity_nbytes,
            "capacity_frames": capacity_nbytes // layout_of([workload.entry_nbytes]).frame_nbytes,
        },
        requests=len(workload.steps),
        got=cache.tallies,
        ideal=ideal,
        lru=replay(workload.steps, _exact_lru(capacity_nbytes), workload.kinds),
        compared=cache.compared,
        wrong=cache.wrong,
        verify_failures=verify_failures,
        verify=options.verify,
        inject=options.inject,
        injected=injector.planted if injector else 0,
        outcomes=cache.outcomes,
        reasons=cache.reasons,
        latency_us={op: Latency.of(times_ns) for op, times_ns in cache.times_ns.items()},
        wall_s=wall_s,
        measured=(f"hits, bytes and times of one client and {where}", *workload.measured),
        modelled=workload.modelled,
    )


@contextmanager
def _opened(options: Options, memory_nbytes: int) -> Iterator[tuple[Client, Injector | None, str]]:
    """A client of the chosen server, what damages it if asked for, and what the server is, in words."""
    if options.inject is not None:
        with faults.embedded(memory_nbytes, verify=options.verify) as (client, shard):
            yield client, Injector(options.inject, shard, options.seed), "a cache inside this process"
    elif options.connect is not None:
        with connect(options.connect, verify=options.verify) as client:
            yield client, None, "the server it was told to connect to"
    else:
        with (
            ServerProcess(str(memory_nbytes), "--lease-s", f"{LEASE_S:g}") as server,
            connect(server.url, verify=options.verify, deadline_s=DEADLINE_S) as client,
        ):
            yield client, None, "a server in another process of this machine"


def _exact_lru(capacity_nbytes: float) -> ExactLRU:
    """A replay store that charges what a frame of one tensor takes in the arena."""
    return ExactLRU(capacity_nbytes, overhead_nbytes=layout_of([0]).header_nbytes, alignment=DEFAULT_ALIGNMENT)


def _memory_nbytes(memory: str, working_set_nbytes: int) -> int:
    """Bytes for the own server. Raises ConfigError for what is neither a size, nor a share, nor "auto"."""
    if memory == "auto":
        return working_set_nbytes + working_set_nbytes // 8 + (1 << 20)
    if not memory.endswith("%"):
        return parse_nbytes(memory)
    try:
        share = float(memory[:-1]) / 100
    except ValueError:
        share = 0.0
    if not share > 0:
        raise ConfigError(f"memory {memory!r} is no share of the working set: write for example 10%, 512MiB or auto")
    return int(share * working_set_nbytes)
