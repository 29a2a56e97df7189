"""The plots: drawn to scale, legible whatever is in them, and every axis with its unit."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from itertools import combinations

import pytest

from mmcache.bench import plots

LONG = "an operation with a very long name, as somebody's workload may have one day, and then a little more " * 2


def drawing(figure: str) -> ET.Element:
    """The plot itself, parsed."""
    found = ET.fromstring(figure).find("svg")
    assert found is not None
    return found


def texts(figure: str) -> list[ET.Element]:
    return list(drawing(figure).iter("text"))


def boxes(figure: str) -> list[tuple[str, float, float, float, float]]:
    """Each text with its left, right, top and bottom, as wide as the plot assumes text to be."""
    found = []
    for text in texts(figure):
        words = text.text or ""
        width = len(words) * plots.CHARACTER
        x, y = float(text.get("x", "")), float(text.get("y", ""))
        x -= {"start": 0.0, "middle": width / 2, "end": width}[text.get("text-anchor", "start")]
        found.append((words, x, x + width, y - 0.75 * plots.FONT, y + 0.2 * plots.FONT))
    return found


def check_legible(figure: str) -> None:
    _, _, width, height = map(float, drawing(figure).get("viewBox", "").split())
    for words, left, right, top, bottom in boxes(figure):
        assert left >= -1, words
        assert right <= width + 1, words
        assert top >= 0, words
        assert bottom <= height, words
    for one, other in combinations(boxes(figure), 2):
        across = min(one[2], other[2]) - max(one[1], other[1])
        down = min(one[4], other[4]) - max(one[3], other[3])
        assert across <= 0 or down <= 0, (one, other)


BARS = [
    [plots.Group("kv", [75.0, 80.0], ["75.0%", "80.0%"])],
    [plots.Group(LONG, [100.0, 0.0], ["100.0%", "0.0%"]), plots.Group("x", [None, 3.0], ["none asked for", "3.0%"])],
    [plots.Group("nothing", [0.0, 0.0], ["0.0%", "0.0%"])],
    [],
]
LINES: list[tuple[list[int], dict[str, list[float | None]]]] = [
    ([1, 2, 3], {"a": [0.0, 50.0, 66.6], "b": [0.0, 1.0, 2.0], "c": [3.0, 4.0, 5.0]}),
    ([1, 2], {"a": [None, None], "b": [None, 4.0]}),
    ([1], {"a": [0.0]}),
    ([], {"a": []}),
    ([1, 1_000_000], {"a": [0.0, 123_456_789.0]}),
]
RANGES = [
    [("get kv", [10.0, 100.0, 1000.0]), ("put kv", [10.0, 10.0, 10.0])],
    [(LONG, [0.4, 2e6, 3e7]), ("none", [0.0, 0.0, 0.0])],
    [("none", [0.0, 0.0, 0.0])],
    [],
]


@pytest.mark.parametrize("groups", BARS)
def test_bars_are_legible(groups: list[plots.Group]) -> None:
    check_legible(plots.bars("Rates", "hit rate, %", groups, ["one", "two"], 100))
    check_legible(plots.bars("Rates", "hit rate, %", groups, ["one", "two"]))


@pytest.mark.parametrize(("xs", "series"), LINES)
def test_lines_are_legible(xs: list[int], series: dict[str, list[float | None]]) -> None:
    check_legible(plots.lines("Rates", ("requests", "hit rate, %"), xs, series))


@pytest.mark.parametrize("rows", RANGES)
def test_ranges_are_legible(rows: list[tuple[str, list[float]]]) -> None:
    check_legible(plots.ranges("Latency", "time of a call, µs", rows, ["p50", "p90", "p99"]))


def test_the_check_for_overlap_can_fail() -> None:
    figure = plots.bars("t", "hit rate, %", [plots.Group("kv", [1.0], ["1"])], ["one"])
    crowded = figure.replace("</svg></figure>", '<text x="8" y="17" text-anchor="start">kv</text></svg></figure>')
    with pytest.raises(AssertionError):
        check_legible(crowded)


def test_bars_are_as_long_as_their_values() -> None:
    figure = plots.bars("t", "%", [plots.Group("x", [25.0, 50.0, None, 300.0], ["", "", "", ""])], list("abcd"), 100)
    widths = [float(bar.get("width", "")) for bar in drawing(figure).iter("rect")]
    assert widths[1] == pytest.approx(2 * widths[0], abs=0.2)
    assert widths[2] == 0
    assert widths[3] == pytest.approx(4 * widths[0], abs=0.4)  # no further than the axis


def test_a_line_goes_through_its_points() -> None:
    figure = plots.lines("t", ("requests", "%"), [0, 10], {"a": [0.0, 100.0]}, 100)
    (line,) = drawing(figure).iter("polyline")
    (x0, y0), (x1, y1) = (map(float, point.split(",")) for point in line.get("points", "").split())
    marks = {text.text: text for text in texts(figure) if text.get("class") == "tick"}
    assert x1 == pytest.approx(float(marks["10"].get("x", "")), abs=0.1)
    assert y1 + 4 == pytest.approx(float(marks["100"].get("y", "")), abs=0.1)
    assert x1 > x0
    assert y1 < y0  # up is more


def test_ten_times_is_one_step_of_the_logarithmic_axis() -> None:
    figure = plots.ranges("t", "µs", [("a", [10.0, 100.0, 1000.0])], ["p50", "p90", "p99"])
    marks = [float(t.get("x", "")) for t in texts(figure) if t.get("class") == "tick"]
    assert [t.text for t in texts(figure) if t.get("class") == "tick"] == ["10", "100", "1,000"]
    assert marks[1] - marks[0] == pytest.approx(marks[2] - marks[1], abs=0.2)
    (span,) = (line for line in drawing(figure).iter("line") if line.get("class") == "span")
    assert float(span.get("x1", "")) == pytest.approx(marks[0], abs=0.1)
    assert float(span.get("x2", "")) == pytest.approx(marks[2], abs=0.1)


@pytest.mark.parametrize(
    ("most", "ticks"),
    [
        (0, [0, 1]),
        (100, [0, 20, 40, 60, 80, 100]),
        (0.3, [0, 0.1, 0.2, 0.3]),
        (7, [0, 2, 4, 6, 8]),
        (1e9, [0, 2e8, 4e8, 6e8, 8e8, 1e9]),
    ],
)
def test_ticks_are_round_and_reach_the_end(most: float, ticks: list[float]) -> None:
    assert plots.ticks_to(most) == pytest.approx(ticks)


def test_counts_have_no_fractions_on_their_axis() -> None:
    assert plots.ticks_to(2, whole=True) == [0, 1, 2]


def test_figures_of_ticks() -> None:
    assert [plots.number(value) for value in (0, 0.25, 20, 1000, 0.1 + 0.2)] == ["0", "0.25", "20", "1,000", "0.3"]
    assert [plots.scaled_bytes(most) for most in (5, 5e3, 5e6, 5e9)] == [
        (1, "B"),
        (1e3, "kB"),
        (1e6, "MB"),
        (1e9, "GB"),
    ]


def test_labels_are_text_not_markup() -> None:
    figure = plots.bars("<b>", "a & b", [plots.Group("<script>", [1.0], ["<1"])], ["<i>"])
    assert not re.search(r"<(script|b|i|1)\b", figure)
    assert "<script>" in [text.text for text in texts(figure)]
