"""The page for a browser of `mmcache bench serve`. PURE: the report's dictionary in, HTML out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, Final

from mmcache.bench import html, plots
from mmcache.bench.html import Section
from mmcache.bench.serving_text import TIMES, milliseconds, pair_lines, spread_cells, title, token_cells

QUANTILES: Final = 100  # steps of a curve
MARKS: Final = ("half of them (median)", "three of four (p75)", "all of them (slowest)")

Found = Mapping[str, Any]
Values = Sequence[float | None]


def serving_page(found: Found, command: str) -> str:
    """The report of one run. `found` is a report's `to_dict()`, `command` what was typed."""
    servers, pairs = found["servers"], found["pairs"]
    ttft, axis = _columns(found, "ttft_s", 1e3), "time to first token, ms"
    names = [server["name"] for server in servers]
    return html.render(
        f"mmcache bench serve: {found['workload']['name']}",
        f"{title(found['workload'])}; {found['wall_s']:.1f} s",
        _verdict(found),
        _tiles(servers, pairs),
        [
            Section(
                "Time to first token",
                "From when a request was due until the first token of its answer arrived.",
                [
                    _quantiles("Distribution", axis, ttft),
                    _by_request("In order of the requests", axis, ttft),
                    _by_place(found, axis, ttft, "{:,.1f}"),
                ],
            ),
            Section(
                "Cached tokens",
                "Of a prompt's tokens, those that the server did not compute, as it counts them.",
                _cached(found),
                html.table(["", "prompt", "cached", "cached share", "generated", "errors"], _token_rows(servers)),
            ),
            Section(
                "All times",
                "Milliseconds. A dash: too few answers for that percentile.",
                [_marks(name, what, servers) for name, what in TIMES.items()],
                "".join(_times_table(name, what, servers) for name, what in TIMES.items())
                + html.lists({f"{names[1]} beside {names[0]}": pair_lines(pairs, names)} if pairs else {}),
            ),
            *([Section("To know", after=html.lists({"": found["notes"]}))] if found["notes"] else []),
            Section(
                "Measured and modelled",
                after=html.lists({"Measured": found["measured"], "Modelled": found["modelled"]}),
            ),
            html.run_section(command, _facts(found)),
        ],
    )


def _verdict(found: Found) -> tuple[str, str]:
    if not found["ok"]:
        return "bad", f"NOT as it must be: {'; '.join(found['complaints'])}"
    answers = sum(server["answered"] for server in found["servers"])
    return "good", f"Every request was answered ({answers:,} answers)"


def _tiles(servers: Sequence[Found], pairs: Found | None) -> list[tuple[str, str]]:
    tiles = []
    for server in servers:
        if ttft := server["ttft_s"]:
            tiles.append((f"{milliseconds(ttft['median'])} ms", f"median time to first token, {server['name']}"))
    for server in servers:
        if server["cached_share"] is not None:
            tiles.append((f"{server['cached_share']:.1%}", f"of prompt tokens cached, {server['name']}"))
    if pairs and pairs["ttft_s"]:
        ratio = f"{pairs['ttft_s']['of_medians']:.3f}"
        tiles.insert(0, (ratio, f"time to first token, {servers[1]['name']} / {servers[0]['name']}"))
    if pairs:
        tiles.append((f"{pairs['same_answers']:,} of {pairs['compared_answers']:,}", "answers the same"))
    return tiles


def _columns(found: Found, name: str, scale: float) -> dict[str, list[float | None]]:
    """By server, a value of each request, in order."""
    return {
        server["name"]: [
            None if (value := request["samples"][place][name]) is None else value * scale
            for request in found["requests"]
        ]
        for place, server in enumerate(found["servers"])
    }


def _quantiles(title: str, axis: str, columns: Mapping[str, Values]) -> str:
    """The curve of each server: what share of its answers is not above what."""
    xs = list(range(QUANTILES + 1))
    series: dict[str, Sequence[float | None]] = {}
    for name, values in columns.items():
        there = sorted(value for value in values if value is not None)
        last = len(there) - 1
        series[name] = [there[round(last * x / QUANTILES)] if there else None for x in xs]
    return plots.lines(title, ("share of the requests that take at most so long, %", axis), xs, series)


def _by_request(title: str, axis: str, columns: Mapping[str, Values], top: float | None = None) -> str:
    asked = max(map(len, columns.values()), default=0)
    return plots.lines(title, ("requests", axis), list(range(1, asked + 1)), columns, top)


def _by_place(found: Found, axis: str, columns: Mapping[str, Values], text: str, top: float | None = None) -> str:
    """Medians of the first question (or turn), the second, and so on."""
    unit = "question" if found["workload"]["name"] == "captioning" else "turn"
    places = [request["place"] for request in found["requests"]]
    groups = []
    for at in sorted(set(places)):
        chosen = [
            [value for place, value in zip(places, values, strict=True) if place == at and value is not None]
            for values in columns.values()
        ]
        medians = [median(values) if values else None for values in chosen]
        texts = ["none" if value is None else text.format(value) for value in medians]
        groups.append(plots.Group(f"{unit} {at + 1}", medians, texts))
    return plots.bars(f"Median by {unit}", axis, groups, list(columns), top)


def _cached(found: Found) -> list[str]:
    told = [server for server in found["servers"] if server["cached_share"] is not None]
    if not told:
        return []
    shares = {
        server["name"]: [_share(request["samples"][place]) for request in found["requests"]]
        for place, server in enumerate(found["servers"])
        if server in told
    }
    axis = "cached share of the prompt, %"
    return [_by_request("In order of the requests", axis, shares, 100), _by_place(found, axis, shares, "{:.1f}%", 100)]


def _share(sample: Found) -> float | None:
    """Of a server that reports cached tokens: what it leaves out is 0 (samples.py)."""
    prompt = sample["prompt_tokens"]
    return 100 * (sample["cached_tokens"] or 0) / prompt if prompt else None


def _marks(name: str, what: str, servers: Sequence[Found]) -> str:
    rows = [
        (
            f"{server['name']}, {server[name]['count']:,} answers",
            [1e3 * server[name][cut] for cut in ("median", "q3", "most")],
        )
        for server in servers
        if server[name]
    ]
    return plots.ranges(what.capitalize(), f"{what}, ms (each step is ten times the one before)", rows, MARKS)


def _times_table(name: str, what: str, servers: Sequence[Found]) -> str:
    rows = [[server["name"], *spread_cells(server[name])] for server in servers]
    return html.table(["", "answers", "p25", "median", "p75", "p90", "p99"], rows, f"{what}, ms")


def _token_rows(servers: Sequence[Found]) -> list[list[str]]:
    return [[server["name"], *token_cells(server)] for server in servers]


def _facts(found: Found) -> dict[str, object]:
    facts: dict[str, object] = {name: value for name, value in found["workload"].items() if value not in (None, {})}
    for server in found["servers"]:
        facts[server["name"]] = f"{server['url']}, model {server['model']}"
        if late := server["late_s"]:
            facts[f"{server['name']}: requests sent late"] = f"{1e3 * late['most']:.1f} ms at most"
        for reason, times in server["errors"].items():
            facts[f"{server['name']}: error, {times:,} times"] = reason
    return {**facts, **found["host"]}
