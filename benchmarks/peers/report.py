"""What a run found: the verdict, plain values for JSON, and the table for a terminal. PURE: data in, text out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Final

from benchmarks.peers.plan import OPS, VIEW, Case, Plan, Row
from benchmarks.peers.registry import CONTROLS, PEERS
from mmcache.bench.transfer_page import case_text
from mmcache.transport import native

BAD: Final = "BAD DATA"
MEASURED: Final = (
    "real servers and clients: each client a process with the peer's own library; one process puts, another one gets",
    "memcpy by the same process of the same bytes right before: in slices of 256 KiB (the ratio), and each value whole",
    "what was delivered: destinations poisoned before memcpy and before the get, compared byte by byte after it",
)
NOTES: Final = (
    "a figure is sliced memcpy's time over the peer's, for the same bytes on the same number of processes at once: "
    "median [quartiles] over the pairs; 1 is as fast as memcpy",
    "a view ends when the values can be seen where the peer keeps them; what is seen is compared afterwards, untimed",
    "a get ends when the bytes are in the caller's buffer, which was there before; a put when they are stored",
    "verified: the peer checks the bytes itself at both ends, within the time shown; the others deliver what they find",
    "own: each process reads what it put itself, as the peer's memory is not another process's",
    f"controls deliver wrong bytes on purpose: where they do not say {BAD}, nothing above can be believed",
)


@dataclass(frozen=True)
class Report:
    """The rows; for those peers that could not be measured the reason."""

    rows: Sequence[Row]
    failed: Mapping[str, str]
    plan: Plan
    seed: int
    wall_s: float

    def complaints(self) -> list[str]:
        """What is not as it must be, in words: wrong bytes of a peer, or a control that was not caught."""
        gets = [row for row in self.rows if row.op == "get"]
        found = [
            f"{row.peer}, {row.op}, {_what(row)}: {row.wrong} of {row.compared} values were wrong"
            for row in self.rows
            if row.wrong and row.peer not in CONTROLS
        ]
        expected = len(self.plan.cases) * len(self.plan.clients)
        for control in CONTROLS:
            caught = sum(row.wrong > 0 for row in gets if row.peer == control)
            if control in self.failed:
                found.append(f"{control} did not run: {self.failed[control]}")
            elif caught < expected:
                found.append(f"{control} was caught in {caught} of {expected} cases only")
            if any(row.op == VIEW and not row.wrong for row in self.rows if row.peer == control):
                found.append(f"{control} was not caught in every view")
        return found

    @property
    def ok(self) -> bool:
        """Whether the figures can be believed."""
        return not self.complaints()

    def memcpy_gbps(self) -> dict[str, float]:
        """Of one process, for the case with the most bytes a call: the rows' median, sliced and whole."""
        most = max((case.batch * case.size_bytes for case in self.plan.cases), default=0)
        rows = [row for row in self.rows if row.clients == 1 and row.batch * row.size_bytes == most]
        return {
            "sliced": median(row.memcpy_gbps for row in rows) if rows else 0.0,
            "whole": median(row.memcpy_whole_gbps for row in rows) if rows else 0.0,
        }

    def to_dict(self, isolated: str, host: Mapping[str, Any]) -> dict[str, Any]:
        """Plain values for JSON; docs/bench.md has the fields."""
        names = dict.fromkeys([row.peer for row in self.rows] + list(self.failed))
        return {
            "workload": {"name": "peers", "turns": self.plan.turns, "pairs": self.plan.turns * self.plan.pairs,
                         "seed": self.seed, "network": isolated or "a namespace of its own"},
            "rows": [asdict(row) for row in self.rows],
            "peers": {name: {"note": PEERS[name].note, "own": PEERS[name].alone, "control": PEERS[name].control,
                             "verified": PEERS[name].verified} for name in names},
            "failed": dict(self.failed),
            "memcpy_gbps": self.memcpy_gbps(),
            "compared": sum(row.compared for row in self.rows if row.peer not in CONTROLS),
            "wrong": sum(row.wrong for row in self.rows if row.peer not in CONTROLS),
            "ok": self.ok,
            "complaints": self.complaints(),
            "wall_s": round(self.wall_s, 1),
            "host": dict(host),
            "measured": list(MEASURED),
            "notes": notes(),
        }  # fmt: skip


def notes() -> list[str]:
    """How to read the figures, and by which means mmcache's came about."""
    return [*NOTES, f"mmcache's copies in this run: {native.STATE}"]


def _what(row: Row) -> str:
    return f"{case_text(row.size_bytes, row.batch)}, {row.clients} {'client' if row.clients == 1 else 'clients'}"


def heading(case: Case) -> str:
    """A case as the head of a column."""
    text = case_text(case.size_bytes, case.batch)
    return text.removesuffix(", alone").removesuffix(" a call")


def figure(ratio: float) -> str:
    """A ratio with two digits that mean something."""
    return f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.3f}"


def cell_of(row: Row | None) -> str:
    """A ratio with its quartiles."""
    if row is None:
        return ""
    return BAD if row.wrong else f"{figure(row.ratio)} [{figure(row.ratio_q1)}, {figure(row.ratio_q3)}]"


def table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Heads and cells of the one table: a line for each peer and number of clients."""
    small = min(report.plan.cases, key=lambda case: case.size_bytes * case.batch)
    heads = ["peer", "clients", "verified", *(f"{op} {heading(case)}" for op in OPS for case in report.plan.cases)]
    heads += [f"get {heading(small)} p50 us", "p99 us"]
    found = {(row.peer, row.clients, row.op, row.size_bytes, row.batch): row for row in report.rows}
    lines = []
    for clients in report.plan.clients:
        for name, peer in PEERS.items():
            rows = [
                found.get((name, clients, op, case.size_bytes, case.batch)) for op in OPS for case in report.plan.cases
            ]
            if not any(rows):
                continue
            latency = found.get((name, clients, "get", small.size_bytes, small.batch))
            times = [f"{latency.p50_us:,.0f}", f"{latency.p99_us:,.0f}"] if latency and not latency.wrong else ["", ""]
            label = f"{name} (own)" if peer.alone else name
            lines.append([label, str(clients), "yes" if peer.verified else "no", *map(cell_of, rows), *times])
    return heads, lines


def views(report: Report) -> list[str]:
    """Lines with how long it takes to see a batch of values where the peer keeps them."""
    return [
        f"{row.peer}: {BAD if row.wrong else f'{row.p50_us:,.0f} us'} to see {_what(row)}, without a copy (p50)"
        for row in report.rows
        if row.op == VIEW
    ]


def markdown(report: Report, isolated: str) -> str:
    """The table and the verdict, for a terminal or a document."""
    heads, lines = table(report)
    lines += [[name, "", f"failed: {reason}"] + [""] * (len(heads) - 3) for name, reason in report.failed.items()]
    widths = [max(map(len, column)) for column in zip(heads, *(line for line in lines if line[1]), strict=True)]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in [heads, ["-" * width for width in widths], *lines]
    ]
    text += ["", *views(report)]
    memcpy = report.memcpy_gbps()
    text += ["", f"memcpy, one process: {memcpy['sliced']:.1f} GB/s in slices, {memcpy['whole']:.1f} GB/s whole; "
             f"{report.plan.turns * report.plan.pairs} pairs; {report.wall_s:.0f} s; "
             f"network: {isolated or 'a namespace of its own'}"]  # fmt: skip
    text += [f"- {note}" for note in notes()]
    if report.ok:
        compared = sum(row.compared for row in report.rows if row.peer not in CONTROLS)
        text.append(f"as it must be: {compared:,} values compared, none wrong; every control was caught")
    else:
        text.append(f"NOT as it must be: {'; '.join(report.complaints())}")
    return "\n".join(text)
