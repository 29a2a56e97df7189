"""Plots as SVG text: bars, lines and ranges on a logarithmic axis. PURE: numbers and labels in, markup out.

Colours are the page's (`--series-1` and so on, see html.py), so that a plot follows its light or dark look. Every axis
has a title with its unit. Labels stand on lines of their own, wrapped, never beside what could be as long as they are.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

WIDTH: Final = 560
FONT: Final = 13  # px, as the plot is drawn; the page shows it at about its own width
CHARACTER: Final = 0.58 * FONT  # a digit's width in the usual sans-serif fonts, with something to spare
LINE: Final = 17
LEFT: Final = 8
VALUE_ROOM: Final = 96  # at the end of the longest bar, for its figure
BAR, BAR_GAP, GROUP_GAP = 13, 4, 12
MARKS: Final = ("circle", "diamond", "square")


@dataclass(frozen=True)
class Group:
    """Bars that belong together under one label: a value for each series, and its figure. None: there is none."""

    label: str
    values: Sequence[float | None]
    texts: Sequence[str]
    first_series: int = 0  # whose colour the first value has


def bars(title: str, axis: str, groups: Sequence[Group], series: Sequence[str], top: float | None = None) -> str:
    """Horizontal bars, a colour each series. `axis` is the value axis's title, unit included; `top` its end."""
    most = max((value for group in groups for value in group.values if value is not None), default=0.0)
    ticks = ticks_to(top if top is not None else most)
    scale = (WIDTH - LEFT - VALUE_ROOM) / ticks[-1]
    parts, y = [], 4.0
    for group in groups:
        for line in _wrapped(group.label):
            y += LINE
            parts.append(_text(LEFT, y - 4, line, "label"))
        for place, (value, text) in enumerate(zip(group.values, group.texts, strict=True)):
            width = 0.0 if value is None else max(0.0, min(value, ticks[-1]) * scale)
            shape = f'x="{LEFT}" y="{y:g}" width="{width:.1f}" height="{BAR}"'
            parts.append(f'<rect class="fill s{group.first_series + place + 1}" {shape}/>')
            parts.append(_text(LEFT + width + 6, y + BAR - 2, text, "figure"))
            y += BAR + BAR_GAP
        y += GROUP_GAP
    places = [(LEFT + tick * scale, number(tick)) for tick in ticks]
    parts, height = [*_grid_x(places, 4, y), *parts], y
    return _svg(title, [*parts, *_axis_x(places, axis, height)], height + 2 * LINE + 8, series)


def lines(
    title: str,
    axes: tuple[str, str],
    xs: Sequence[float],
    series: Mapping[str, Sequence[float | None]],
    top: float | None = None,
    *,
    close: bool = False,
) -> str:
    """Lines over common x values; `axes` are the titles of x and y, units included. None: no point there.

    `close`: they may lie on each other, so the third is wide and drawn first, the second thin and drawn last.
    """
    most = max((y for ys in series.values() for y in ys if y is not None), default=0.0)
    ticks_y = ticks_to(top if top is not None else most)
    ticks_x = ticks_to(max(xs, default=1.0), whole=True)
    labels = [number(tick) for tick in ticks_y]
    left = 12 + max(map(len, labels)) * CHARACTER
    upper, height = LINE + 12.0, 210.0
    scale_x = (WIDTH - left - 24) / ticks_x[-1]
    scale_y = (height - upper) / ticks_y[-1]
    parts = [_text(4, LINE - 4, axes[1], "axis")]
    for tick, label in zip(ticks_y, labels, strict=True):
        y = height - tick * scale_y
        parts.append(f'<line class="grid" x1="{left:.1f}" x2="{WIDTH - 24}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(left - 6, y + 4, label, "tick", "end"))
    drawn = list(enumerate(series.values()))
    for place, ys in (*drawn[2:], *drawn[:2]):
        there = [(x, y) for x, y in zip(xs, ys, strict=True) if y is not None]
        points = " ".join(f"{left + x * scale_x:.1f},{height - y * scale_y:.1f}" for x, y in there)
        parts.append(f'<polyline class="stroke s{place + 1}" points="{points}"/>')
    places = [(left + tick * scale_x, number(tick)) for tick in ticks_x]
    return _svg(
        title,
        [*parts, *_axis_x(places, axes[0], height)],
        height + 2 * LINE + 8,
        list(series),
        "close" if close else "lines",
    )


def ranges(title: str, axis: str, rows: Sequence[tuple[str, Sequence[float]]], series: Sequence[str]) -> str:
    """A row each: marks at its values, joined, on a logarithmic axis of powers of ten. Values are above 0."""
    values = [value for _, row in rows for value in row if value > 0]
    low = math.floor(math.log10(min(values))) if values else 0
    high = max(low + 1, math.ceil(math.log10(max(values)))) if values else 1
    left, right = LEFT + 22.0, WIDTH - 36.0

    def place_of(value: float) -> float:
        power = math.log10(value) if value > 0 else low
        return left + (power - low) / (high - low) * (right - left)

    parts, y = [], 4.0
    for label, row in rows:
        for line in _wrapped(label):
            y += LINE
            parts.append(_text(LEFT, y - 4, line, "label"))
        y += 9
        places = [place_of(value) for value in row]
        parts.append(f'<line class="span" x1="{places[0]:.1f}" x2="{places[-1]:.1f}" y1="{y:g}" y2="{y:g}"/>')
        parts += [_mark(MARKS[at % 3], at + 1, x, y) for at, x in reversed(list(enumerate(places)))]
        y += 9 + GROUP_GAP / 2
    ticks = [(place_of(10.0**power), number(10.0**power)) for power in range(low, high + 1)]
    parts = [*_grid_x(ticks, 4, y), *parts]
    return _svg(title, [*parts, *_axis_x(ticks, axis, y)], y + 2 * LINE + 8, series, "marks")


def ticks_to(most: float, whole: bool = False) -> list[float]:
    """0 and up to 5 round steps that reach `most`; `whole`: no fractions."""
    if not most > 0:
        return [0.0, 1.0]
    rough = most / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    step = max(1.0, float(math.ceil(step))) if whole else step
    return [step * count for count in range(math.ceil(most / step - 1e-9) + 1)]


def number(value: float) -> str:
    """A tick's figure: 0, 0.25, 20, 1,000."""
    if value == int(value):
        return f"{int(value):,}"
    return f"{value:.4f}".rstrip("0").rstrip(".") if value >= 1e-4 else f"{value:.0e}"


def scaled_bytes(most: float) -> tuple[float, str]:
    """What to divide byte counts up to `most` by, and the unit's name."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if most >= size:
            return size, unit
    return 1.0, "B"


def _wrapped(label: str) -> list[str]:
    room = int((WIDTH - LEFT - 8) / CHARACTER)
    return textwrap.wrap(label, room) or [""]


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _grid_x(places: Sequence[tuple[float, str]], upper: float, height: float) -> list[str]:
    return [f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{upper:g}" y2="{height:g}"/>' for x, _ in places]


def _axis_x(places: Sequence[tuple[float, str]], title: str, height: float) -> list[str]:
    """The axis below: its line, its figures (those that would touch the one before them left out), its title."""
    parts = [f'<line class="base" x1="{places[0][0]:.1f}" x2="{places[-1][0]:.1f}" y1="{height:g}" y2="{height:g}"/>']
    free_from = -math.inf
    for x, label in places:
        half = len(label) * CHARACTER / 2
        x = min(max(x, half), WIDTH - half)
        if x - half >= free_from:
            parts.append(_text(x, height + LINE, label, "tick", "middle"))
            free_from = x + half + CHARACTER
    middle = (places[0][0] + places[-1][0]) / 2
    return [*parts, _text(middle, height + 2 * LINE + 2, title, "axis", "middle")]


def _mark(shape: str, series: int, x: float, y: float) -> str:
    shapes: dict[str, Callable[[], str]] = {
        "circle": lambda: f'<circle class="fill s{series}" cx="{x:.1f}" cy="{y:.1f}" r="5"/>',
        "diamond": lambda: f'<path class="fill s{series}" d="M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6 -6z"/>',
        "square": lambda: f'<path class="fill s{series}" d="M{x - 4.5:.1f} {y - 4.5:.1f}h9v9h-9z"/>',
    }
    return shapes[shape]()


def _svg(title: str, parts: Sequence[str], height: float, series: Sequence[str], kind: str = "bars") -> str:
    """The figure: its title and legend as text above, the drawing below."""
    keys = []
    for place, name in enumerate(series):
        if kind == "marks":
            sample = _mark(MARKS[place % 3], place + 1, 12, 7)
        elif kind == "bars":
            sample = f'<rect class="fill s{place + 1}" x="5" y="0" width="14" height="14"/>'
        else:
            sample = f'<line class="stroke s{place + 1}" x1="0" x2="24" y1="7" y2="7"/>'
        keys.append(f'<li><svg class="key" viewBox="0 0 24 14" aria-hidden="true">{sample}</svg>{escape(name)}</li>')
    legend = f'<ul class="legend">{"".join(keys)}</ul>' if len(keys) > 1 else ""
    drawing = f'<svg class="plot" viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(title)}">'
    named = f"<figcaption>{escape(title)}</figcaption>{legend}"
    return f'<figure class="{kind}">{named}{drawing}{"".join(parts)}</svg></figure>'
