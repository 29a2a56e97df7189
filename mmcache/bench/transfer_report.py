"""What `mmcache bench transfer` found: as JSON, and as tables for people. Formatting only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmcache.bench.report import bullets, data_table, host
from mmcache.bench.transfer_page import call_text, size_text
from mmcache.bench.transfer_rows import MixedRow, Row
from mmcache.transport.base import SLICE_NBYTES
from mmcache.units import count

MEASURED = (
    "time of each call of clients in processes of their own, a server in another, all on this machine",
    "memcpy in the same processes, in turns with the calls: the same values, one copy each, on one thread",
    "CPU time, user and system, of all threads of the clients during the calls, and of the server meanwhile",
    "a bare TCP socket, blocking, one stream of 64 MiB, nothing checked: the floor for TCP",
    "what was delivered: destinations poisoned before each round and digests compared after it; a put is read back",
)
MODELLED = ("values: random bytes, all different; nothing else is made up",)
NOTES = (
    "ratio to memcpy: median over the rounds of memcpy's time over the operation's, the same bytes on the same number "
    "of processes at once; GB/s is that of all clients together",
    "get+read: a get, then one read of all it delivered, beside memcpy and the same read: a copy that only puts work "
    "off does not win here",
    "verified: checksums of the bytes as they arrived were checked within the time shown: a get's by the client where "
    "they were delivered, a put's by the server before it counts as stored; acquire's views are unverified",
    "acquire: over shared memory no byte moves, so its GB/s says how much came into view a second; over sockets it "
    "receives whole values into new memory",
    "p99.9: shown for 1,000 calls and more: of small gets, always",
    "CPU: what the kernel does in interrupts, for no process, is in neither",
)
OF_NIXL = "nixl: gets are NIXL's one-sided reads on this host; puts and acquires of such a client go by TCP"


@dataclass(frozen=True)
class TransferReport:
    """What was measured and what was wrong or failed.

    `memcpy_gbps`: of 64 MiB, whole and in slices of 256 KiB, alone and with one read of the destination.
    `longest_step_nbytes`: the most bytes the server copied or hashed without a break, over the whole run.
    """

    rows: Sequence[Row]
    mixed: Sequence[MixedRow]
    longest_step_nbytes: int
    memcpy_gbps: Mapping[str, float]
    raw_tcp_gbps: float
    compared: int
    wrong: int
    failed: int
    reason: str
    wall_s: float
    workload: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether all is as it must be."""
        return not self.complaints()

    def complaints(self) -> list[str]:
        """What is not as it must be, in words."""
        found = [f"{count(self.wrong, 'value')} differed from what was stored"] if self.wrong else []
        if self.failed:
            found.append(
                f"{count(self.failed, 'value')} did not come back or were not stored (first reason: {self.reason})"
            )
        if self.longest_step_nbytes > SLICE_NBYTES:
            found.append(
                f"the server copied or hashed {self.longest_step_nbytes:,} bytes without a break; others must not wait "
                f"for more than {SLICE_NBYTES:,}"
            )
        return found

    @property
    def notes(self) -> list[str]:
        """How to read the figures."""
        return [*NOTES, *([OF_NIXL] if any(row.transport == "nixl" for row in self.rows) else [])]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the field names are documented in docs/bench.md."""
        return {
            "workload": {"name": "transfer", **self.workload},
            "rows": [asdict(row) for row in self.rows],
            "mixed": [asdict(row) for row in self.mixed],
            "longest_step_nbytes": self.longest_step_nbytes,
            "memcpy_gbps": dict(self.memcpy_gbps),
            "raw_tcp_gbps": self.raw_tcp_gbps,
            "compared": self.compared,
            "wrong": self.wrong,
            "failed": self.failed,
            "ok": self.ok,
            "complaints": self.complaints(),
            "wall_s": round(self.wall_s, 3),
            "host": host(),
            "measured": list(MEASURED),
            "modelled": list(MODELLED),
            "notes": self.notes,
        }

    def print(self, console: Console) -> None:
        """The tables and the verdict, for people."""
        memcpy = {name: f"{rate:.1f}" for name, rate in self.memcpy_gbps.items()}
        console.print(
            f"[bold]mmcache bench transfer[/]: memcpy of 64 MiB {memcpy['single']} GB/s whole, {memcpy['sliced']} in "
            f"slices of 256 KiB; with one read of the destination {memcpy['single_read']} and {memcpy['sliced_read']}; "
            f"a bare TCP socket {self.raw_tcp_gbps:.1f} GB/s; {self.wall_s:.1f} s",
            highlight=False,
        )
        console.print(_rows_table(self.rows))
        console.print(bullets(["x 2: by two clients at once", *self.notes]), highlight=False)
        console.print(_cpu_table(self.rows))
        console.print(_mixed_table(self.mixed))
        console.print(
            f"longest step of the server: {self.longest_step_nbytes:,} bytes without a break", highlight=False
        )
        if self.ok:
            console.print(
                f"[bold green]as it must be[/]: {count(self.compared, 'value')} compared, none wrong", highlight=False
            )
        else:
            console.print(f"[bold red]NOT as it must be[/]: {escape('; '.join(self.complaints()))}", highlight=False)


def _rows_table(rows: Sequence[Row]) -> Table:
    table = data_table("path", "op", "a call", "GB/s", "/memcpy", "p50 us", "p99 us", "p99.9", "verified")
    table.padding = 0  # the longest of names and slowest of calls fit too
    before = ""
    for row in rows:
        path = row.transport if row.clients == 1 else f"{row.transport} x {row.clients}"
        if before not in ("", path):
            table.add_section()
        table.add_row(
            path if path != before else "",
            row.op,
            call_text(row.size_bytes, row.batch),
            f"{row.gbps:,.2f}",
            f"{row.ratio_to_memcpy:,.2f}",
            f"{row.p50_us:,.0f}",
            f"{row.p99_us:,.0f}",
            "" if row.p999_us is None else f"{row.p999_us:,.0f}",
            "yes" if row.verified else "no",
        )
        before = path
    return table


def _cpu_table(rows: Sequence[Row]) -> Table:
    """CPU seconds a GB, of the fewest clients that were measured: a row each operation, two columns each transport."""
    fewest = min(row.clients for row in rows)
    chosen = {(row.op, row.size_bytes, row.batch, row.transport): row for row in rows if row.clients == fewest}
    transports = list(dict.fromkeys(row.transport for row in rows))
    ends = [f"{transport} {end}" for transport in transports for end in ("client", "server")]
    caption = f"CPU seconds a GB, {count(fewest, 'client')}"
    table = data_table("op", "a call", *(end.replace(" ", "\n") for end in ends), caption=caption)
    for op, size_bytes, batch in dict.fromkeys(what[:3] for what in chosen):
        cells: list[str] = []
        for transport in transports:
            row = chosen.get((op, size_bytes, batch, transport))
            cells += ["", ""] if row is None else [f"{row.client_cpu_s_per_gb:.3f}", f"{row.server_cpu_s_per_gb:.3f}"]
        table.add_row(op, call_text(size_bytes, batch), *cells)
    return table


def _mixed_table(mixed: Sequence[MixedRow]) -> Table:
    first = mixed[0]
    caption = (
        f"{first.calls:,} gets of {size_text(first.size_bytes)} by one client while the server is otherwise idle, and\n"
        f"as many while another client streams puts and gets of {size_text(first.stream_bytes)}, in turns"
    )
    names = ("idle p50 us", "p99 us", "busy p50 us", "p99 us", "p99 more, ms", "streamed GB/s")
    table = data_table("path", *names, caption=caption)
    for row in mixed:
        times = (row.idle_p50_us, row.idle_p99_us, row.busy_p50_us, row.busy_p99_us)
        more_ms = (row.busy_p99_us - row.idle_p99_us) / 1e3
        cells = [*(f"{time_us:,.0f}" for time_us in times), f"{more_ms:,.2f}", f"{row.streamed_gbps:,.2f}"]
        table.add_row(row.transport, *cells)
    return table
