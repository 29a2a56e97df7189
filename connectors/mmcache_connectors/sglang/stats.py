"""What moved between SGLang's host memory and the cache since it was last asked, for SGLang's own metrics."""

from __future__ import annotations

import threading
from typing import Final, NamedTuple

GB: Final = 1 << 30  # as SGLang's other backends count
MOST_BATCHES: Final = 10_000  # kept, should nobody ask


class Batches(NamedTuple):
    """For each batch its pages, and GB/s."""

    pages: list[int]
    gb_per_s: list[float]


class Moved:
    """Batches read and written. Thread-safe; `take` begins anew."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._read, self._written = Batches([], []), Batches([], [])

    def note(self, pages: int, nbytes: int, seconds: float, *, written: bool) -> None:
        """A batch of which this much arrived."""
        with self._lock:
            batches = self._written if written else self._read
            if pages and len(batches.pages) < MOST_BATCHES:
                batches.pages.append(pages)
                batches.gb_per_s.append(nbytes / GB / max(seconds, 1e-9))

    def take(self) -> tuple[Batches, Batches]:
        """(read, written) since the last time."""
        with self._lock:
            taken = self._read, self._written
            self._read, self._written = Batches([], []), Batches([], [])
        return taken
