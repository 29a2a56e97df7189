"""The page for a browser of `mmcache bench transfer`. PURE: the report's dictionary in, HTML out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from mmcache.bench import html, plots
from mmcache.bench.html import Section

NAMES: Final = {"shm": "shared memory", "unix": "unix socket", "tcp": "TCP", "nixl": "NIXL"}

Row = Mapping[str, Any]


def transfer_page(found: Mapping[str, Any], command: str) -> str:
    """The report of one run. `found` is a report's `to_dict()`, `command` what was typed."""
    rows: Sequence[Row] = found["rows"]
    mixed: Sequence[Row] = found["mixed"]
    memcpy = found["memcpy_gbps"]
    floors = {
        "memcpy, 64 MiB whole": memcpy["single"],
        "memcpy, 64 MiB in slices of 256 KiB": memcpy["sliced"],
        "memcpy whole, and one read of the destination": memcpy["single_read"],
        "memcpy in slices, and one read of the destination": memcpy["sliced_read"],
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
        (f"{found['longest_step_nbytes'] >> 10} KiB", "the server's longest step without a break"),
        (f"{found['wrong']:,}", f"wrong of {found['compared']:,} values compared"),
    ]
    counts = sorted({row["clients"] for row in rows})
    few = counts[0]
    workload = {**found["workload"], "transports": ", ".join(found["workload"]["transports"])}
    workload["clients"] = ", ".join(map(str, workload["clients"]))
    return html.render(
        "mmcache bench transfer",
        f"Values between clients and a server in processes of their own, beside memcpy; {found['wall_s']:.1f} s",
        verdict,
        tiles,
        [
            Section(
                "Throughput",
                "GB/s is 10⁹ bytes a second, of all clients together; of memcpy and a bare TCP socket, one process's.",
                [_throughput(rows, op, clients, floors) for op in ("get", "put") for clients in counts],
            ),
            Section(
                "Against memcpy",
                "How fast the same values move, as a share of memcpy of them by the same processes at the same time. "
                "Above 1: the client copies on more than one thread.",
                [_ratios(rows, op, few) for op in ("get", "put")],
            ),
            Section(
                "Latency",
                f"Of a call for one value, by {_clients(few)}.",
                [_latency(rows, op, few) for op in _ops(rows)],
            ),
            Section(
                "Beside a client that streams",
                f"Gets of {size_text(mixed[0]['size_bytes'])} while the server is otherwise idle, and while another "
                f"client streams puts and gets of {size_text(mixed[0]['stream_bytes'])}, in turns.",
                [_mixed_plot(mixed)],
                _mixed_table(mixed),
            ),
            Section(
                "CPU time",
                f"Seconds a GB (10⁹ bytes), user and system, of {_clients(few)} and of the server.",
                [_cpu(rows, op, few) for op in ("get", "put")],
            ),
            Section("All rows", after=_table(rows) + html.lists({"How to read them": found["notes"]})),
            Section(
                "Measured and modelled",
                after=html.lists({"Measured": found["measured"], "Modelled": found["modelled"]}),
            ),
            html.run_section(command, {**workload, **found["host"]}),
        ],
    )


def _clients(clients: int) -> str:
    return f"{clients} {'client' if clients == 1 else 'clients'}"


def _ops(rows: Sequence[Row]) -> list[str]:
    """But for get+read, which is shown beside get."""
    return list(dict.fromkeys(row["op"] for row in rows if row["op"] != "get+read"))


def _names(rows: Sequence[Row]) -> list[str]:
    """Of the transports that were measured."""
    return [name for transport, name in NAMES.items() if any(row["transport"] == transport for row in rows)]


def _cases(rows: Sequence[Row]) -> list[tuple[int, int]]:
    return list(dict.fromkeys((row["size_bytes"], row["batch"]) for row in rows))


def _by_transport(
    rows: Sequence[Row], op: str, clients: int, case: tuple[int, int], field: str
) -> tuple[list[float | None], list[str]]:
    """A field of the row of each transport in `_names`, and the figures for it."""
    found = {
        NAMES[row["transport"]]: row[field]
        for row in rows
        if (row["op"], row["clients"], row["size_bytes"], row["batch"]) == (op, clients, *case)
    }
    values = [found.get(name) for name in _names(rows)]
    return values, ["not measured" if value is None else _figure(value) for value in values]


def _throughput(rows: Sequence[Row], op: str, clients: int, floors: Mapping[str, float]) -> str:
    groups = []
    for case in _cases(rows):
        groups.append(plots.Group(case_text(*case), *_by_transport(rows, op, clients, case, "gbps")))
    groups += [plots.Group(label, [value], [_figure(value)], first_series=3) for label, value in floors.items()]
    return plots.bars(f"{op}, {_clients(clients)}", "throughput, GB/s", groups, _names(rows))


def _ratios(rows: Sequence[Row], op: str, clients: int) -> str:
    groups = []
    shown = [(op, case) for case in _cases(rows)]
    if op == "get":
        shown += [("get+read", (row["size_bytes"], row["batch"])) for row in rows if row["op"] == "get+read"][:1]
    for name, case in shown:
        label = case_text(*case) + (", both with one read of the destination" if name == "get+read" else "")
        groups.append(plots.Group(label, *_by_transport(rows, name, clients, case, "ratio_to_memcpy")))
    title, axis = f"{op}, {_clients(clients)}", "rate, as a multiple of memcpy's (1 = equal)"
    return plots.bars(title, axis, groups, _names(rows))


def _latency(rows: Sequence[Row], op: str, clients: int) -> str:
    chosen = [row for row in rows if row["op"] == op and row["clients"] == clients and row["batch"] == 1]
    chosen.sort(key=lambda row: (row["size_bytes"], list(NAMES).index(row["transport"])))
    points = [
        (f"{size_text(row['size_bytes'])}, {NAMES[row['transport']]}", [row["p50_us"], row["p99_us"]]) for row in chosen
    ]
    axis = "time of a call, µs (each step is ten times the one before)"
    return plots.ranges(op, axis, points, ["half of the calls (p50)", "99 of 100 (p99)"])


def _mixed_plot(mixed: Sequence[Row]) -> str:
    points = [
        (f"{NAMES[row['transport']]}, {name}", [row[f"{load}_p50_us"], row[f"{load}_p99_us"]])
        for row in mixed
        for load, name in (("idle", "idle"), ("busy", "while another client streams"))
    ]
    axis = "time of a call, µs (each step is ten times the one before)"
    return plots.ranges("small gets", axis, points, ["half of the calls (p50)", "99 of 100 (p99)"])


def _mixed_table(mixed: Sequence[Row]) -> str:
    names = ["transport", "calls", "idle p50, µs", "idle p99, µs", "busy p50, µs", "busy p99, µs", "streamed GB/s"]
    fields = ("calls", "idle_p50_us", "idle_p99_us", "busy_p50_us", "busy_p99_us")
    return html.table(
        names,
        [
            [NAMES[row["transport"]], *(f"{row[field]:,.0f}" for field in fields), f"{row['streamed_gbps']:,.2f}"]
            for row in mixed
        ],
    )


def _cpu(rows: Sequence[Row], op: str, clients: int) -> str:
    groups = []
    for row in rows:
        if (row["op"], row["clients"]) == (op, clients):
            values = [row["client_cpu_s_per_gb"], row["server_cpu_s_per_gb"]]
            label = f"{case_text(row['size_bytes'], row['batch'])}, {NAMES[row['transport']]}"
            groups.append(plots.Group(label, values, [f"{value:.3f}" for value in values]))
    return plots.bars(f"{op}, {_clients(clients)}", "CPU time, s/GB", groups, ["client", "server"])


def _table(rows: Sequence[Row]) -> str:
    names = [
        "transport", "op", "value", "batch", "clients", "rounds", "GB/s", "of memcpy (quartiles)", "p50, µs", "p99, µs",
        "p99.9, µs", "client CPU, s/GB", "server CPU, s/GB", "verified",
    ]  # fmt: skip
    cells = [
        [
            NAMES[row["transport"]],
            row["op"],
            size_text(row["size_bytes"]),
            str(row["batch"]),
            str(row["clients"]),
            str(row["rounds"]),
            f"{row['gbps']:,.2f}",
            "{:,.2f} ({:,.2f} to {:,.2f})".format(row["ratio_to_memcpy"], *row["ratio_quartiles"]),
            f"{row['p50_us']:,.0f}",
            f"{row['p99_us']:,.0f}",
            "" if row["p999_us"] is None else f"{row['p999_us']:,.0f}",
            f"{row['client_cpu_s_per_gb']:.3f}",
            f"{row['server_cpu_s_per_gb']:.3f}",
            "yes" if row["verified"] else "no",
        ]
        for row in rows
    ]
    return html.table(names, cells)


def _figure(value: float) -> str:
    return f"{value:,.2f}"


def size_text(nbytes: int) -> str:
    """64 KiB, 1 MiB."""
    return f"{nbytes >> 20} MiB" if nbytes >= 1 << 20 else f"{nbytes >> 10} KiB"


def call_text(size_bytes: int, batch: int) -> str:
    """64 KiB, 64 x 1 MiB: what a call moves, for a table."""
    return size_text(size_bytes) if batch == 1 else f"{batch} x {size_text(size_bytes)}"


def case_text(size_bytes: int, batch: int) -> str:
    """What a call moves."""
    return f"{size_text(size_bytes)}, alone" if batch == 1 else f"{batch} x {size_text(size_bytes)} a call"
