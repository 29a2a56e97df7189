"""The report for a terminal: tables by rich."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from tests.faults.check.found import BAD

MOST_SHOWN: Final = 20


def show(found: dict[str, Any], console: Console) -> None:
    """Print it."""
    totals = found["totals"]
    lengths: defaultdict[str, list[float]] = defaultdict(list)
    for one in found["faults"]:
        lengths[one["kind"]].append(one["end_s"] - one["begin_s"])
    rows = [[kind, str(len(each)), f"{sum(each):.0f}"] for kind, each in sorted(lengths.items())]
    console.print(_table("fault", ["kind", "times", "seconds"], rows))
    for kind, why in found["left_out"].items():
        console.print(f"LEFT OUT: {kind}: {why}", style="yellow")
    marks = ("p50_ms", "p99_ms", "worst_ms")
    rows = [[name, f"{row['calls']:,}", *(f"{row[mark]:,.1f}" for mark in marks)] for name, row in found["ops"].items()]
    console.print(_table("call", ["", "calls", "p50 ms", "p99 ms", "worst ms"], rows))
    whens = ("before", "during", "after")
    rows = [
        [
            name,
            *("none" if row[when] is None else f"{row[when]:.1%}" for when in whens),
            "never" if row["back_s"] is None else f"{row['back_s']:.1f}",
        ]
        for name, row in found["hit_rates"].items()
    ]
    console.print(
        _table("hit rate of what was stored", ["", "before", "in trouble", "at the end", "back after, s"], rows)
    )
    console.print(
        f"{found['seconds']:.0f} s, {len(found['faults'])} faults, {totals['calls']:,} calls by "
        f"{totals['processes']} client processes, {totals['compared']:,} values compared"
    )
    console.print(lateness_words(found))
    console.print("  ".join(f"{what}={totals[what]}" for what in BAD))
    for one in found["violations"][:MOST_SHOWN]:
        console.print(f"  {one['at_s']:7.1f} s  {one['lane']}  {one['what']}: {one['detail']}", markup=False)
    if len(found["violations"]) > MOST_SHOWN:
        console.print(f"  and {len(found['violations']) - MOST_SHOWN} more")
    console.print(f"[red]NOT OK[/red]: {found['command']}" if found["violations"] else "[green]ok[/green]")


def lateness_words(found: dict[str, Any]) -> str:
    """How late calls were, by the clock and by their own time, and how late this machine wakes anybody."""
    late = found["lateness"]
    return (
        f"the longest call was {late['worst_ms']:.0f} ms past its deadline of {found['deadline_s']:g} s by the clock, "
        f"{late['worst_own_ms']:.0f} ms by its own time; {late['past_bar']} and {late['past_bar_own']} were more than "
        f"{1e3 * found['slack_s']:.0f} ms past it; a process that only sleeps was woken up to "
        f"{late['nap_worst_ms']:.0f} ms late (p99 {late['nap_p99_ms']:.0f} ms)"
    )


def _table(title: str, names: list[str], rows: list[list[str]]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for place, name in enumerate(names):
        table.add_column(name, justify="right" if place else "left")
    for row in rows:
        table.add_row(*row)
    return table
