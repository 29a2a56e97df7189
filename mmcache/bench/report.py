"""What a benchmark found, as data, as JSON and as a terminal report. Formatting only: nothing is computed here twice.

Every figure is either measured or modelled, and the report says which; `ok` says whether it is what it must be.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmcache.bench.oracle import Tallies, Tally

Injection = Literal["wrong", "corrupt"]


@dataclass(frozen=True)
class Latency:
    """Microseconds a call: median, 99th percentile, and over how many calls."""

    p50: float
    p99: float
    calls: int

    @classmethod
    def of(cls, times_ns: list[int]) -> Latency:
        p50, p99 = np.percentile(times_ns, [50, 99]) / 1e3
        return cls(round(float(p50), 1), round(float(p99), 1), len(times_ns))


@dataclass(frozen=True)
class Report:
    """A finished run: counts of the cache, of an endless cache and of an exact LRU of the same capacity, and checks.

    `compared` hits were compared bit for bit with recomputation, of which `wrong` differed. `verify_failures` are
    reads the client rejected by itself. `injected` is the number of damages planted.
    """

    workload: Mapping[str, Any]
    requests: int
    got: Tallies
    ideal: Tallies
    lru: Tallies
    compared: int
    wrong: int
    verify_failures: int
    verify: bool
    inject: Injection | None
    injected: int
    outcomes: Mapping[str, int]
    latency_us: Mapping[str, Latency]
    wall_s: float
    measured: tuple[str, ...]
    modelled: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """No wrong byte; and where damage was planted, that it was caught, or, with verification off, that it shows."""
        if self.inject is None:
            return self.wrong == 0 and self.verify_failures == 0
        if self.verify:
            return self.wrong == 0 and self.verify_failures > 0
        return self.wrong > 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the field names are documented in docs/bench-media.md."""
        return {
            "workload": dict(self.workload),
            "requests": self.requests,
            "hit_rate": round(self.got.hit_rate, 5),
            "ideal_hit_rate": round(self.ideal.hit_rate, 5),
            "lru_hit_rate": round(self.lru.hit_rate, 5),
            "compared": self.compared,
            "wrong": self.wrong,
            "verify": self.verify,
            "verify_failures": self.verify_failures,
            "inject": self.inject,
            "injected": self.injected,
            "ok": self.ok,
            "by_kind": {
                kind: {
                    "lookups": got.lookups,
                    "hits": got.hits,
                    "hit_rate": round(got.hit_rate, 5),
                    "ideal_hit_rate": round(ideal.hit_rate, 5),
                    "lru_hit_rate": round(lru.hit_rate, 5),
                    "bytes_read": got.bytes_read,
                    "bytes_written": got.bytes_written,
                }
                for kind, got, ideal, lru in self._kinds()
            },
            "outcomes": dict(self.outcomes),
            "latency_us": {op: vars(latency) for op, latency in self.latency_us.items()},
            "wall_s": round(self.wall_s, 3),
            "host": host(),
            "measured": list(self.measured),
            "modelled": list(self.modelled),
        }

    def print(self, console: Console) -> None:
        """The tables and the verdict, for people."""
        work = self.workload
        console.print(
            f"[bold]mmcache bench media[/]: {self.requests} requests about {work['photos']} photos and "
            f"{work['videos']} videos; working set {_size(work['working_set_nbytes'])} in "
            f"{_size(work['capacity_nbytes'])} of cache; {self.wall_s:.1f} s"
        )
        console.print(self._hits_table())
        console.print(self._latency_table())
        console.print(self._verdict())
        for title, lines in (("Measured", self.measured), ("Modelled", self.modelled)):
            console.print(f"[bold]{title}[/]")
            for line in lines:
                console.print(f"  [dim]-[/] {escape(line)}", highlight=False)

    def _kinds(self) -> list[tuple[str, Tally, Tally, Tally]]:
        return [
            ("embedding", self.got.embedding, self.ideal.embedding, self.lru.embedding),
            ("kv", self.got.kv, self.ideal.kv, self.lru.kv),
        ]

    def _hits_table(self) -> Table:
        table = Table("kind")
        for name in ("lookups", "hits", "hit rate", "endless cache", "exact LRU", "read", "written"):
            table.add_column(name, justify="right")
        total = _sum(self.got)
        rows = [*self._kinds(), ("all", total, _sum(self.ideal), _sum(self.lru))]
        for kind, got, ideal, lru in rows:
            table.add_row(
                kind,
                f"{got.lookups:,}",
                f"{got.hits:,}",
                f"{got.hit_rate:.1%}",
                f"{ideal.hit_rate:.1%}",
                f"{lru.hit_rate:.1%}",
                _size(got.bytes_read),
                _size(got.bytes_written),
                style="bold" if kind == "all" else None,
            )
        return table

    def _latency_table(self) -> Table:
        table = Table("operation")
        for name in ("calls", "p50 us", "p99 us"):
            table.add_column(name, justify="right")
        for op, latency in self.latency_us.items():
            table.add_row(op, f"{latency.calls:,}", f"{latency.p50:,.0f}", f"{latency.p99:,.0f}")
        return table

    def _verdict(self) -> str:
        line = (
            f"[bold {'green' if self.ok else 'red'}]wrong={self.wrong}[/] verify_failures={self.verify_failures}: "
            f"{self.compared:,} hits were compared bit for bit with recomputation"
        )
        if self.inject is not None:
            caught = "with verified reads" if self.verify else "with verification off"
            line += f"; {self.injected} entries were damaged on purpose ({self.inject}), read {caught}"
        rate, ideal, lru = (f"{tallies.hit_rate:.1%}" for tallies in (self.got, self.ideal, self.lru))
        return f"{line}.\n{rate} of all lookups hit; an endless cache would hit {ideal}, an exact LRU this size {lru}."


def host() -> dict[str, Any]:
    """The machine the figures belong to."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        cpu = ""
    return {
        "cpu": cpu or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def _sum(tallies: Tallies) -> Tally:
    kv, embedding = tallies.kv, tallies.embedding
    return Tally(
        kv.lookups + embedding.lookups,
        kv.hits + embedding.hits,
        kv.bytes_read + embedding.bytes_read,
        kv.bytes_written + embedding.bytes_written,
    )


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f} MB"
