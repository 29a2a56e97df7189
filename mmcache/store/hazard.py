"""How soon entries are used again, learnt from those that were and those that were not: rates by class and age.

A class is a set of entries expected to fare alike. Age is counted in slots: a slot ends after a fixed share of the
entries' number has been used, so that the same ages mean the same on a small and a large cache, a slow and a busy one.
For each class and each range of ages (half octaves) there are two sums, older ones fading: the uses, and the exposure,
which is entries times accesses spent at that age, hit or not, in the cache or evicted a while ago. Their ratio is the
hazard. The worth of keeping an entry on is the best that can be expected per access over any time to come: the largest,
over all later ages at which one might give up, of the uses until then by the exposure until then (the index of Gittins,
1979, for a job that may end at any time; "hit density" of Beckmann, Chen and Cidon, LHD, NSDI'18, uses such rates).
No row is ever walked: a class keeps how many of its entries were last used in each slot. PURE.
"""

from __future__ import annotations

from math import log2
from typing import Final

RING: Final = 512  # slots that are told apart; a power of two
OLD: Final = RING  # the age of all that is older
PRIOR_HITS: Final = 0.5  # what a class is thought to have seen, at the rates of all together (Jeffreys' half)
HALF_LIFE_STEPS: Final = 512  # advances until an observation counts half
FITS_EVERY: Final = 4  # advances


def _bins() -> tuple[int, ...]:
    found: dict[int, int] = {}
    ages = [found.setdefault(int(2 * log2(1 + age)), len(found)) for age in range(RING)]
    return (*ages, len(found))


BIN_OF_AGE: Final = _bins()
BINS: Final = BIN_OF_AGE[OLD] + 1
OLD_BIN: Final = BINS - 1
_LAST: Final = BINS - 2
_CROSSINGS: Final = tuple(
    (age, BIN_OF_AGE[age - 1], BIN_OF_AGE[age]) for age in range(1, RING) if BIN_OF_AGE[age - 1] != BIN_OF_AGE[age]
)
_FADE: Final = 0.5 ** (FITS_EVERY / HALF_LIFE_STEPS)


class Hazard:
    """The rates of `count` classes. `slot` is the slot now; ages are `min(slot - slot of the last use, OLD)`.

    `worth` [class][bin]: expected uses per access and entry, as of the last `fit`. Memory and work of a call are
    constant; `advance` and `fit` are the longest, tens and hundreds of microseconds.
    """

    def __init__(self, count: int, slot: int) -> None:
        self.count = count
        self.slot = slot
        self.worth = [[0.0] * BINS for _ in range(count)]
        self._used_in = [[0] * RING for _ in range(count)]  # entries by the slot of their last use, ghosts included
        self._ghosts_of = [[0] * RING for _ in range(count)]
        self._at = [[0] * BINS for _ in range(count)]  # entries by their age now
        self._hits = [[0.0] * BINS for _ in range(count)]
        self._exposure = [[0.0] * BINS for _ in range(count)]

    def enter(self, which: int) -> None:
        """An entry of class `which` is used now, and its last stay was ended."""
        self._used_in[which][self.slot % RING] += 1
        self._at[which][0] += 1

    def settle(self, which: int, age: int, count: int) -> None:
        """So many entries of class `which` are this old already: as if each had entered then."""
        self._at[which][BIN_OF_AGE[age]] += count
        if age != OLD:
            self._used_in[which][(self.slot - age) % RING] += count

    def leave(self, which: int, age: int, *, hit: bool) -> None:
        """A stored entry's stay in a class ends: it was used again (`hit`), or is gone for good."""
        at = BIN_OF_AGE[age]
        self._at[which][at] -= 1
        if age != OLD:
            self._used_in[which][(self.slot - age) % RING] -= 1
        if hit:
            self._hits[which][at] += 1

    def haunt(self, which: int, age: int) -> None:
        """A stored entry younger than OLD becomes a ghost; its stay goes on."""
        self._ghosts_of[which][(self.slot - age) % RING] += 1

    def leave_ghost(self, which: int, age: int, *, hit: bool) -> None:
        """As `leave`, for a ghost. One that is not counted any more changes nothing."""
        if age >= OLD or not self._ghosts_of[which][(self.slot - age) % RING]:
            return
        self._ghosts_of[which][(self.slot - age) % RING] -= 1
        self.leave(which, age, hit=hit)

    def advance(self, accesses: int) -> None:
        """The slot, in which there were so many accesses, ends. Ghosts that grow OLD are forgotten."""
        self.slot += 1
        now = self.slot
        here = now % RING
        for at, exposure, used_in, ghosts in zip(self._at, self._exposure, self._used_in, self._ghosts_of, strict=True):
            for place, entries in enumerate(at):
                if entries:
                    exposure[place] += entries * accesses
            leaving = used_in[here]
            if leaving:
                at[_LAST] -= leaving
                at[OLD_BIN] += leaving - ghosts[here]
                used_in[here] = ghosts[here] = 0
            for age, before, after in _CROSSINGS:
                entries = used_in[(now - age) % RING]
                if entries:
                    at[before] -= entries
                    at[after] += entries

    def fit(self) -> None:
        """Compute `worth` anew, and let what was seen fade. Call once in `FITS_EVERY` advances."""
        all_hits = [sum(column) for column in zip(*self._hits, strict=True)]
        all_exposure = [sum(column) for column in zip(*self._exposure, strict=True)]
        prior = [
            PRIOR_HITS * exposure / hits if hits else 0.0 for hits, exposure in zip(all_hits, all_exposure, strict=True)
        ]
        for which in range(self.count):
            hits, exposure = self._hits[which], self._exposure[which]
            self.worth[which] = _best_rates(
                [count + PRIOR_HITS if more else count for count, more in zip(hits, prior, strict=True)],
                [spent + more for spent, more in zip(exposure, prior, strict=True)],
            )
            for place in range(BINS):
                hits[place] *= _FADE
                exposure[place] *= _FADE


def _best_rates(hits: list[float], exposure: list[float]) -> list[float]:
    """For each bin the largest ratio of sums of hits and exposure from there up to any later bin.

    From the last bin to the first, runs of bins are kept whose ratios fall; a bin takes over the runs that raise its
    own.
    """
    runs: list[tuple[float, float]] = []
    best = [0.0] * len(hits)
    for place in range(len(hits) - 1, -1, -1):
        gained, spent = hits[place], exposure[place]
        while runs and runs[-1][0] * spent >= gained * runs[-1][1]:
            more_gained, more_spent = runs.pop()
            gained += more_gained
            spent += more_spent
        runs.append((gained, spent))
        best[place] = gained / spent if spent else 0.0
    return best
