"""The command `python -m mmcache.testing.simulator`: many seeds, one seed again, the scale curve, a fleet."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from mmcache.errors import UsageError
from mmcache.testing.simulator.fleet import add_fleet, fleet
from mmcache.testing.simulator.run import Run, Verdict
from mmcache.testing.simulator.scale_report import add_scale, scale

COMMAND: Final = "python -m mmcache.testing.simulator"
BATCH: Final = 4  # seeds that a process takes at a time


def main(arguments: Sequence[str] | None = None) -> int:
    """0: nothing was violated; 1: something was, and how to see it again is printed."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Simulate clusters from seeds; see docs/simulator.md.")
    parser.add_argument("--seeds", type=int, default=100, help="how many (default: 100)")
    parser.add_argument("--first", type=int, default=0, help="the first seed (default: 0)")
    parser.add_argument("--events", type=int, default=10_000, help="of each seed, at least (default: 10,000)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    parser.add_argument("--seed", type=int, help="only this one, in this process")
    parser.add_argument("--trace", action="store_true", help="with --seed: print what happens")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    commands = parser.add_subparsers(dest="what", metavar="scale, fleet")
    add_scale(commands)
    add_fleet(commands)
    given = parser.parse_args(arguments)
    if given.what == "fleet":
        return fleet(given)
    if given.what == "scale":
        try:
            return scale(given)
        except UsageError as error:
            parser.error(str(error))
    if given.trace and given.seed is None:
        parser.error("--trace is of one seed: give --seed N")
    if given.seeds < 1 or given.events < 1 or given.workers < 1:
        parser.error("--seeds, --events and --workers must be 1 or more")
    if given.seed is not None:
        verdicts = [Run(given.seed, given.events, print if given.trace else None).run()]
        return report(verdicts, given.events, 0.0, as_json=given.json)
    begun_s = time.monotonic()
    verdicts = sorted(many(given.first, given.seeds, given.events, given.workers), key=lambda one: one.seed)
    return report(verdicts, given.events, time.monotonic() - begun_s, as_json=given.json)


def many(first: int, seeds: int, events: int, workers: int) -> Iterator[Verdict]:
    """The verdicts of so many seeds, as they come, with a bar on the terminal."""
    batches = [range(start, min(start + BATCH, first + seeds)) for start in range(first, first + seeds, BATCH)]
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with (
        ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool,
        Progress(*columns, console=Console(stderr=True)) as progress,
    ):
        bar = progress.add_task("seeds", total=seeds)
        for future in as_completed([pool.submit(_batch, batch, events) for batch in batches]):
            found = future.result()
            progress.advance(bar, len(found))
            for verdict in found:
                if not verdict:
                    progress.console.print(f"seed {verdict.seed}: {verdict.invariant}: {verdict.detail}", markup=False)
            yield from found


def _batch(seeds: range, events: int) -> list[Verdict]:
    return [Run(seed, events).run() for seed in seeds]


def replay(seed: int, events: int) -> str:
    """The command that shows a seed again."""
    return f"{COMMAND} --seed {seed} --events {events} --trace"


def report(verdicts: Sequence[Verdict], events: int, took_s: float, *, as_json: bool) -> int:
    """Print what the runs came to; 1 if anything was violated."""
    bad = [verdict for verdict in verdicts if not verdict]
    if as_json:
        print(json.dumps([asdict(verdict) for verdict in verdicts]))
    else:
        count = len(verdicts)
        names = "seeds", "events", "simulated", "hits before", "in trouble", "after", "passes", "violated", "took"
        table = Table(*names)
        table.add_row(
            f"{count:,}",
            f"{sum(one.events for one in verdicts):,}",
            f"{sum(one.simulated_s for one in verdicts) / 3600:.2f} h",
            f"{sum(one.before for one in verdicts) / count:.1%}",
            f"{sum(one.trouble for one in verdicts) / count:.1%}",
            f"{sum(one.after for one in verdicts) / count:.1%}",
            f"{max(one.passes for one in verdicts)}",
            f"{len(bad)}",
            f"{took_s:.0f} s",
        )
        Console(width=max(100, Console().width)).print(table)
    for verdict in bad:
        print(f"seed {verdict.seed}: {verdict.invariant}: {verdict.detail}", file=sys.stderr)
        print(f"    again: {replay(verdict.seed, events)}", file=sys.stderr)
    return 1 if bad else 0
