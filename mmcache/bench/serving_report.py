"""What `mmcache bench serve` found, as data, as JSON and as tables for a terminal.

The page for a browser is made from the same dictionary as the JSON, in serving_page.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from rich.console import Console
from rich.markup import escape

from mmcache.bench.report import bullets, data_table, host
from mmcache.bench.samples import FEW, Ratio, Sample, Spread, cached_share, same_answers
from mmcache.bench.serving_text import TIMES, TOKENS, pair_lines, reasons, spread_cells, title, token_cells
from mmcache.units import count

LATE_SHARE: Final = 0.05  # of the median time to the first token: more, and the sender is part of the figures
NOT_REPORTED: Final = (
    "the server does not report cached tokens in its usage; vLLM does with --enable-prompt-tokens-details, SGLang with "
    "--enable-cache-report"
)
NO_USAGE: Final = "the server reports no usage at all; does it know stream_options.include_usage?"
ONE_PIECE: Final = (
    "of several tokens came in one piece: the first token's time is the whole answer's, and there is none between "
    "tokens; something holds the stream back, or the answers are too short"
)
MEASURED: Final = (
    "times at this client, of answers as they streamed in; with --rate from the moment a request was due, so a late "
    "sender or a full server hides nothing",
    "tokens, and how many of a prompt's were cached, as the server counts them",
    "photos scikit-image ships, cut as a camera that moves over them sees them, sent as JPEG files in data: URLs",
)
MODELLED: Final = (
    "what is asked, in which order, when; words without sense in the amount of --text-tokens",
    "in a chat, what the assistant said before: made up, the same for every server",
)


@dataclass(frozen=True)
class Served:
    """One server, and what it made of each request."""

    name: str
    url: str
    model: str
    samples: Sequence[Sample]

    @property
    def errors(self) -> Counter[str]:
        """How often each reason was given."""
        return Counter(sample.error for sample in self.samples if sample.error)

    @property
    def in_one_piece(self) -> int:
        """Answers of several tokens that arrived at one moment."""
        return sum((sample.completion_tokens or 0) > 1 and sample.itl_s is None for sample in self.samples)

    def spreads(self) -> dict[str, Spread | None]:
        """Of each of TIMES, over the requests that were answered."""
        return {name: Spread.of([getattr(sample, name) for sample in self.samples]) for name in TIMES}

    def why_no_share(self) -> str:
        """Why there is no cached share, or "" where there is one."""
        answered = [sample for sample in self.samples if not sample.error]
        if not answered or any(sample.cached_tokens is not None for sample in answered):
            return ""
        return NOT_REPORTED if any(sample.prompt_tokens is not None for sample in answered) else NO_USAGE

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        spreads = self.spreads()
        late = Spread.of([sample.late_s for sample in self.samples if not sample.error])
        tokens = {name: [getattr(sample, name) for sample in self.samples] for name in TOKENS}
        return {
            "name": self.name,
            "url": self.url,
            "model": self.model,
            "answered": sum(not sample.error for sample in self.samples),
            "errors": dict(self.errors),
            **{name: _rounded(spread) for name, spread in spreads.items()},
            "late_s": _rounded(late),
            **{name: _sum(values) for name, values in tokens.items()},
            "cached_share": _round(cached_share(self.samples)),
        }


@dataclass(frozen=True)
class ServeReport:
    """A finished run. `requests` has each request's name and its place: which question, or turn, it is."""

    workload: Mapping[str, Any]
    requests: Sequence[tuple[str, int]]
    served: Sequence[Served]
    wall_s: float

    @property
    def ok(self) -> bool:
        """Whether every request was answered."""
        return not self.complaints()

    def complaints(self) -> list[str]:
        """What is not as it must be, in words."""
        return [
            f"{one.name}: {count(errors.total(), 'request')} of {len(one.samples):,} failed ({reasons(errors)})"
            for one in self.served
            if (errors := one.errors)
        ]

    def notes(self) -> list[str]:
        """What to know before a figure is believed."""
        found = [f"{one.name}: {why}" for one in self.served if (why := one.why_no_share())]
        for one in self.served:
            ttft = one.spreads()["ttft_s"]
            late = Spread.of([sample.late_s for sample in one.samples if not sample.error])
            if ttft is not None and ttft.few:
                found.append(
                    f"{one.name}: {count(ttft.count, 'answer')} are few; quartiles and medians of fewer than "
                    f"{FEW} are one or two requests' doing; give --requests more"
                )
            if ttft is not None and late is not None and late.most > LATE_SHARE * ttft.median:
                found.append(
                    f"{one.name}: requests were sent up to {1e3 * late.most:.1f} ms late (median "
                    f"{1e3 * late.median:.1f} ms), which counts in their times; this client is busy, or --rate too high"
                )
            if 2 * one.in_one_piece > len([sample for sample in one.samples if (sample.completion_tokens or 0) > 1]):
                found.append(f"{one.name}: {count(one.in_one_piece, 'answer')} {ONE_PIECE}")
        if len({one.url for one in self.served}) < len(self.served):
            found.append("one server is asked everything twice: the second time it has cached the first")
        if len({one.model for one in self.served}) > 1:
            found.append("the servers answer with models of different names")
        if self.workload["rate"] is not None and len(self.served) > 1:
            found.append("each server got the whole rate at the same time; on one machine they take each other's time")
        return found

    def pairs(self) -> dict[str, Any] | None:
        """The second server beside the first, request by request; None where there is one only."""
        if len(self.served) < 2:
            return None
        first, second = (one.samples for one in self.served)
        ratios = {
            name: Ratio.of([getattr(a, name) for a in first], [getattr(b, name) for b in second]) for name in TIMES
        }
        same, compared = same_answers(first, second)
        return {
            **{name: _rounded(ratio) for name, ratio in ratios.items()},
            "same_answers": same,
            "compared_answers": compared,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the field names are documented in docs/bench.md."""
        return {
            "workload": dict(self.workload),
            "servers": [one.to_dict() for one in self.served],
            "pairs": self.pairs(),
            "requests": [
                {"name": name, "place": place, "samples": [_rounded(one.samples[index]) for one in self.served]}
                for index, (name, place) in enumerate(self.requests)
            ],
            "ok": self.ok,
            "complaints": self.complaints(),
            "notes": self.notes(),
            "wall_s": round(self.wall_s, 3),
            "host": host(),
            "measured": list(MEASURED),
            "modelled": list(MODELLED),
        }

    def print(self, console: Console) -> None:
        """The tables and the verdict, for people."""
        console.print(
            f"[bold]mmcache bench serve[/]: {title(self.workload)}; {self.wall_s:.1f} s", highlight=False
        )  # fmt: skip
        found = [one.to_dict() for one in self.served]
        table = data_table("ms", "answers", "p25", "median", "p75", "p90", "p99")
        for name, what in TIMES.items():
            table.add_row(f"[bold]{what}[/]")
            for server in found:
                cells = spread_cells(server[name])
                table.add_row(f"  {escape(server['name'])}", *cells)
        console.print(table)
        tokens = data_table("tokens", "prompt", "cached", "cached share", "generated", "errors")
        for server in found:
            tokens.add_row(escape(server["name"]), *token_cells(server))
        console.print(tokens)
        for line in pair_lines(self.pairs(), [one.name for one in self.served]):
            console.print(escape(line), highlight=False)
        if notes := self.notes():
            console.print("[bold]To know[/]")
            console.print(bullets(notes), highlight=False)
        for complaint in self.complaints():
            console.print(f"[bold red]NOT as it must be[/]: {escape(complaint)}", highlight=False)


def _sum(values: Sequence[int | None]) -> int | None:
    there = [value for value in values if value is not None]
    return sum(there) if there else None


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def _rounded(one: Spread | Ratio | Sample | None) -> dict[str, Any] | None:
    if one is None:
        return None
    fields = {name: _round(value) if isinstance(value, float) else value for name, value in asdict(one).items()}
    return fields | ({"few": one.few} if isinstance(one, Spread) else {})
