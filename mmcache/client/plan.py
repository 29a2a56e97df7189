"""What to ask at once, and when to ask again: batches a server accepts, and a pause after failures. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

FIRST_PAUSE_S: Final = 0.05
LONGEST_PAUSE_S: Final = 2.0
SPREAD: Final = 0.5
SHARE_NBYTES: Final = 4 << 20  # less is sent sooner than a thread begins


def batches(count: int, max_keys: int) -> Iterator[range]:
    """`range(count)` cut into runs of at most `max_keys` keys."""
    for start in range(0, count, max_keys):
        yield range(start, min(count, start + max_keys))


def put_batches(frame_nbytes: Sequence[int], max_keys: int, max_nbytes: int) -> Iterator[range]:
    """Runs of frames that stay within both limits; a single frame over `max_nbytes` forms a run of its own."""
    start = total = 0
    for position, nbytes in enumerate(frame_nbytes):
        if position > start and (position - start >= max_keys or total + nbytes > max_nbytes):
            yield range(start, position)
            start, total = position, 0
        total += nbytes
    if start < len(frame_nbytes):
        yield range(start, len(frame_nbytes))


def runs_within(costs: Sequence[Sequence[int]], limits: Sequence[int]) -> Iterator[range]:
    """Runs in which no column of `costs` adds up to more than its limit; a row over one forms a run of its own."""
    start, totals = 0, [0] * len(limits)
    for position, row in enumerate(costs):
        sums = [total + cost for total, cost in zip(totals, row, strict=True)]
        if position > start and any(total > limit for total, limit in zip(sums, limits, strict=True)):
            yield range(start, position)
            start, sums = position, list(row)
        totals = sums
    if start < len(costs):
        yield range(start, len(costs))


def shares(nbytes: Sequence[int], count: int) -> list[range]:
    """Runs of values for `count` connections, about as many bytes for each; one run if it is not worth their while."""
    total, cuts, taken = sum(nbytes), [0], 0
    if total < count * SHARE_NBYTES:
        count = max(1, total // SHARE_NBYTES)
    for position, size in enumerate(nbytes):
        if len(cuts) < count and taken >= total * len(cuts) / count:
            cuts.append(position)
        taken += size
    return [range(start, stop) for start, stop in zip(cuts, [*cuts[1:], len(nbytes)], strict=True)]


@dataclass(slots=True)
class Breaker:
    """Whether a shard is worth asking. After a failure it is left alone for a pause that doubles up to a limit.

    Up to there it is no shorter than the failed call took: silence costs callers half of their time at most.
    While open, calls answer misses at once instead of waiting for their deadline each time.
    `draw`, a number from 0 to 1, spreads those who fail together: up to SPREAD of each pause is added by it.
    """

    pause_s: float = 0.0
    retry_at: float = 0.0
    failures: int = 0
    draw: Callable[[], float] = float

    def allows(self, now: float) -> bool:
        """True if a call may go out at monotonic time `now`."""
        return now >= self.retry_at

    def failed(self, now: float, took_s: float = 0.0) -> bool:
        """Note a failure that took so long to be one; True if it is the first after a success."""
        first = not self.pause_s
        self.failures += 1
        self.pause_s = min(LONGEST_PAUSE_S, max(FIRST_PAUSE_S, took_s, 2 * self.pause_s))
        self.retry_at = now + self.pause_s * (1 + SPREAD * self.draw())
        return first

    def succeeded(self, failures: int | None = None) -> bool:
        """Note a success; True if it is the first after a failure.

        `failures` is how many there were when the call began: what was under way when the server failed proves nothing.
        """
        if failures is not None and failures != self.failures:
            return False
        first = self.pause_s > 0.0
        self.pause_s = self.retry_at = 0.0
        return first
