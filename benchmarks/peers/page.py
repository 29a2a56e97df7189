"""The page for a browser of `make bench-peers`. PURE: the report's dictionary in, HTML out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.peers.report import BAD, figure
from mmcache.bench import html, plots
from mmcache.bench.html import Section
from mmcache.bench.transfer_page import case_text, size_text

Row = Mapping[str, Any]


def peers_page(found: Mapping[str, Any], command: str) -> str:
    """The report of one run. `found` is a report's `to_dict()`, `command` what was typed."""
    rows: Sequence[Row] = found["rows"]
    peers = found["peers"]
    shown = [row for row in rows if not peers[row["peer"]]["control"]]
    memcpy = found["memcpy_gbps"]
    verdict = (
        ("good", f"As it must be: {found['compared']:,} values compared, none wrong; every control was caught")
        if found["ok"]
        else ("bad", f"NOT as it must be: {'; '.join(found['complaints'])}")
    )
    measured = len({row["peer"] for row in shown})
    tiles = [
        (f"{memcpy['sliced']:.1f} GB/s", "memcpy by one process, in slices of 256 KiB"),
        (f"{memcpy['whole']:.1f} GB/s", "memcpy by one process, each value whole"),
        (f"{measured}", "peers measured"),
        (f"{len(found['failed'])}", "peers that could not be measured"),
        (f"{found['wrong']:,}", f"wrong of {found['compared']:,} values compared"),
    ]
    counts = sorted({row["clients"] for row in shown})
    return html.render(
        "mmcache beside other caches",
        f"The same keys and bytes by each of them, one process putting and another getting; {found['wall_s']:.0f} s",
        verdict,
        tiles,
        [
            Section(
                "Against memcpy",
                "How fast the same bytes move, as a share of memcpy of them, in slices of 256 KiB, by the same "
                "processes right before. Those marked verified check the bytes within that time.",
                [_ratios(found, shown, op, clients) for clients in counts for op in ("get", "put")],
            ),
            Section(
                "Latency",
                "Of a get of the smallest value, by one client.",
                [_latency(found, shown)],
            ),
            Section("All rows", after=_table(found, rows) + html.lists({"How to read them": found["notes"]})),
            Section("The peers", after=_peers(found) + html.lists({"Measured": found["measured"]})),
            html.run_section(command, {**found["workload"], **found["host"]}),
        ],
    )


def _label(found: Mapping[str, Any], name: str) -> str:
    peer = found["peers"][name]
    marks = [word for word, said in (("verified", peer["verified"]), ("own memory", peer["own"])) if said]
    return f"{name} ({', '.join(marks)})" if marks else name


def _cases(rows: Sequence[Row]) -> list[tuple[int, int]]:
    return list(dict.fromkeys((row["size_bytes"], row["batch"]) for row in rows))


def _ratios(found: Mapping[str, Any], rows: Sequence[Row], op: str, clients: int) -> str:
    chosen = [row for row in rows if row["op"] == op and row["clients"] == clients]
    cases = _cases(rows)
    groups = []
    for name in dict.fromkeys(row["peer"] for row in chosen):
        own = {(row["size_bytes"], row["batch"]): row for row in chosen if row["peer"] == name}
        values = [own[case]["ratio"] if case in own and not own[case]["wrong"] else None for case in cases]
        texts = [_ratio(own.get(case)) for case in cases]
        groups.append(plots.Group(_label(found, name), values, texts))
    title = f"{op}, {clients} {'client' if clients == 1 else 'clients'}"
    return plots.bars(
        title, "rate, as a multiple of memcpy's (1 = equal)", groups, [case_text(*case) for case in cases]
    )


def _ratio(row: Row | None) -> str:
    if row is None:
        return "not measured"
    return BAD if row["wrong"] else figure(row["ratio"])


def _latency(found: Mapping[str, Any], rows: Sequence[Row]) -> str:
    small = min(_cases(rows), key=lambda case: case[0] * case[1], default=(0, 0))
    chosen = [
        row
        for row in rows
        if (row["op"], row["clients"], (row["size_bytes"], row["batch"])) == ("get", 1, small) and not row["wrong"]
    ]
    points = [(_label(found, row["peer"]), [row["p50_us"], row["p99_us"]]) for row in chosen]
    axis = "time of a call, µs (each step is ten times the one before)"
    return plots.ranges(f"get, {size_text(small[0])}", axis, points, ["half of the calls (p50)", "99 of 100 (p99)"])


def _table(found: Mapping[str, Any], rows: Sequence[Row]) -> str:
    names = ["peer", "clients", "op", "a call", "of memcpy", "quartiles", "GB/s", "memcpy, GB/s", "whole, GB/s",
             "p50, µs", "p99, µs", "pairs", "verified"]  # fmt: skip
    cells = [
        [
            row["peer"],
            str(row["clients"]),
            row["op"],
            case_text(row["size_bytes"], row["batch"]),
            _ratio(row),
            f"{figure(row['ratio_q1'])} to {figure(row['ratio_q3'])}",
            f"{row['gbps']:,.2f}",
            f"{row['memcpy_gbps']:,.2f}",
            f"{row['memcpy_whole_gbps']:,.2f}",
            f"{row['p50_us']:,.0f}",
            f"{row['p99_us']:,.0f}",
            str(row["pairs"]),
            "yes" if row["verified"] else "no",
        ]
        for row in rows
    ]
    return html.table(names, cells)


def _peers(found: Mapping[str, Any]) -> str:
    lines = []
    for name, peer in found["peers"].items():
        reason = found["failed"].get(name)
        lines.append([name, f"could not be measured: {reason}" if reason else "measured", peer["note"]])
    return html.table(["peer", "", "what it does"], lines, words=True)
