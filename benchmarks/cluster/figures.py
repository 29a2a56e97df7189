"""What requests come to: shares of prefix blocks found in windows, what is kept after a kill, quantiles. PURE."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.cluster.load import Served

WINDOW_SHARE = 6  # a window is so small a part of all requests


@dataclass(frozen=True)
class Windows:
    """Requests by number: those just before something happens at `at`, those that follow, others, the last ones."""

    at: int
    count: int

    @property
    def before(self) -> range:
        """The last ones before it."""
        return range(self.at - self.count // WINDOW_SHARE, self.at)

    @property
    def during(self) -> range:
        """The first ones from it on."""
        return range(self.at, self.at + self.count // WINDOW_SHARE)

    @property
    def after(self) -> range:
        """Those that follow, but for the last ones."""
        return range(self.during.stop, self.end.start)

    @property
    def end(self) -> range:
        """The last ones."""
        return range(self.count - self.count // WINDOW_SHARE, self.count)

    @property
    def since(self) -> range:
        """All from it on."""
        return range(self.at, self.count)

    def named(self) -> dict[str, range]:
        """All but `since`."""
        return {"before": self.before, "during": self.during, "after": self.after, "end": self.end}


def share(found: Sequence[float], blocks: Sequence[int], window: range) -> float:
    """Of the blocks that these requests ask for, those found."""
    return sum(found[number] for number in window) / max(1, sum(blocks[number] for number in window))


def kept(found: Sequence[float], without: Sequence[float], window: range) -> float:
    """Blocks found, over those found where nothing had happened."""
    return sum(found[number] for number in window) / max(1, sum(without[number] for number in window))


def mean(columns: Iterable[Sequence[float]]) -> list[float]:
    """Of several predictions, by number."""
    return [sum(row) / len(row) for row in zip(*columns, strict=True)]


def latencies(served: Sequence[Served]) -> dict[str, dict[str, float]]:
    """Of lookups, gets and puts that asked for anything: seconds at p50 and p99, and the longest."""
    spans = {
        "lookup": [one.times[1] - one.times[0] for one in served],
        "get": [one.times[2] - one.times[1] for one in served if one.matched],
        "put": [one.times[4] - one.times[3] for one in served if one.found < one.blocks],
    }
    return {
        name: {
            "p50_s": round(float(np.quantile(taken or [0.0], 0.5)), 5),
            "p99_s": round(float(np.quantile(taken or [0.0], 0.99)), 5),
            "max_s": round(max(taken, default=0.0), 5),
        }
        for name, taken in spans.items()
    }
