"""What a run has seen, and what of it may not be: pure functions from records to violations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from tests.faults.traffic.records import OPS, Calls
from tests.faults.traffic.sleeper import NAP_S, ROW_S

SLACK_S: Final = 0.1  # a call may be that late
POINTS: Final = 2.0  # of the hit rate that may be missing after healing
STEP_S: Final = 0.5
STOP_S: Final = 0.05  # a sleeper that is woken that late: the machine stood still
LONG_STOP_S: Final = 0.5  # and calls may have failed by it
BAD: Final = ("wrong", "raised", "late", "leaked", "died", "silent", "not healed", "not back")


@dataclass
class Happened:
    """A fault. Monotonic times: `heal_s` is when its healing began, `end_s` when it was over; 0: never."""

    kind: str
    target: str
    begin_s: float
    heal_s: float = 0.0
    end_s: float = 0.0
    error: str = ""  # why it could not be brought about, or healed


@dataclass(frozen=True)
class Violation:
    """What may not happen, when (monotonic), and to whom: a lane."""

    what: str
    lane: str
    at_s: float
    detail: str


@dataclass
class Run:
    """Everything that was seen. By client process ("c0-1": of lane c0, the second): `calls`, `troubles`, `lives`."""

    seed: int
    deadline_s: float
    began_s: float
    trouble_s: float
    healed_s: float
    quiet_s: float
    ended_s: float
    happened: list[Happened]
    lanes: list[str]
    populations: dict[str, str]
    calls: dict[str, Calls]
    troubles: dict[str, list[dict[str, Any]]]
    lives: list[dict[str, Any]]
    naps: Any
    left_out: dict[str, str]
    held: dict[str, dict[str, Any]] = field(default_factory=dict)
    servers: dict[str, dict[str, Any]] = field(default_factory=dict)


def violations(run: Run) -> list[Violation]:
    """All of them, in order of time."""
    found = [*wrong_and_raised(run), *late(run), *left_behind(run), *ended_badly(run), *not_healed(run), *not_back(run)]
    return sorted(found, key=lambda one: one.at_s)


def lane_of(stem: str) -> str:
    """Whose process it was."""
    return stem.rpartition("-")[0]


def wrong_and_raised(run: Run) -> Iterator[Violation]:
    """What the clients noticed themselves: wrong bytes, and exceptions."""
    for stem, rows in run.troubles.items():
        for row in rows:
            yield Violation(row["what"], lane_of(stem), row["at_s"], row["detail"])


def lateness(calls: Calls, run: Run, stopped: Sequence[tuple[float, float]]) -> tuple[Any, Any]:
    """By how much each call was longer than its deadline: by the clock, and by its own time. Seconds, below 0 if not.

    Of neither is the time in which this process was stopped on purpose. Its own time is without that in which its
    thread could have run and others had all CPUs, as the kernel counts it, or, where that is more, in which a CPU of
    this machine stood still, as the sleeper saw it.
    """
    away = np.zeros(len(calls))
    for begin_s, end_s in stopped:
        ends = np.minimum(calls["began_s"] + calls["took_s"], end_s)
        away += np.maximum(0.0, ends - np.maximum(calls["began_s"], begin_s))
    by_clock = calls["took_s"] - away - run.deadline_s
    return by_clock, by_clock - np.maximum(calls["waited_s"], still_s(calls, run.naps))


def still_s(calls: Calls, naps: Any) -> Any:
    """For how long a CPU stood still during each call, the one that did so longest: a kernel that a hypervisor stops
    counts no wait.

    A row of the sleeper's is the worst of its naps in ROW_S, wherever in them: this is the most that it can have been.
    """
    each = [_still_s(calls, naps[naps[:, 2] == cpu]) for cpu in np.unique(naps[:, 2])]
    return np.max([np.zeros(len(calls)), *each], axis=0)


def _still_s(calls: Calls, naps: Any) -> Any:
    still = np.zeros(len(calls))
    for began_s, worst_s, _ in naps[naps[:, 1] > STOP_S]:
        ends = np.minimum(calls["began_s"] + calls["took_s"], began_s + ROW_S + NAP_S + worst_s)
        both_s = np.maximum(0.0, ends - np.maximum(calls["began_s"], began_s))
        still += np.minimum(both_s, worst_s)
    return still


def stops_of(run: Run, lane: str) -> list[tuple[float, float]]:
    """When a client was stopped on purpose."""
    return [(one.begin_s, one.end_s) for one in run.happened if (one.kind, one.target) == ("stop client", lane)]


def late(run: Run) -> Iterator[Violation]:
    """Calls that took longer, of their own time, than their deadline and SLACK_S."""
    for stem, calls in run.calls.items():
        by_clock, own = lateness(calls, run, stops_of(run, lane_of(stem)))
        for row in np.flatnonzero(own > SLACK_S):
            call = calls[row]
            detail = (
                f"{OPS[call['op']]} took {call['took_s']:.3f} s: {by_clock[row]:.3f} s past its deadline, "
                f"{own[row]:.3f} s without waits for a CPU ({call['waited_s']:.3f} s) and stops of the machine"
            )
            yield Violation("late", lane_of(stem), float(call["began_s"] + call["took_s"]), detail)


def left_behind(run: Run) -> Iterator[Violation]:
    """Leases, reservations, bytes, descriptors and threads that nobody needs any more."""
    for name, held in run.held.items():
        if held["silent"]:
            yield Violation("silent", name, run.ended_s, "it does not answer at the end")
        for counter, count in held["counters"].items():
            yield Violation("leaked", name, run.ended_s, f"{counter} is {count} with no client left")
        for what, (had, has) in held["more"].items():
            yield Violation("leaked", name, run.ended_s, f"{has} {what}, {had} before the first client")
    for life in run.lives:
        told = life["told"]
        for what in ("descriptors", "threads") if told else ():
            had, has = told["before"][what], told["after"][what]
            if has > had:
                detail = f"{has} {what} after its client was closed, {had} before its first call"
                yield Violation("leaked", lane_of(life["stem"]), run.ended_s, detail)


def ended_badly(run: Run) -> Iterator[Violation]:
    """Processes that died of themselves, and what should not be in their logs."""
    for life in run.lives:
        if not life["killed"] and life["code"] != 0:
            detail = f"its process ended with {life['code']}: {_last(life['said'])}"
            yield Violation("died", lane_of(life["stem"]), run.ended_s, detail)
        elif "Traceback" in life["said"]:
            yield Violation("raised", lane_of(life["stem"]), run.ended_s, _last(life["said"]))
    for name, server in run.servers.items():
        for code in server["codes"]:
            if code:
                yield Violation("died", name, run.ended_s, f"it ended with {code}")
        for said in server["said"]:
            if "Traceback" in said:
                yield Violation("raised", name, run.ended_s, _last(said))


def _last(said: str) -> str:
    return next((line for line in reversed(said.splitlines()) if line.strip()), "it said nothing")[:300]


def not_healed(run: Run) -> Iterator[Violation]:
    """Faults that could not be brought about, or whose victim did not come back."""
    for one in run.happened:
        if one.error:
            yield Violation("not healed", one.target, one.end_s, f"{one.kind}: {one.error}")


def hit_rate(run: Run, population: str, begin_s: float, end_s: float) -> float | None:
    """Of what its readers knew to be stored, the share that was a hit; None: nothing was asked for."""
    asked = hits = 0
    for stem, calls in run.calls.items():
        if run.populations[lane_of(stem)] == population:
            chosen = calls[(calls["began_s"] >= begin_s) & (calls["began_s"] < end_s)]
            asked, hits = asked + int(chosen["asked"].sum()), hits + int(chosen["hits"].sum())
    return hits / asked if asked else None


def rates(run: Run) -> dict[str, dict[str, float | None]]:
    """Hit rates by population: before the trouble, in it, and after it was healed."""
    quiet_s = run.ended_s - run.quiet_s
    times = {
        "before": (run.trouble_s - quiet_s, run.trouble_s),
        "during": (run.trouble_s, run.healed_s),
        "after": (run.quiet_s, run.ended_s),
    }
    populations = sorted(set(run.populations.values()))
    return {one: {when: hit_rate(run, one, *span) for when, span in times.items()} for one in populations}


def back_s(run: Run, population: str) -> float | None:
    """How long after all was healed a time as long as the last quiet one began in which the hit rate was what it was
    before the trouble, within POINTS; None: there was none."""
    before, length_s = rates(run)[population]["before"], run.ended_s - run.quiet_s
    for start_s in np.arange(run.healed_s, run.quiet_s + STEP_S / 2, STEP_S):
        rate = hit_rate(run, population, start_s, start_s + length_s)
        if before is not None and rate is not None and rate >= before - POINTS / 100:
            return float(start_s - run.healed_s)
    return None


def not_back(run: Run) -> Iterator[Violation]:
    """A hit rate that has not returned once all was healed, or that nothing can be said of."""
    for population, rate in rates(run).items():
        before, after = rate["before"], rate["after"]
        if before is None or after is None:
            yield Violation("not back", population, run.ended_s, "nothing was asked for in a quiet time")
        elif back_s(run, population) is None:
            detail = f"hit rate {after:.1%} at the end, no better since all was healed, {before:.1%} before"
            yield Violation("not back", population, run.ended_s, detail)


def may_yet_be_back(run: Run, settle_s: float) -> bool:
    """Whether a hit rate has not returned, and the machine stood still so late that it could not within `settle_s`."""
    stops = run.naps[run.naps[:, 1] > LONG_STOP_S]
    return any(not_back(run)) and bool(np.any(stops[:, 0] > run.quiet_s - settle_s))
