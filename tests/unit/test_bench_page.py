"""The report for a browser: well-formed, needs nothing but itself, says what the figures are and in which units."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest

from mmcache.bench.oracle import Tallies
from mmcache.bench.page import page
from mmcache.bench.report import Latency, Report
from mmcache.bench.samples import Sample
from mmcache.bench.serving import ServeOptions
from mmcache.bench.serving_report import Served, ServeReport
from mmcache.bench.transfer_report import TransferReport
from mmcache.bench.transfer_rows import MixedRow, Row

VOID = {"meta"}
CLOSED = {"rect", "line", "polyline", "circle", "path"}  # of SVG: they close themselves
UNITS = re.compile(r"^requests$|, (%|(B|kB|MB|GB|GB/s|s/GB|µs|ms)\b)|multiple of")


def tallies(*counts: tuple[int, int]) -> Tallies:
    """Embeddings and KV blocks over two requests."""
    found = Tallies.of("embedding", "kv")
    for lookups, hits in counts:
        found["embedding"].lookups += 1
        found["kv"].lookups += lookups
        found["kv"].hits += hits
        found["kv"].bytes_read += hits * 1000
        found["kv"].bytes_written += (lookups - hits) * 1000
        found.mark()
    return found


REPORT = Report(
    workload={
        "name": "chat",
        "about": "3 photos & 1 <video>",
        "working_set_nbytes": 59_000_000,
        "capacity_nbytes": 10**8,
        "capacity_frames": 217,
    },
    requests=2,
    got=tallies((10, 0), (10, 9)),
    ideal=tallies((10, 0), (10, 10)),
    lru=tallies((10, 0), (10, 9)),
    compared=9,
    wrong=0,
    verify_failures=0,
    verify=True,
    inject=None,
    injected=0,
    outcomes={"hit": 9, "unavailable": 0},
    reasons={"miss": "none <was> there"},
    latency_us={"get kv": Latency.of([1000, 2000, 3000]), "a long name of an operation " * 4: Latency.of([0])},
    wall_s=1.25,
    measured=("hits [of a real cache]",),
    modelled=("KV values",),
)
ROWS = [
    Row(transport, op, size, batch, clients, 15, 1.5, 0.25, (0.2, 0.3), 80.0, 160.0, 200.0, 0.5, 0.01, op != "acquire")
    for transport in ("shm", "unix", "tcp")
    for op in ("get", "get+read", "put", "acquire")
    for size, batch in ((65536, 1), (1 << 20, 64))
    for clients in (1, 2)
]
TRANSFER = TransferReport(
    rows=ROWS,
    mixed=[MixedRow(name, 65536, 16 << 20, 480, 80.0, 160.0, 90.0, 2000.0, 3.5) for name in ("shm", "unix", "tcp")],
    longest_step_nbytes=262_144,
    memcpy_gbps={"single": 12.0, "sliced": 7.0, "single_read": 6.0, "sliced_read": 5.0},
    raw_tcp_gbps=4.5,
    compared=100,
    wrong=0,
    failed=0,
    reason="",
    wall_s=9.0,
    workload={"transports": ["shm", "unix", "tcp"], "clients": [1, 2]},
)
SAMPLE = Sample(0.001, 0.25, 0.01, 0.02, 0.5, 800, 8, 768, "abc")
FAILED = Sample(error="HTTP 500: <b>no</b>")
SERVING = ServeReport(
    workload=ServeOptions(urls=["http://a/v1"]).facts() | {"characters_per_token": 4.0},
    requests=[("images 1, question 1", 0), ("images 1, question 2", 1), ("video 2, question 1", 0)],
    served=[
        Served("plain & <slow>", "http://a/v1", "m", [SAMPLE, replace(SAMPLE, ttft_s=0.75), SAMPLE]),
        Served("cached", "http://b/v1", "m", [SAMPLE, replace(SAMPLE, cached_tokens=None, answer="d"), SAMPLE]),
    ],
    wall_s=2.5,
)
REPORTS: dict[str, Mapping[str, Any]] = {
    "serving": SERVING.to_dict(),
    "serving, one failed": replace(
        SERVING,
        served=[
            Served("a", "http://a/v1", "m", [FAILED] * 3),
            Served("b", "http://b/v1", "m", [SAMPLE, replace(SAMPLE, itl_s=None), FAILED]),
        ],
    ).to_dict(),
    "serving, one server": replace(
        SERVING, served=[Served("a", "http://a/v1", "m", [Sample(ttft_s=0.1)] * 3)]
    ).to_dict(),
    "workload": REPORT.to_dict(),
    "nothing done": replace(
        REPORT, requests=0, got=Tallies.of("kv"), ideal=Tallies.of("kv"), lru=Tallies.of("kv"), latency_us={}
    ).to_dict(),
    "transfer": TRANSFER.to_dict(),
    "a row missing": replace(TRANSFER, rows=ROWS[:3]).to_dict(),
}


class Page(HTMLParser):
    """Checks that every element is closed where it must be, and collects texts and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[tuple[str, str, str]] = []  # element, class, text
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID | CLOSED:
            self.open.append((tag, dict(attrs).get("class") or ""))

    def handle_endtag(self, tag: str) -> None:
        if tag not in CLOSED:
            assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.append((*self.open[-1], data))

    def all_of(self, tag: str, kind: str = "") -> list[str]:
        return [text for name, cls, text in self.texts if name == tag and cls == kind]


def test_the_parser_notices_what_is_not_closed() -> None:
    with pytest.raises(AssertionError):
        Page("<p><b>x</p>")
    with pytest.raises(AssertionError):
        Page("<p>")


@pytest.mark.parametrize("found", REPORTS.values(), ids=REPORTS.keys())
def test_it_is_well_formed_and_nothing_is_fetched(found: Mapping[str, Any]) -> None:
    text = page(found, "mmcache bench chat")
    parsed = Page(text)
    names = {name for name, _ in parsed.attributes}
    assert not names & {"src", "href", "srcset", "data", "action", "style"}
    assert not any(name.startswith("on") for name in names)
    assert not any(re.search(r"https?:", value) for _, value in parsed.attributes)
    assert not re.search(r"url\(|@import|<script|<link|<img|<iframe", text)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in parsed.attributes


@pytest.mark.parametrize("found", REPORTS.values(), ids=REPORTS.keys())
def test_every_axis_has_its_unit(found: Mapping[str, Any]) -> None:
    text = page(found, "mmcache bench chat")
    axes = Page(text).all_of("text", "axis")
    assert len(axes) >= text.count('<svg class="plot"') > 3
    assert [axis for axis in axes if not UNITS.search(axis)] == []


def test_it_shows_the_figures_and_what_they_are() -> None:
    parsed = Page(page(REPORTS["workload"], "mmcache bench chat --seed 3"))
    cells = parsed.all_of("td")
    assert parsed.all_of("h1") == ["mmcache bench chat"]
    assert parsed.all_of("code") == ["mmcache bench chat --seed 3"]
    assert parsed.all_of("b")[:3] == ["40.9%", "45.5%", "40.9%"]
    assert {"45.00%", "50.00%", "none <was> there"} <= set(cells)
    assert {"hits [of a real cache]", "KV values"} <= set(parsed.all_of("li"))
    assert any("3 photos & 1 <video>" in lead for lead in parsed.all_of("p", "lead"))
    assert parsed.all_of("p", "verdict good")


def test_the_verdict_is_the_reports() -> None:
    wrong = page(replace(REPORT, wrong=2).to_dict(), "")
    assert "NOT as it must be: 2 wrong values came back" in Page(wrong).all_of("p", "verdict bad")[0]
    shown = page(replace(REPORT, inject="wrong", verify=False, wrong=2, injected=3).to_dict(), "")
    assert "the damage gets through" in Page(shown).all_of("p", "verdict warn")[0]
    bad = page(replace(TRANSFER, wrong=1).to_dict(), "")
    assert "1 value differed" in Page(bad).all_of("p", "verdict bad")[0]


def test_the_page_of_servers_shows_both_and_their_ratio() -> None:
    parsed = Page(page(REPORTS["serving"], "mmcache bench serve"))
    tiles = dict(zip(parsed.all_of("span"), parsed.all_of("b"), strict=False))
    assert tiles["time to first token, cached / plain & <slow>"] == "1.000"
    assert tiles["median time to first token, plain & <slow>"] == "250 ms"
    assert tiles["of prompt tokens cached, cached"] == "64.0%"  # one of three reports none
    assert tiles["of prompt tokens cached, plain & <slow>"] == "96.0%"
    assert tiles["answers the same"] == "2 of 3"
    assert parsed.all_of("p", "verdict good") == ["Every request was answered (6 answers)"]
    assert "3 (few)" in parsed.all_of("td")
    failed = Page(page(REPORTS["serving, one failed"], ""))
    assert "a: 3 requests of 3 failed (HTTP 500: <b>no</b>)" in failed.all_of("p", "verdict bad")[0]
    assert "not reported" in Page(page(REPORTS["serving, one server"], "")).all_of("td")


def test_the_history_ends_with_the_totals_and_is_short() -> None:
    history = REPORTS["workload"]["history"]
    assert history["requests"] == [1, 2]
    assert history["got"]["kv"]["hits"] == [0, 9]
    assert history["ideal"]["kv"]["hits"] == [0, 10]
    many = tallies(*[(1, 1)] * 1000)
    history = replace(REPORT, got=many, ideal=many, lru=many).to_dict()["history"]
    assert len(history["requests"]) == len(history["got"]["kv"]["hits"]) == 120
    assert (history["requests"][-1], history["got"]["kv"]["hits"][-1]) == (1000, 1000)


def test_text_is_legible_on_its_ground() -> None:
    """WCAG's contrast: at least 4.5 for text, 3 for lines and bars, light and dark."""
    style = page(REPORTS["workload"], "").split("<style>")[1].split("</style>")[0]
    looks = [dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6})", part)) for part in re.split("@media", style)[:2]]
    assert all({"page", "panel", "text", "series-1"} <= set(look) for look in looks)
    for look in looks:
        for ground in ("page", "panel"):
            for name, least in {"text": 7.0, "faint": 4.5, "good": 4.5, "bad": 4.5, "warn": 4.5}.items():
                assert contrast(look[name], look[ground]) >= least, (name, ground)
            for place in range(1, 5):
                assert contrast(look[f"series-{place}"], look[ground]) >= 3, (place, ground)


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        red, green, blue = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)
