"""Which runs are asked for so often that one shard cannot be left alone with them. Pure.

No shard is asked: a client counts in its own calls. Where it sees what others see, as clients of one fleet do, a run
that is in a share s of its calls is in about that share of everybody's, and needs s times the number of shards to bear
no more than a fair part of the reads. Counts are halved now and then, so that what has cooled down is let go.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

WINDOW_CALLS: Final = 512
COUNTED_HOMES: Final = 64  # of one call, the first: a hot run is a common beginning
LEAST_CALLS: Final = 16  # a run seen less often than this is not called hot
MOST_COPIES: Final = 64


class Heat:
    """Counts of the homes in a client's calls; bounded by WINDOW_CALLS times COUNTED_HOMES entries twice over."""

    def __init__(self) -> None:
        self._calls = 0
        self._counts: dict[bytes, int] = {}

    def note(self, homes: Sequence[bytes]) -> None:
        """One call for keys with these homes."""
        self._calls += 1
        last = None
        seen: dict[bytes, None] = {}
        for home in homes:
            if home != last:
                seen[home] = None
                last = home
                if len(seen) >= COUNTED_HOMES:
                    break
        for home in seen:
            self._counts[home] = self._counts.get(home, 0) + 1
        if self._calls >= WINDOW_CALLS:
            self._calls //= 2
            self._counts = {home: count // 2 for home, count in self._counts.items() if count > 1}

    def copies(self, home: bytes, shards: int) -> int:
        """On how many of so many shards this home's run is worth having, 1 or more."""
        count = self._counts.get(home, 0)
        return max(1, min(shards, MOST_COPIES, count * shards // self._calls)) if count >= LEAST_CALLS else 1
