"""`python -m mmcache.testing.simulator scale`: the curve as a table, or as JSON."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mmcache.testing.simulator.prompts import WORKLOADS, requests
from mmcache.testing.simulator.scale import PLACEMENTS, TOKENS_PER_SHARD, Curve, measure


def add_scale(commands: Any) -> None:
    """The command and its options."""
    parser = commands.add_parser(
        "scale", help="how requests, bytes and reads lie on 4 to 256 shards", description="See docs/scale.md."
    )
    parser.add_argument("--shards", default="4,16,64,256", help="how many, several with commas")
    parser.add_argument("--clients", type=int, default=10_000)
    parser.add_argument(
        "--workloads", default=",".join(WORKLOADS), help=f"of {', '.join(WORKLOADS)}, and files of traces"
    )
    parser.add_argument(
        "--tokens", type=int, default=TOKENS_PER_SHARD, help=f"that a shard holds on average ({TOKENS_PER_SHARD:,})"
    )
    parser.add_argument("--draw", type=int, default=1, help="another seed")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true")


def scale(given: argparse.Namespace) -> int:
    """Measure every workload and placement for every number of shards; 0."""
    cases = [
        (workload, placement, int(shards), given.clients, given.tokens, given.draw)
        for workload in given.workloads.split(",")
        for shards in given.shards.split(",")
        for placement in PLACEMENTS
    ]
    for workload in given.workloads.split(","):
        next(requests(workload, given.draw, 1))
    found: dict[int, Curve] = {}
    with (
        ProcessPoolExecutor(given.processes, mp_context=multiprocessing.get_context("spawn")) as pool,
        Progress(console=Console(stderr=True)) as progress,
    ):
        bar = progress.add_task("cases", total=len(cases))
        futures = {pool.submit(measure, *case): number for number, case in enumerate(cases)}
        for future in as_completed(futures):
            found[futures[future]] = future.result()
            progress.advance(bar)
    curves = [found[number] for number in sorted(found)]
    if given.json:
        print(json.dumps([asdict(curve) for curve in curves]))
    else:
        _print(curves)
    return 0


def _print(curves: list[Curve]) -> None:
    table = Table(
        "workload", "shards", "placement", "requests", "asks a query", "least", "most", "bytes max/mean",
        "lookups max/mean", "reads max/mean", "copies", "one joins: moved / its share", "one leaves: moved / its share",
    )  # fmt: skip
    for one in curves:
        table.add_row(
            one.workload,
            str(one.shards),
            one.placement,
            f"{one.requests:,}",
            f"{one.asks:.2f}",
            f"{one.asks_least:.2f}",
            str(one.asks_most),
            f"{one.bytes_ratio:.2f}",
            f"{one.lookups_ratio:.2f}",
            f"{one.reads_ratio:.2f}",
            f"{one.copied:.2%}",
            f"{one.joined_share:.2%} / {one.joined:.3f}",
            f"{one.left_share:.2%} / {one.left:.3f}",
        )
    Console(width=max(170, Console().width)).print(table)
