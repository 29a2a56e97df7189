"""What was measured and predicted, as tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

WIDTH = 150


def kill_tables(cases: Sequence[dict[str, Any]]) -> list[Table]:
    """Of `kill`: a row a case, what calls took, and what the simulator says of each shard."""
    hits = Table(
        "traffic", "placed", "R", "the shard", "hits before", "during", "after", "end", "lost, points", "kept",
        "by block", title="a shard of four is killed: hit share and kept prefix hits, as measured (predicted)",
    )  # fmt: skip
    calls = Table(
        "traffic", "placed", "R", "the shard", "lookup p50 / p99 / max, ms", "get", "put", "back after",
        "values compared", "wrong", "errors", title="from the kill on",
    )  # fmt: skip
    for row in cases:
        names = row["workload"], row["placed"], str(row["replicas"]), row["what"]
        hits.add_row(
            *names,
            *[f"{row['share'][name]:.1%} ({row['predicted'][name]:.1%})" for name in row["share"]],
            f"{row['points_lost']:.1f}",
            f"{row['kept']:.1%} ({row['kept_predicted']:.1%})",
            f"({row['kept_by_block_predicted']:.1%})",
        )
        back = "" if row["back_s"] is None else f"{row['back_s']:.1f} s"
        calls.add_row(*names, *_calls(row), back, f"{row['compared']:,}", f"{row['wrong']}", f"{row['errors']}")
    each = Table("traffic", "placed", "mean", title="kept, predicted, had it been this shard that died for good")
    with_each = [row for row in cases if row["kept_each"]]
    for name in with_each[0]["kept_each"]["runs"] if with_each else ():
        each.add_column(name)
    for row in with_each:
        for placed, found in row["kept_each"].items():
            mean = sum(found.values()) / len(found)
            each.add_row(row["workload"], placed, f"{mean:.1%}", *[f"{one:.1%}" for one in found.values()])
    return [hits, calls, each] if with_each else [hits, calls]


def join_tables(cases: Sequence[dict[str, Any]]) -> list[Table]:
    """Of `join`: a table of windows a case, and one of what moved."""
    tables = [_windows(row) for row in cases]
    table = Table(
        "traffic", "former owners asked for", "owner changed", "least", "over it", "it has of that at the end",
        "others gained", "it has in all", "lookup p50 / p99 / max, ms", "get", "put", "wrong, errors",
        title="what moved",
    )  # fmt: skip
    for row in cases:
        table.add_row(
            row["workload"],
            f"{row['ramp_s']:g} s",
            f"{row['owner_changed_mib']:.1f} MiB",
            f"{row['least_mib']:.1f} MiB",
            f"{row['over_least']:.3f}",
            f"{row['newcomer_has_mib']:.1f} MiB",
            f"{row['others_gained_mib']:.1f} MiB",
            f"{row['held_at_end_mib']:.1f} MiB",
            *_calls(row),
            f"{row['wrong']}, {row['errors']}",
        )
    return [*tables, table]


def _calls(row: dict[str, Any]) -> list[str]:
    taken = row["latency"]
    return [
        " / ".join(f"{1000 * taken[call][name]:.0f}" for name in ("p50_s", "p99_s", "max_s"))
        for call in ("lookup", "get", "put")
    ]


def _windows(row: dict[str, Any]) -> Table:
    table = Table(
        "from request", "know it", "hits", "had nobody joined", "its part of lookups", "of puts", "it holds",
        "requests a shard",
        title=f"a fifth shard joins, {row['workload']}, former owners asked for {row['ramp_s']:g} s: (predicted)",
    )  # fmt: skip
    for one in row["windows"]:
        table.add_row(
            f"{one['first']:,}",
            f"{one['know_it']:.0%}",
            f"{one['share']:.1%} ({one['predicted']:.1%})",
            f"({one['without']:.1%})",
            f"{one['lookups']:.1%} ({one['lookups_predicted']:.1%})",
            f"{one['puts']:.1%} ({one['puts_predicted']:.1%})",
            f"{one['held_mib']:.1f} MiB, {one['held_blocks']:,} blocks ({one['held_blocks_predicted']:,})",
            " ".join(map(str, one["requests"])),
        )
    return table


def show(kill: Sequence[dict[str, Any]], join: Sequence[dict[str, Any]], missed: Sequence[str]) -> None:
    """Print all."""
    console = Console(width=max(WIDTH, Console().width))
    for table in [*(kill_tables(kill) if kill else ()), *(join_tables(join) if join else ())]:
        console.print(table)
    for row in [*kill, *join]:
        if row["error"]:
            console.print(f"an exception reached a caller: {row['error']}", markup=False)
    compared = sum(row["compared"] for row in [*kill, *join])
    console.print(f"every byte of {compared:,} values compared", highlight=False)
    console.print("\n".join(missed) or "all bars are met", markup=False, highlight=False)
