"""What is told of a run, as one object of plain values: for JSON, the terminal's table and the page. Pure."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from typing import Any, Final

import numpy as np

from tests.faults.check.found import BAD, SLACK_S, Run, back_s, lane_of, lateness, rates, stops_of, violations
from tests.faults.traffic.records import OPS

MOST_STEPS: Final = 1200  # of the timeline


def summary(run: Run, command: str) -> dict[str, Any]:
    """Times are seconds since the run began."""
    bad = violations(run)
    return {
        "command": command,
        "seed": run.seed,
        "seconds": round(run.ended_s - run.began_s, 1),
        "deadline_s": run.deadline_s,
        "slack_s": SLACK_S,
        "phases": {
            name: round(getattr(run, f"{name}_s") - run.began_s, 2) for name in ("trouble", "healed", "quiet", "ended")
        },
        "totals": totals(run, Counter(one.what for one in bad)),
        "ops": ops(run),
        "lateness": lateness_of(run),
        "hit_rates": {one: {**rate, "back_s": back_s(run, one)} for one, rate in rates(run).items()},
        "faults": [
            {
                "kind": one.kind,
                "target": one.target,
                "begin_s": round(one.begin_s - run.began_s, 2),
                "heal_s": round((one.heal_s or one.end_s) - run.began_s, 2),
                "end_s": round(one.end_s - run.began_s, 2),
            }
            for one in run.happened
        ],
        "left_out": run.left_out,
        "lanes": run.lanes,
        "series": series(run),
        "violations": [
            {"what": one.what, "lane": one.lane, "at_s": round(one.at_s - run.began_s, 2), "detail": one.detail}
            for one in bad
        ],
    }


def totals(run: Run, bad: Counter[str]) -> dict[str, int]:
    """Counts of the whole run."""
    client = Counter[str]()
    for life in run.lives:
        client.update(life["told"].get("counters", {}))
    return {
        "calls": sum(map(len, run.calls.values())),
        "compared": sum(int(calls["compared"].sum()) for calls in run.calls.values()),
        **{what: bad[what] for what in BAD},
        "failovers": client["failovers"],
        "copied": client["copied"],
        "verify_failures": client["verify_failures"],
        "processes": len(run.lives),
    }


def ops(run: Run) -> dict[str, dict[str, float]]:
    """By kind of call: how many, and how long they took by the clock, without stops of the caller."""
    lengths: defaultdict[str, list[Any]] = defaultdict(list)
    for stem, calls in run.calls.items():
        by_clock, _ = lateness(calls, run, stops_of(run, lane_of(stem)))
        for number, name in enumerate(OPS):
            lengths[name].append(1e3 * (by_clock + run.deadline_s)[calls["op"] == number])
    told = {}
    for name, parts in lengths.items():
        if len(took_ms := np.concatenate(parts)):
            marks = map(float, np.round(np.percentile(took_ms, [50, 99, 100]), 2))
            told[name] = {"calls": len(took_ms), **dict(zip(("p50_ms", "p99_ms", "worst_ms"), marks, strict=True))}
    return told


def lateness_of(run: Run) -> dict[str, float]:
    """How much longer than its deadline the worst call was, by the clock and by its own time, and how many were past
    the bar; beside it, how late a process was woken that only sleeps."""
    clock, own = [np.full(1, -math.inf)], [np.full(1, -math.inf)]
    for stem, calls in run.calls.items():
        by_clock, by_own = lateness(calls, run, stops_of(run, lane_of(stem)))
        clock.append(by_clock)
        own.append(by_own)
    by_clock, by_own = np.concatenate(clock), np.concatenate(own)
    naps = 1e3 * run.naps[:, 1] if len(run.naps) else np.zeros(1)
    return {
        "worst_ms": round(1e3 * float(by_clock.max()), 1),
        "worst_own_ms": round(1e3 * float(by_own.max()), 1),
        "past_bar": int((by_clock > SLACK_S).sum()),
        "past_bar_own": int((by_own > SLACK_S).sum()),
        "nap_p99_ms": round(float(np.percentile(naps, 99)), 1),
        "nap_worst_ms": round(float(naps.max()), 1),
    }


def series(run: Run) -> dict[str, Any]:
    """Over time, a value a step: calls a second, hit rates, the longest call (without stops of its own), and noise."""
    length_s = run.ended_s - run.began_s
    step_s = max(1.0, math.ceil(length_s / MOST_STEPS))
    steps = math.ceil(length_s / step_s)
    calls = np.zeros(steps)
    worst_ms = np.zeros(steps)
    asked = {one: np.zeros(steps) for one in sorted(set(run.populations.values()))}
    hits = {one: np.zeros(steps) for one in asked}
    for stem, rows in run.calls.items():
        lane = lane_of(stem)
        at = np.clip(((rows["began_s"] - run.began_s) / step_s).astype(int), 0, steps - 1)
        calls += np.bincount(at, minlength=steps)
        by_clock, _ = lateness(rows, run, stops_of(run, lane))
        np.maximum.at(worst_ms, at, 1e3 * (by_clock + run.deadline_s))
        for column, sums in (("asked", asked), ("hits", hits)):
            sums[run.populations[lane]] += np.bincount(at, weights=rows[column], minlength=steps)
    noise_ms = np.zeros(steps)
    if len(run.naps):
        at = np.clip(((run.naps[:, 0] - run.began_s) / step_s).astype(int), 0, steps - 1)
        np.maximum.at(noise_ms, at, 1e3 * run.naps[:, 1])
    return {
        "step_s": step_s,
        "calls_per_s": np.round(calls / step_s, 1).tolist(),
        "worst_ms": np.round(worst_ms, 1).tolist(),
        "noise_ms": np.round(noise_ms, 1).tolist(),
        "hit_rate": {
            one: [round(hit / ask, 4) if ask else None for hit, ask in zip(hits[one], asked[one], strict=True)]
            for one in asked
        },
    }
