"""The page for a browser, made from what `--json` writes: which plots and tables a benchmark's report has.

PURE: the dictionary in, HTML out. `page` looks at what was run; the template is html.py's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from mmcache.bench import html, plots
from mmcache.bench.html import Section
from mmcache.bench.serving_page import serving_page
from mmcache.bench.transfer_page import transfer_page

Found = Mapping[str, Any]

# Report's series, in the order of their colours, and what they are called.
SERIES: Final = {"got": "this cache", "lru": "exact LRU of the same size", "ideal": "ideal: an endless cache"}
RATES: Final = {"got": "hit_rate", "lru": "lru_hit_rate", "ideal": "ideal_hit_rate"}


def page(found: Found, command: str) -> str:
    """The report of one run. `found` is a report's `to_dict()`, `command` what was typed."""
    if "servers" in found:
        return serving_page(found, command)
    return transfer_page(found, command) if "rows" in found else workload_page(found, command)


def workload_page(found: Found, command: str) -> str:
    """The report of `media`, `chat` or `diffusion`."""
    work = found["workload"]
    lead = (
        f"{found['requests']:,} requests about {work['about']}; working set {_megabytes(work['working_set_nbytes'])}, "
        f"cache {_megabytes(work['capacity_nbytes'])}; {found['wall_s']:.1f} s"
    )
    tiles = [
        (f"{found['hit_rate']:.1%}", "hit rate"),
        (f"{found['ideal_hit_rate']:.1%}", "ideal: an endless cache"),
        (f"{found['lru_hit_rate']:.1%}", "exact LRU of the same size"),
        (f"{found['wrong']:,}", f"wrong of {found['compared']:,} values compared"),
        (f"{found['verify_failures']:,}", "reads that failed verification"),
    ]
    return html.render(
        f"mmcache bench {work['name']}",
        lead,
        _verdict(found),
        tiles,
        [
            Section(
                "Hit rates",
                "Of what was looked up, how much came back. With enough memory all three are equal; with less, it is "
                "for the server's policy to choose what stays, and the exact LRU is there to compare with.",
                [_rates(found), *_over_time(found)],
                _kinds_table(found),
            ),
            *(
                [Section("Work", "What did not have to be computed again.", (), _work_table(found))]
                * bool(found["work"])
            ),
            Section("Bytes", "Payload that was read from the cache and stored in it, by kind.", _bytes(found)),
            Section(
                "Latency",
                "Of every call of one client, from the call to its return; batches of different sizes.",
                [_latency(found["latency_us"])],
                _latency_table(found["latency_us"]),
            ),
            Section("Measured and modelled", "", (), _lists(found)),
            html.run_section(command, _facts(found)),
        ],
    )


def _verdict(found: Found) -> tuple[str, str]:
    verified = "reads were verified" if found["verify"] else "reads were not verified"
    damage = f"; {found['injected']:,} entries damaged on purpose ({found['inject']})" if found["inject"] else ""
    if not found["ok"]:
        return "bad", f"NOT as it must be: {'; '.join(found['complaints'])} ({verified}{damage})"
    if found["inject"] and not found["verify"]:
        return "warn", f"As it must be: without verification the damage gets through ({verified}{damage})"
    if found["inject"]:
        return "good", f"As it must be: every damaged read was rejected ({verified}{damage})"
    return "good", f"As it must be: nothing wrong came back ({verified})"


def _rates(found: Found) -> str:
    rows = [*found["by_kind"].items(), ("all kinds", {**found, "lookups": _lookups(found)})]
    groups = [
        plots.Group(
            f"{kind}, {row['lookups']:,} lookups",
            [100 * row[rate] if row["lookups"] else None for rate in RATES.values()],
            [f"{row[rate]:.1%}" if row["lookups"] else "none asked for" for rate in RATES.values()],
        )
        for kind, row in rows
    ]
    return plots.bars("Hit rate by kind", "hit rate, %", groups, list(SERIES.values()), 100)


def _lookups(found: Found) -> int:
    return sum(row["lookups"] for row in found["by_kind"].values())


def _over_time(found: Found) -> list[str]:
    """Hit rate so far, of all kinds and of each."""
    history = found["history"]
    kinds = list(found["by_kind"])
    drawn = []
    for title, chosen in [("all kinds", kinds), *((kind, [kind]) for kind in kinds)]:
        series = {name: _rate_so_far(history[key], chosen) for key, name in SERIES.items()}
        drawn.append(
            plots.lines(
                f"Hit rate over time, {title}",
                ("requests", "hit rate so far, %"),
                history["requests"],
                series,
                100,
                close=True,
            )
        )
    return drawn


def _rate_so_far(history: Mapping[str, Mapping[str, Sequence[int]]], kinds: Sequence[str]) -> list[float | None]:
    columns = [(history[kind]["hits"], history[kind]["lookups"]) for kind in kinds if kind in history]
    moments = len(columns[0][0]) if columns else 0
    sums = [(sum(hits[at] for hits, _ in columns), sum(asked[at] for _, asked in columns)) for at in range(moments)]
    return [100 * hits / asked if asked else None for hits, asked in sums]


def _bytes(found: Found) -> list[str]:
    history = found["history"]
    drawn = []
    for field, title in (("bytes_read", "read"), ("bytes_written", "stored")):
        most = max((column[field][-1] for column in history["got"].values() if column[field]), default=0)
        size, unit = plots.scaled_bytes(most)
        series = {kind: [nbytes / size for nbytes in column[field]] for kind, column in history["got"].items()}
        drawn.append(
            plots.lines(f"Bytes {title} over time, by kind", ("requests", f"{title} so far, {unit}"),
                        history["requests"], series)
        )  # fmt: skip
    return drawn


def _latency(latency_us: Mapping[str, Mapping[str, float]]) -> str:
    rows = [
        (f"{op}, {row['calls']:,} {'call' if row['calls'] == 1 else 'calls'}", [row["p50"], row["p90"], row["p99"]])
        for op, row in latency_us.items()
    ]
    series = ["half of the calls (p50)", "nine of ten (p90)", "99 of 100 (p99)"]
    return plots.ranges(
        "Latency by operation", "time of a call, µs (each step is ten times the one before)", rows, series
    )


def _kinds_table(found: Found) -> str:
    rows = [
        [
            kind,
            f"{row['lookups']:,}",
            f"{row['hits']:,}",
            *(f"{row[rate]:.2%}" for rate in RATES.values()),
            _megabytes(row["bytes_read"]),
            _megabytes(row["bytes_written"]),
        ]
        for kind, row in found["by_kind"].items()
    ]
    names = ["kind", "lookups", "hits", "hit rate", "exact LRU", "ideal", "read", "stored"]
    return html.table(names, rows)


def _work_table(found: Found) -> str:
    rows = [[what, *(f"{row[name]:,}" for name in ("got", "lru", "ideal"))] for what, row in found["work"].items()]
    return html.table(["", "this cache", "exact LRU", "ideal"], rows)


def _latency_table(latency_us: Mapping[str, Mapping[str, float]]) -> str:
    rows = [
        [op, f"{row['calls']:,}", *(f"{row[cut]:,.0f}" for cut in ("p50", "p90", "p99"))]
        for op, row in latency_us.items()
    ]
    return html.table(["operation", "calls", "p50, µs", "p90, µs", "p99, µs"], rows)


def _lists(found: Found) -> str:
    return html.lists({"Measured": found["measured"], "Modelled": found["modelled"]})


def _facts(found: Found) -> dict[str, object]:
    facts = {**found["workload"], **found["host"]}
    facts["outcomes"] = ", ".join(f"{times:,} {outcome}" for outcome, times in found["outcomes"].items())
    return facts | {f"first reason of {outcome}": reason for outcome, reason in found["reasons"].items()}


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f} MB"
