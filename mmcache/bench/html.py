"""One page of HTML that needs nothing but itself: style and plots are inside, nothing is fetched. PURE: text to text.

Light or dark as the reader's system has it. A report is a title, a verdict, figures, sections of plots and tables, and
lists; what goes in for each benchmark is page.py's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

STYLE: Final = """
:root { color-scheme: light dark; --page: #ffffff; --panel: #f5f6f8; --text: #1a1d21; --faint: #4d5561;
  --grid: #d5d9e0; --good: #0a6b2d; --bad: #b3141d; --warn: #8a5300;
  --series-1: #0b5fb8; --series-2: #c2550a; --series-3: #6c7683; --series-4: #7b3fb3; }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --panel: #1e2329; --text: #eceff3; --faint: #b4bcc8;
  --grid: #3a424d; --good: #5fd489; --bad: #ff8a8f; --warn: #f2bd62;
  --series-1: #6db3ff; --series-2: #ffa15c; --series-3: #98a3b1; --series-4: #cba1f5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 24px 20px 48px; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "Noto Sans", "DejaVu Sans", sans-serif; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 20px; margin: 36px 0 8px; }
p { margin: 6px 0; max-width: 80ch; overflow-wrap: anywhere; }
.lead { color: var(--faint); }
code { font: 14px/1.5 ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
.verdict { font-weight: 600; border-left: 5px solid currentColor; padding: 2px 0 2px 12px; margin: 14px 0; }
.good { color: var(--good); } .bad { color: var(--bad); } .warn { color: var(--warn); }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 16px 0; padding: 0; list-style: none; }
.tiles li { background: var(--panel); border-radius: 8px; padding: 10px 16px; min-width: 130px; }
.tiles b { display: block; font-size: 24px; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tiles span { color: var(--faint); font-size: 14px; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 500px), 1fr)); gap: 16px;
  align-items: start; }
figure { margin: 0; background: var(--panel); border-radius: 8px; padding: 14px 16px; max-width: 720px; min-width: 0;
  overflow-x: auto; }
figcaption { font-weight: 600; }
svg.plot { display: block; width: 100%; min-width: 520px; height: auto; margin-top: 8px; font-size: 13px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 4px 0 0; padding: 0; list-style: none;
  font-size: 14px; }
.legend svg { width: 24px; height: 14px; margin-right: 6px; vertical-align: -2px; }
svg .label, svg .figure { paint-order: stroke; stroke: var(--panel); stroke-width: 3px; }
svg text { fill: var(--text); font-family: inherit; } svg text.tick, svg text.axis { fill: var(--faint); }
svg .grid { stroke: var(--grid); } svg .base { stroke: var(--faint); }
svg .span { stroke: var(--faint); stroke-width: 2; }
svg .fill.s1 { fill: var(--series-1); } svg .fill.s2 { fill: var(--series-2); } svg .fill.s3 { fill: var(--series-3); }
svg .fill.s4 { fill: var(--series-4); }
svg .stroke { fill: none; stroke-width: 3; stroke-linejoin: round; }
svg .stroke.s1 { stroke: var(--series-1); } svg .stroke.s2 { stroke: var(--series-2); stroke-dasharray: 7 4; }
svg .stroke.s3 { stroke: var(--series-3); stroke-dasharray: 2 3; }
svg .stroke.s4 { stroke: var(--series-4); stroke-dasharray: 10 3 2 3; }
.close .stroke.s1 { stroke-width: 4; } .close .stroke.s2 { stroke-width: 2.5; stroke-dasharray: 5 6; }
.close .stroke.s3 { stroke-width: 9; stroke-dasharray: none; opacity: .5; }
.scroll { overflow-x: auto; margin: 8px 0; }
table { border-collapse: collapse; font-size: 15px; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--faint); font-size: 14px; padding: 4px 0; }
th, td { padding: 5px 14px 5px 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--grid); }
th:first-child, .words td, .words th { text-align: left; }
.words td { white-space: normal; overflow-wrap: anywhere; }
th { color: var(--faint); font-weight: 600; }
tbody th { color: var(--text); font-weight: 400; white-space: normal; max-width: 40ch; }
.lists { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 0 32px; }
.lists ul { padding-left: 20px; margin: 4px 0; } .lists li { margin: 4px 0; overflow-wrap: anywhere; }
@media print { figure, .tiles li { break-inside: avoid; } }
"""
POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'"  # nothing is loaded, whatever a label holds


@dataclass(frozen=True)
class Section:
    """A part of the report: a heading, a sentence, plots (from plots.py), then whatever markup follows them."""

    heading: str
    lead: str = ""
    plots: Sequence[str] = ()
    after: str = ""


def render(
    title: str,
    lead: str,
    verdict: tuple[str, str],
    tiles: Sequence[tuple[str, str]],
    sections: Sequence[Section],
) -> str:
    """The page. `verdict` is a class (good, bad, warn) and a sentence; `tiles` are a figure and what it is."""
    parts = [f"<h1>{escape(title)}</h1>", f'<p class="lead">{escape(lead)}</p>']
    parts.append(f'<p class="verdict {verdict[0]}">{escape(verdict[1])}</p>')
    figures = "".join(f"<li><b>{escape(figure)}</b><span>{escape(what)}</span></li>" for figure, what in tiles)
    parts.append(f'<ul class="tiles">{figures}</ul>')
    for section in sections:
        parts.append(f"<section><h2>{escape(section.heading)}</h2>")
        if section.lead:
            parts.append(f"<p>{escape(section.lead)}</p>")
        if section.plots:
            parts.append(f'<div class="plots">{"".join(section.plots)}</div>')
        parts.append(f"{section.after}</section>")
    body = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def table(names: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "", *, words: bool = False) -> str:
    """A table; its first column names the rows and the others are numbers, or, with `words`, all are text."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    kind = ' class="words"' if words else ""
    head = f"<thead><tr>{head}</tr></thead>" if names else ""
    return f'<div class="scroll"><table{kind}>{title}{head}<tbody>{body}</tbody></table></div>'


def lists(named: Mapping[str, Sequence[str]]) -> str:
    """Lists side by side, each under its name."""
    parts = []
    for name, lines in named.items():
        items = "".join(f"<li>{escape(line)}</li>" for line in lines)
        parts.append(f"<div><p><b>{escape(name)}</b></p><ul>{items}</ul></div>")
    return f'<div class="lists">{"".join(parts)}</div>'


def run_section(command: str, facts: Mapping[str, object]) -> Section:
    """The last part: the command as it was typed, and a table of what else belongs to the run."""
    rows = [
        [name.replace("_", " "), f"{value:,}" if type(value) is int else str(value)] for name, value in facts.items()
    ]
    return Section("The run", after=f"<p><code>{escape(command)}</code></p>" + table([], rows, words=True))
