"""The page for a browser of `mmcache bench transfer`. PURE: the report's dictionary in, HTML out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from mmcache.bench import html, plots
from mmcache.bench.html import Section

NAMES: Final = {"shm": "shared memory", "unix": "unix socket", "tcp": "TCP"}

Row = Mapping[str, Any]


def transfer_page(found: Mapping[str, Any], command: str) -> str:
    """The report of one run. `found` is a report's `to_dict()`, `command` what was typed."""
    rows: Sequence[Row] = found["rows"]
    memcpy = found["memcpy_gbps"]
    floors = {
        "memcpy, 64 MiB whole": memcpy["single"],
        "memcpy, 64 MiB in slices of 256 KiB": memcpy["sliced"],
        "a bare TCP socket, 64 MiB": found["raw_tcp_gbps"],
    }
    verdict = (
        ("good", f"As it must be: {found['compared']:,} values compared, none wrong")
        if found["ok"]
        else ("bad", f"NOT as it must be: {'; '.join(found['complaints'])}")
    )
    tiles = [
        (f"{memcpy['single']:.1f} GB/s", "memcpy, 64 MiB whole"),
        (f"{memcpy['sliced']:.1f} GB/s", "memcpy, in slices of 256 KiB"),
        (f"{found['raw_tcp_gbps']:.1f} GB/s", "a bare TCP socket, 64 MiB"),
        (f"{found['wrong']:,}", f"wrong of {found['compared']:,} values compared"),
    ]
    many = max(row["clients"] for row in rows)
    return html.render(
        "mmcache bench transfer",
        f"Values between clients and a server in processes of their own, beside memcpy; {found['wall_s']:.1f} s",
        verdict,
        tiles,
        [
            Section(
                "Throughput",
                "GB/s is 10⁹ bytes a second, of all clients together; of memcpy and a bare TCP socket, one process's.",
                [_throughput(rows, op, clients, floors) for op in ("get", "put") for clients in (1, many)],
            ),
            Section(
                "Against memcpy",
                "How fast the same values move, as a share of memcpy of them by the same processes at the same time. "
                "Above 1: the client copies on more than one thread.",
                [_ratios(rows, op) for op in ("get", "put")],
            ),
            Section("Latency", "Of a call for one value, by one client.", [_latency(rows, op) for op in _ops(rows)]),
            Section("All rows", after=_table(rows) + html.lists({"How to read them": found["notes"]})),
            Section(
                "Measured and modelled",
                after=html.lists({"Measured": found["measured"], "Modelled": found["modelled"]}),
            ),
            html.run_section(command, {**found["workload"], **found["host"]}),
        ],
    )


def _ops(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["op"] for row in rows))


def _cases(rows: Sequence[Row]) -> list[tuple[int, int]]:
    return list(dict.fromkeys((row["size_bytes"], row["batch"]) for row in rows))


def _by_transport(rows: Sequence[Row], op: str, clients: int, case: tuple[int, int]) -> list[Row | None]:
    """The row of each of NAMES, in that order."""
    found = {
        row["transport"]: row
        for row in rows
        if (row["op"], row["clients"], (row["size_bytes"], row["batch"])) == (op, clients, case)
    }
    return [found.get(transport) for transport in NAMES]


def _throughput(rows: Sequence[Row], op: str, clients: int, floors: Mapping[str, float]) -> str:
    groups = []
    for case in _cases(rows):
        found = _by_transport(rows, op, clients, case)
        values = [row["gbps"] if row else None for row in found]
        groups.append(plots.Group(case_text(*case), values, [_figure(value) for value in values]))
    groups += [plots.Group(label, [value], [_figure(value)], first_series=3) for label, value in floors.items()]
    title = f"{op}, {clients} {'client' if clients == 1 else 'clients'}"
    return plots.bars(title, "throughput, GB/s", groups, list(NAMES.values()))


def _ratios(rows: Sequence[Row], op: str) -> str:
    groups = []
    for case in _cases(rows):
        values = [row["ratio_to_memcpy"] if row else None for row in _by_transport(rows, op, 1, case)]
        groups.append(plots.Group(case_text(*case), values, [_figure(value) for value in values]))
    return plots.bars(f"{op}, 1 client", "rate, as a multiple of memcpy's (1 = equal)", groups, list(NAMES.values()))


def _latency(rows: Sequence[Row], op: str) -> str:
    chosen = [row for row in rows if row["op"] == op and row["clients"] == 1 and row["batch"] == 1]
    chosen.sort(key=lambda row: (row["size_bytes"], list(NAMES).index(row["transport"])))
    points = [
        (f"{size_text(row['size_bytes'])}, {NAMES[row['transport']]}", [row["p50_us"], row["p99_us"]]) for row in chosen
    ]
    axis = "time of a call, µs (each step is ten times the one before)"
    return plots.ranges(op, axis, points, ["half of the calls (p50)", "99 of 100 (p99)"])


def _table(rows: Sequence[Row]) -> str:
    names = ["transport", "op", "value", "batch", "clients", "GB/s", "of memcpy", "p50, µs", "p99, µs", "verified"]
    cells = [
        [
            NAMES[row["transport"]],
            row["op"],
            size_text(row["size_bytes"]),
            str(row["batch"]),
            str(row["clients"]),
            f"{row['gbps']:,.2f}",
            f"{row['ratio_to_memcpy']:,.2f}",
            f"{row['p50_us']:,.0f}",
            f"{row['p99_us']:,.0f}",
            "yes" if row["verified"] else "no",
        ]
        for row in rows
    ]
    return html.table(names, cells)


def _figure(value: float | None) -> str:
    return "not measured" if value is None else f"{value:,.2f}"


def size_text(nbytes: int) -> str:
    """64 KiB, 1 MiB."""
    return f"{nbytes >> 20} MiB" if nbytes >= 1 << 20 else f"{nbytes >> 10} KiB"


def case_text(size_bytes: int, batch: int) -> str:
    """What a call moves."""
    return f"{size_text(size_bytes)}, alone" if batch == 1 else f"{batch} x {size_text(size_bytes)} a call"
