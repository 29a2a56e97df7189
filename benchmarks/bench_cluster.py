"""Four shards under load while one is killed, or a fifth joins, and the simulator's prediction of the very same.

    python -m benchmarks.bench_cluster [kill] [join] [--requests 3000] [--workloads conversations] [--json FILE|-]

Real `mmcache serve` processes, and clients in processes of their own that look prompts up, read what is there and store
the rest; prompts are those of `python -m mmcache.testing.simulator scale`. Each byte that arrives is compared with what
belongs to its key. Then the same requests are replayed, in the same order and at the same times, through the
simulator's code (benchmarks/cluster/replay.py): with what happened, and with nothing.

kill: after a third of the requests the shard that owns most is killed with SIGKILL, by the client that begins the next
one. It stays away (members are a static list: what it owned is missed for ever), or is started again, empty, or is
given up by its Redis. `kept`: prefix blocks found from then on, over those that would have been found. `by block`: what
would be kept if each block were placed by itself. `lost`: points of the share of asked blocks that are found. Bars:
nothing wrong, no exception, nothing evicted, p99 of each kind of call within the deadline; 0.9 of the kept that is
predicted; with two replicas 2 points lost.

join: members by a real redis-server; after a third of the requests a fifth shard joins. Bars: the bytes that change
owners within 5% of what the newcomer owns; hits as predicted, to 2 points, in each of twelve windows, and 2 points of
what they would be at the end; the newcomer's part of lookups and of puts at most 1.5 times its part of the keys, and it
holds what is predicted, to a tenth. Exits 1 when a bar is missed, 2 when it cannot run.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.cluster import join, kill
from benchmarks.cluster.kill import Size
from benchmarks.cluster.report import show
from mmcache.errors import ConfigError
from mmcache.testing.simulator.prompts import WORKLOADS
from mmcache.units import parse_nbytes

PARTS = ("kill", "join")


def run(parts: list[str], workloads: list[str], size: Size) -> dict[str, Any]:
    """All cases, one after the other, with a bar on stderr for each."""
    killed, joined = [], []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:

        def bar(name: str) -> Any:
            task = progress.add_task(name, total=size.requests)
            return lambda number: progress.update(task, completed=min(number, size.requests))

        for workload in workloads:
            for placed, replicas, what in kill.CASES if "kill" in parts else ():
                one = kill.Case(workload, placed, replicas, what)
                killed.append(kill.run_case(one, size, bar(str(one))))
            for ramp_s in join.RAMPS if "join" in parts else ():
                joined.append(join.run_case(join.Case(workload, ramp_s), size, bar(f"{workload}, joins, {ramp_s:g} s")))
    missed = [bad for row in killed for bad in kill.missed(row, size.deadline_s)]
    missed += [bad for row in joined for bad in join.missed(row, size.deadline_s)]
    return {"size": vars(size), "kill": killed, "join": joined, "missed": missed}


def main() -> int:
    """Run, report; 1 if a bar is missed, 2 if it cannot run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="kill|join", help="both unless said")
    parser.add_argument("--requests", type=int, default=3000, help="of each case")
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--value", type=parse_nbytes, default=16 << 10, help="bytes of a block")
    parser.add_argument("--clients", type=int, default=4, help="processes")
    parser.add_argument("--think", type=float, default=0.01, help="seconds between a client's requests")
    parser.add_argument("--memory", type=parse_nbytes, default=2 << 30, help="of a shard; taken as it is used")
    parser.add_argument("--deadline", type=float, default=1.0, help="seconds, of each call")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", metavar="FILE", help="also write the report here; - writes it to stdout alone")
    chosen = parser.parse_args()
    parts, workloads = chosen.parts or list(PARTS), chosen.workloads.split(",")
    if unknown := sorted({*parts} - {*PARTS}) + sorted({*workloads} - {*WORKLOADS}):
        parser.error(f"{unknown[0]!r} is none of {', '.join((*PARTS, *WORKLOADS))}")
    size = Size(
        requests=chosen.requests,
        nbytes=chosen.value,
        clients=chosen.clients,
        think_s=chosen.think,
        memory_nbytes=chosen.memory,
        deadline_s=chosen.deadline,
        seed=chosen.seed,
    )
    try:
        report = run(parts, workloads, size)
    except ConfigError as error:
        print(f"bench_cluster: {error}", file=sys.stderr)
        return 2
    text = json.dumps(report, indent=1)
    if chosen.json and chosen.json != "-":
        Path(chosen.json).write_text(text)
    if chosen.json == "-":
        print(text)
    else:
        show(report["kill"], report["join"], report["missed"])
    return 1 if report["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())
