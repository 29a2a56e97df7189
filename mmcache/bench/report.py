"""What a workload found, as data, as JSON and as a terminal report. Formatting only: nothing is computed here twice.

Every figure is either measured or modelled, and the report says which; `ok` says whether it is what it must be.
The page for a browser is made from the same dictionary as the JSON, in page.py.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmcache._version import __version__
from mmcache.bench.oracle import Moment, Tallies, Tally
from mmcache.units import count

Injection = Literal["wrong", "corrupt"]
EXPECTED = ("hit", "miss", "stored", "present")  # what a healthy server answers
FEW_FRAMES = 100  # with room for fewer, one entry more or less is a point of the hit rate
MAX_MOMENTS = 120  # of a history, in the JSON and in plots


@dataclass(frozen=True)
class Latency:
    """Microseconds a call: median, 90th and 99th percentile, and over how many calls."""

    p50: float
    p90: float
    p99: float
    calls: int

    @classmethod
    def of(cls, times_ns: list[int]) -> Latency:
        p50, p90, p99 = (round(float(cut), 1) for cut in np.percentile(times_ns, [50, 90, 99]) / 1e3)
        return cls(p50, p90, p99, len(times_ns))


@dataclass(frozen=True)
class Report:
    """A finished run: counts of the cache, of an endless cache and of an exact LRU of the same capacity, and checks.

    `compared` values that came back were compared bit for bit with recomputation, of which `wrong` differed.
    `verify_failures` are reads the client rejected by itself. `injected` is the number of damages planted. `reasons`
    has the first reason given for an outcome, where one was given.
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
    reasons: Mapping[str, str]
    latency_us: Mapping[str, Latency]
    wall_s: float
    measured: tuple[str, ...]
    modelled: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether all is as it must be: nothing in `complaints`."""
        return not self.complaints()

    def complaints(self) -> list[str]:
        """What is not as it must be, in words.

        The server must have answered throughout. No byte may be wrong; and where damage was planted, it must have been
        caught, or, with verification off, it must show.
        """
        found = []
        if lost := self.outcomes.get("unavailable", 0):
            found.append(f"{count(lost, 'answer')} never came, so the hit rate is not the cache's")
        if self.inject is not None and not self.verify:
            if not self.wrong:
                found.append("damage was planted and no value that came back differed")
            return found
        if self.wrong:
            found.append(f"{count(self.wrong, 'wrong value')} came back")
        if self.inject is None and self.verify_failures:
            found.append(f"{count(self.verify_failures, 'read')} failed verification, and no damage was planted")
        if self.inject is not None and not self.verify_failures:
            found.append("damage was planted and no read was rejected")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the field names are documented in docs/bench.md."""
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
            "complaints": self.complaints(),
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
            "work": {
                what: {"got": done, "ideal": self.ideal.work[what], "lru": self.lru.work[what]}
                for what, done in self.got.work.items()
            },
            "history": {
                "requests": [at + 1 for at in _moments(len(self.got.history))],
                **{
                    name: _series(tallies.history)
                    for name, tallies in (("got", self.got), ("ideal", self.ideal), ("lru", self.lru))
                },
            },
            "outcomes": dict(self.outcomes),
            "reasons": dict(self.reasons),
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
            f"[bold]mmcache bench {work['name']}[/]: {count(self.requests, 'request')} about {work['about']}; "
            f"working set {_megabytes(work['working_set_nbytes'])} MB, "
            f"cache {_megabytes(work['capacity_nbytes'])} MB; {self.wall_s:.1f} s",
            highlight=False,
        )
        console.print(self._hitsdata_table())
        if self.got.work:
            console.print(self._workdata_table())
        console.print(self._latencydata_table())
        for line in self._verdict():
            console.print(line, highlight=False)
        if work["capacity_frames"] < FEW_FRAMES and work["capacity_nbytes"] < work["working_set_nbytes"]:
            console.print(
                f"Note: this cache has room for {work['capacity_frames']} entries only; the gaps between them, which "
                "the exact LRU does not have, cost points of the hit rate. Compare the two at --scale full, in more "
                "memory, and on a server with the same policy (serve --policy lru, --connect).",
                highlight=False,
            )
        for title, lines in (("Measured", self.measured), ("Modelled", self.modelled)):
            console.print(f"[bold]{title}[/]")
            console.print(bullets(lines), highlight=False)

    def _kinds(self) -> list[tuple[str, Tally, Tally, Tally]]:
        return [(kind, got, self.ideal[kind], self.lru[kind]) for kind, got in self.got.by_kind.items()]

    def _hitsdata_table(self) -> Table:
        names = ("lookups", "hits", "hit rate", "ideal", "exact LRU", "read MB", "written MB")
        table = data_table("kind", *names, caption="ideal: an endless cache; exact LRU: one of this size")
        rows = [*self._kinds(), ("all", self.got.total(), self.ideal.total(), self.lru.total())]
        for kind, got, ideal, lru in rows:
            table.add_row(
                kind,
                f"{got.lookups:,}",
                f"{got.hits:,}",
                f"{got.hit_rate:.1%}",
                f"{ideal.hit_rate:.1%}",
                f"{lru.hit_rate:.1%}",
                _megabytes(got.bytes_read),
                _megabytes(got.bytes_written),
                style="bold" if kind == "all" else None,
            )
        return table

    def _workdata_table(self) -> Table:
        table = data_table("work", "here", "ideal", "exact LRU")
        for what, done in self.got.work.items():
            table.add_row(what, f"{done:,}", f"{self.ideal.work[what]:,}", f"{self.lru.work[what]:,}")
        return table

    def _latencydata_table(self) -> Table:
        table = data_table("operation", "calls", "p50 us", "p90 us", "p99 us")
        for op, latency in self.latency_us.items():
            cuts = [f"{cut:,.0f}" for cut in (latency.p50, latency.p90, latency.p99)]
            table.add_row(op, f"{latency.calls:,}", *cuts)
        return table

    def _verdict(self) -> list[str]:
        """Lines of console markup: the checks, whatever was answered that a healthy server does not, and the upshot."""
        damage_must_show = self.inject is not None and not self.verify
        colour = "red" if not self.ok else "yellow" if damage_must_show else "green"
        lines = [
            f"[bold {colour}]wrong={self.wrong}[/] verify_failures={self.verify_failures}: "
            f"{count(self.compared, 'value')} that came back were compared bit for bit with recomputation; "
            f"reads were {'verified' if self.verify else 'not verified'}"
        ]
        if self.inject is not None:
            lines.append(f"{count(self.injected, 'entry', 'entries')} damaged on purpose ({self.inject})")
        for outcome, times in self.outcomes.items():
            if outcome not in EXPECTED and times:
                colour = "yellow" if outcome == "corrupt" and self.inject is not None else "red"
                reason = f" (first reason: {escape(self.reasons[outcome])})" if outcome in self.reasons else ""
                lines.append(f"[bold {colour}]{outcome}: {times:,}[/]{reason}")
        if complaints := self.complaints():
            return [*lines, f"[bold red]NOT as it must be[/]: {'; '.join(complaints)}"]
        if damage_must_show:
            upshot = "without verification the damage gets through"
        elif self.inject is not None:
            upshot = "every damaged read was rejected"
        else:
            upshot = "nothing wrong came back"
        return [*lines, f"[bold green]as it must be[/]: {upshot}"]


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
        "mmcache": __version__,
    }


def _moments(requests: int) -> list[int]:
    """Which requests a series shows: at most MAX_MOMENTS of them, evenly spread, the last one included."""
    if requests <= MAX_MOMENTS:
        return list(range(requests))
    return [round((place + 1) * requests / MAX_MOMENTS) - 1 for place in range(MAX_MOMENTS)]


def _series(history: Sequence[Moment]) -> dict[str, dict[str, list[int]]]:
    """By kind, the sums up to each of those requests."""
    names = ("lookups", "hits", "bytes_read", "bytes_written")
    shown = [history[at] for at in _moments(len(history))]
    kinds = history[-1] if history else {}
    return {
        kind: {name: [moment[kind][place] for moment in shown] for place, name in enumerate(names)} for kind in kinds
    }


def data_table(first: str, *names: str, caption: str | None = None) -> Table:
    """A table for 80 columns: the first column is text, the others are numbers, and none is ever cut or folded."""
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False, caption=caption, caption_justify="left")
    table.add_column(first, no_wrap=True)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def bullets(lines: Sequence[str]) -> Table:
    """Lines of a list, each with a hanging indent."""
    points = Table.grid(padding=(0, 1))
    for line in lines:
        points.add_row(" [dim]-[/]", escape(line))
    return points


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f}"
