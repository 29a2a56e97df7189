"""Requests of `mmcache bench serve` as they were answered, and the figures made of them. PURE: numbers in and out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

FEW: Final = 20  # with fewer, quartiles and medians are one or two requests' doing
# A percentile needs so many samples before one of them lies beyond it.
NEEDED: Final = {"p90": 10, "p99": 100}


@dataclass(frozen=True)
class Sample:
    """How one request went at one server. `error` is empty, or says why there is no answer.

    Times are in seconds: `late_s` from when it should have been sent until it was; the others from when it should have
    been sent, so a sender that falls behind hides nothing. `itl_s` is the mean from one token to the next.
    """

    late_s: float = 0.0
    ttft_s: float | None = None
    itl_s: float | None = None
    longest_gap_s: float | None = None
    total_s: float | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    answer: str = ""  # a digest of the text
    error: str = ""


@dataclass(frozen=True)
class Spread:
    """How values lie: their number, the quartiles, and percentiles where there are enough values for them."""

    count: int
    q1: float
    median: float
    q3: float
    p90: float | None
    p99: float | None
    most: float

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Spread | None:
        """Of those that are there; None if none is."""
        there = [value for value in values if value is not None]
        if not there:
            return None
        q1, median, q3, p90, p99 = (float(cut) for cut in np.percentile(there, [25, 50, 75, 90, 99]))
        count = len(there)
        enough = {name: count >= needed for name, needed in NEEDED.items()}
        return cls(
            count, q1, median, q3, p90 if enough["p90"] else None, p99 if enough["p99"] else None, max(there)
        )  # fmt: skip

    @property
    def few(self) -> bool:
        """Whether one or two requests more could move the median."""
        return self.count < FEW


@dataclass(frozen=True)
class Ratio:
    """Of a second server's values to the first's, over requests that both answered: below 1 the second is faster.

    `of_medians` is the ratio of the two medians; the others are quartiles of the ratios of each pair.
    """

    pairs: int
    of_medians: float
    q1: float
    median: float
    q3: float

    @classmethod
    def of(cls, first: Sequence[float | None], second: Sequence[float | None]) -> Ratio | None:
        """None where no request has a value at both."""
        both = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None and a > 0]
        if not both:
            return None
        a, b = np.array(both).T
        q1, median, q3 = (float(cut) for cut in np.percentile(b / a, [25, 50, 75]))
        return cls(len(both), float(np.median(b) / np.median(a)), q1, median, q3)


def cached_share(samples: Sequence[Sample]) -> float | None:
    """Cached tokens over prompt tokens; None where no request reports cached tokens.

    Where some do, the others had none: some servers leave out a 0.
    """
    told = [sample for sample in samples if sample.prompt_tokens]
    if all(sample.cached_tokens is None for sample in told):
        return None
    return sum(sample.cached_tokens or 0 for sample in told) / sum(sample.prompt_tokens or 0 for sample in told)


def same_answers(first: Sequence[Sample], second: Sequence[Sample]) -> tuple[int, int]:
    """How many requests got the same text from both servers, of how many that both answered."""
    both = [(a.answer, b.answer) for a, b in zip(first, second, strict=True) if not a.error and not b.error]
    return sum(a == b for a, b in both), len(both)


def arrivals_s(count: int, rate: float, seed: int) -> list[float]:
    """When each of `count` requests arrives: independent of each other, `rate` a second on average (Poisson)."""
    gaps_s = np.random.default_rng([seed, 1]).exponential(1 / rate, count)
    return [float(at_s) for at_s in gaps_s.cumsum()]


def characters_per_token(few: tuple[int, int], many: tuple[int, int]) -> float:
    """From (characters, prompt tokens) of two prompts that differ in the length of their text alone; at least 0.25."""
    characters, tokens = many[0] - few[0], many[1] - few[1]
    return max(0.25, characters / tokens) if tokens > 0 else 4.0
