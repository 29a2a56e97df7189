"""The timeline as SVG: a lane each for shards, Redis and clients with their faults; below, what came of them.

Long runs are cut into panels, so that a fault is wide enough to be read. Pure: the summary in, markup out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Final

PANEL_S: Final = 120.0
WIDTH, LEFT, RIGHT = 1160, 74, 14
LANE, BAR = 22, 14
STRIP, STRIP_GAP = 74, 30
AXIS: Final = 34
CHARACTER: Final = 6.6  # of a label, px
TOP: Final = 22

# Which colour a fault has (html.py's series), and what its family is called.
FAMILIES: Final = {
    "a process killed or replaced": (1, ("kill", "kill held", "replace", "kill client", "kill redis")),
    "a process stopped": (2, ("stop", "stop client", "stop redis")),
    "the network": (4, ("partition", "delay", "stall", "cut", "lose")),
    "memory full, members that come and go": (3, ("full", "out of memory", "join", "drain")),
}
_SERIES: Final = {kind: series for series, kinds in FAMILIES.values() for kind in kinds}


@dataclass(frozen=True)
class Window:
    """The part of the run that a panel shows."""

    start_s: float
    span_s: float

    def x(self, at_s: float) -> float:
        """Where that moment lies; what is outside lies on the edge."""
        return LEFT + min(max(at_s - self.start_s, 0.0), self.span_s) / self.span_s * (WIDTH - LEFT - RIGHT)

    def has(self, at_s: float) -> bool:
        """Whether it is shown here."""
        return self.start_s <= at_s <= self.start_s + self.span_s


@dataclass(frozen=True)
class Strip:
    """A plot below the lanes. `mark`: a dashed line at this height; 0: none."""

    title: str
    columns: Mapping[str, Sequence[float | None]]
    top: float
    mark: float = 0.0


def timeline(found: Mapping[str, Any]) -> str:
    """A legend, and a panel for each part of the run."""
    length_s = max(1.0, found["phases"]["ended"])
    count = max(1, math.ceil(length_s / PANEL_S - 0.25))  # a short rest is no panel of its own
    span_s = length_s / count
    return _legend() + "".join(_panel(found, Window(number * span_s, span_s)) for number in range(count))


def _legend() -> str:
    drawn = {
        name: f'<rect class="fill s{series}" x="0" y="1" width="24" height="12" rx="2"/>'
        for name, (series, _) in FAMILIES.items()
    }
    drawn["a violation"] = _cross(12, 7)
    keys = "".join(
        f'<li><svg class="key" viewBox="0 0 24 14" aria-hidden="true">{shape}</svg>{escape(name)}</li>'
        for name, shape in drawn.items()
    )
    return f'<ul class="legend" style="margin:10px 0">{keys}</ul>'


def _panel(found: Mapping[str, Any], window: Window) -> str:
    lanes: Sequence[str] = found["lanes"]
    bottom = TOP + LANE * len(lanes)
    height = bottom + 3 * (STRIP + STRIP_GAP) + AXIS
    parts = [*_grid(window, height - AXIS), *_phases(found["phases"], window, bottom)]
    for place, lane in enumerate(lanes):
        y = TOP + LANE * place
        parts.append(_text(LEFT - 10, y + 15, lane, "label", "end"))
        parts += _bars([one for one in found["faults"] if one["target"] == lane], window, y + (LANE - BAR) / 2)
        parts += _crosses([one for one in found["violations"] if one["lane"] == lane], window, y + LANE / 2)
    parts.append(f'<line class="base" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    for place, strip in enumerate(_strips(found)):
        y = bottom + STRIP_GAP + place * (STRIP + STRIP_GAP)
        parts += _plot(strip, window, y, found["series"]["step_s"])
    what = f"seconds {window.start_s:.0f} to {window.start_s + window.span_s:.0f}"
    shape = f'class="plot" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{what}" style="min-width:900px"'
    drawing = f"<svg {shape}>{''.join(parts)}</svg>"
    return f'<figure style="max-width:none;margin-bottom:16px">{drawing}</figure>'


def _strips(found: Mapping[str, Any]) -> list[Strip]:
    series, deadline_ms = found["series"], 1e3 * found["deadline_s"]
    rates = {
        f"replicas={name[1:]}": [None if one is None else 100 * one for one in ys]
        for name, ys in series["hit_rate"].items()
    }
    longest = {"longest call": series["worst_ms"], "a sleeper woken late": series["noise_ms"]}
    return [
        Strip("calls a second", {"": series["calls_per_s"]}, max(1.0, *series["calls_per_s"])),
        Strip("hit rate of what was stored, %", rates, 100.0),
        Strip("ms; dashed: the deadline", longest, max(deadline_ms * 1.2, *series["worst_ms"]), deadline_ms),
    ]


def _grid(window: Window, height: float) -> list[str]:
    step_s = 10 if window.span_s > 50 else 5
    parts = []
    for tick in range(math.ceil(window.start_s / step_s) * step_s, int(window.start_s + window.span_s) + 1, step_s):
        x = window.x(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{height}"/>')
        parts.append(_text(x, height + 16, str(tick), "tick", "middle"))
    return [*parts, _text((LEFT + WIDTH) / 2, height + 32, "seconds since the run began", "axis", "middle")]


def _phases(phases: Mapping[str, float], window: Window, bottom: float) -> list[str]:
    named = {"trouble begins": phases["trouble"], "all healed": phases["healed"], "quiet": phases["quiet"]}
    parts = []
    for name, at_s in named.items():
        if window.has(at_s):
            x = window.x(at_s)
            parts.append(f'<line class="span" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 16}" y2="{bottom}"/>')
            before = x + len(name) * CHARACTER + 10 > WIDTH
            parts.append(_text(x - 5 if before else x + 5, TOP - 7, name, "axis", "end" if before else "start"))
    return parts


def _bars(faults: Sequence[Mapping[str, Any]], window: Window, y: float) -> list[str]:
    """Each fault; its healing is paler."""
    parts = []
    seen = [one for one in faults if window.has(one["begin_s"]) or window.has(one["end_s"])]
    edge = float(WIDTH - RIGHT)
    for one, following in zip(seen, [*seen[1:], None], strict=False):
        begin, heal, end = (window.x(one[name]) for name in ("begin_s", "heal_s", "end_s"))
        told = f"{one['kind']} {one['target']}: {one['begin_s']:.1f} to {one['end_s']:.1f} s"
        kind = f'class="fill s{_SERIES[one["kind"]]}"'
        shape = f'y="{y:g}" height="{BAR}" rx="2"'
        parts.append(f"<g><title>{escape(told)}</title>")
        parts.append(f'<rect {kind} x="{begin:.1f}" width="{max(3.0, heal - begin):.1f}" {shape}/>')
        if end - heal > 1:
            parts.append(f'<rect {kind} opacity=".45" x="{heal:.1f}" width="{end - heal:.1f}" {shape}/>')
        parts.append("</g>")
        free_to = window.x(following["begin_s"]) if following else edge
        parts += _name(one["kind"], (begin, max(begin + 3, heal)), (end, free_to), y + 11)
    return parts


def _name(kind: str, inside: tuple[float, float], beside: tuple[float, float], y: float) -> list[str]:
    """A fault's name, or its first word: in its bar, or behind it, where there is room; else nowhere."""
    style = 'style="fill:var(--page);font-size:12px"'
    for text in dict.fromkeys((kind, kind.split()[0])):
        width = len(text) * CHARACTER + 6
        if width < inside[1] - inside[0]:
            return [f'<text {style} x="{inside[0] + 4:.1f}" y="{y:.1f}">{escape(text)}</text>']
        if width < beside[1] - beside[0]:
            return [_text(beside[0] + 4, y, text, "label")]
    return []


def _crosses(bad: Sequence[Mapping[str, Any]], window: Window, y: float) -> list[str]:
    return [
        f"<g><title>{escape(one['what'] + ': ' + one['detail'])}</title>{_cross(window.x(one['at_s']), y)}</g>"
        for one in bad
        if window.has(one["at_s"])
    ]


def _cross(x: float, y: float) -> str:
    path = f"M{x - 5:.1f} {y - 5:.1f}l10 10m0 -10l-10 10"
    return (
        f'<path d="{path}" style="stroke:var(--panel);stroke-width:6;fill:none"/>'
        f'<path d="{path}" style="stroke:var(--bad);stroke-width:3;fill:none"/>'
    )


def _plot(strip: Strip, window: Window, y: float, step_s: float) -> list[str]:
    """Its title stands at its upper left, the lines' names at its upper right."""
    parts = [_text(LEFT, y - 7, strip.title, "axis")]
    for share in (0.0, 0.5, 1.0):
        at = y + STRIP * (1 - share)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:g}" y2="{at:g}"/>')
        parts.append(_text(LEFT - 8, at + 4, f"{strip.top * share:,.0f}", "tick", "end"))
    if strip.mark:
        at = y + STRIP * (1 - strip.mark / strip.top)
        dashed = 'style="stroke:var(--bad);stroke-dasharray:4 4"'
        parts.append(f'<line {dashed} x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
    x = WIDTH - RIGHT - 4.0
    for place, (name, values) in reversed(list(enumerate(strip.columns.items()))):
        moments = [(step + 0.5) * step_s for step in range(len(values))]
        points = " ".join(
            f"{window.x(at_s):.1f},{y + STRIP * (1 - min(value, strip.top) / strip.top):.1f}"
            for at_s, value in zip(moments, values, strict=True)
            if value is not None and window.has(at_s)
        )
        line = f'class="stroke s{place + 1}" style="stroke-width:2"'
        parts.append(f'<polyline {line} points="{points}"/>')
        if name:
            parts.append(_text(x, y - 7, name, "tick", "end"))
            x -= len(name) * CHARACTER + 10
            parts.append(f'<line {line} x1="{x - 22:.1f}" x2="{x:.1f}" y1="{y - 11:g}" y2="{y - 11:g}"/>')
            x -= 36
    return parts


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
