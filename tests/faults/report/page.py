"""The report for a browser: one page that needs nothing but itself. Pure: the summary in, HTML out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from mmcache.bench import html
from mmcache.bench.html import Section
from tests.faults.check.found import BAD
from tests.faults.report.text import lateness_words
from tests.faults.report.timeline import timeline

Found = Mapping[str, Any]


def page(found: Found) -> str:
    """The whole of it."""
    totals, bad = found["totals"], found["violations"]
    verdict = ("good", "Nothing that may not happen happened") if not bad else (
        "bad", f"NOT as it must be: {', '.join(f'{totals[what]} {what}' for what in BAD if totals[what])}"
    )  # fmt: skip
    late = found["lateness"]
    tiles = [
        (f"{totals['compared']:,}", "values compared, byte by byte"),
        (f"{totals['wrong']:,}", "wrong"),
        (f"{totals['leaked']:,}", "leaked"),
        (f"{totals['raised']:,}", "exceptions that reached a caller"),
        (f"{late['worst_ms']:,.0f} ms", "the longest call past its deadline"),
        (f"{len(found['faults']):,}", "faults"),
        (f"{totals['calls']:,}", "calls"),
    ]
    sections = [
        *([Section("What may not happen", after=_violations(found))] if bad else []),
        Section(
            "Timeline",
            "A fault is dark from its beginning until its healing begins, and pale until that is done: a shard that is "
            "started again answers, say. Point at one to see its times.",
            after=timeline(found),
        ),
        Section("Hit rates", "Of what its reader knew to be stored, by the readers' replicas.", after=_rates(found)),
        Section("Calls", lateness_words(dict(found)) + ".", after=_ops(found)),
        Section("Faults", _left_out(found), after=_faults(found)),
        html.run_section(found["command"], {"seed": str(found["seed"]), **totals}),
    ]
    lead = f"Four shards, Redis and four clients in trouble; {found['seconds']:.0f} s, seed {found['seed']}"
    return html.render("mmcache: real faults on real processes", lead, verdict, tiles, sections)


def _violations(found: Found) -> str:
    rows = [[f"{one['at_s']:.1f} s", one["lane"], one["what"], one["detail"]] for one in found["violations"]]
    return html.table(["when", "who", "what", ""], rows[:200], words=True)


def _rates(found: Found) -> str:
    rows = [
        [
            f"replicas={name[1:]}",
            *("none" if rate[when] is None else f"{rate[when]:.1%}" for when in ("before", "during", "after")),
            "never" if rate["back_s"] is None else f"{rate['back_s']:.1f} s",
        ]
        for name, rate in found["hit_rates"].items()
    ]
    return html.table(["", "before", "in trouble", "at the end", "back after"], rows)


def _ops(found: Found) -> str:
    rows = [
        [name, f"{row['calls']:,}", *(f"{row[mark]:,.1f}" for mark in ("p50_ms", "p99_ms", "worst_ms"))]
        for name, row in found["ops"].items()
    ]
    return html.table(["call", "calls", "p50, ms", "p99, ms", "longest, ms"], rows)


def _faults(found: Found) -> str:
    by_kind: defaultdict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for one in found["faults"]:
        by_kind[one["kind"]].append(one)
    rows = [
        [
            kind,
            f"{len(each):,}",
            f"{sum(one['end_s'] - one['begin_s'] for one in each):,.0f}",
            ", ".join(sorted({one["target"] for one in each})),
        ]
        for kind, each in sorted(by_kind.items())
    ]
    return html.table(["fault", "times", "seconds", "befell"], rows)


def _left_out(found: Found) -> str:
    return "; ".join(f"left out here: {kind} ({why})" for kind, why in found["left_out"].items())
