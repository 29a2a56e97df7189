"""What the fuzz targets share: what a target is, what it may cost, and what must not appear in the log."""

from __future__ import annotations

import logging
import os
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Final, Protocol

CORPUS: Final = Path(__file__).resolve().parent / "corpus"
ANSWER_S: Final = 1.0  # within this time a connection must have answered or ended
SPARE_DESCRIPTORS: Final = 4
TRIES: Final = 3  # a busy machine is slow once, a hang is one every time
Mutate = Callable[[bytes], bytes]  # what knows nothing of the format


class Target(Protocol):
    """Something to feed bytes to. `check` raises when a property does not hold, and nothing else ever does."""

    max_nbytes: int

    def seeds(self) -> list[bytes]:
        """Inputs to begin with."""

    def mutate(self, data: bytes, random: Random, blind: Mutate) -> bytes:
        """Another input, made from `data` with knowledge of the format, from all of it or none."""

    def check(self, data: bytes) -> None:
        """Feed it, and see that every property holds."""

    def close(self) -> None:
        """End what was started."""


def regressions(name: str) -> list[Path]:
    """Inputs that once broke a target, and are fed to it by every run."""
    return sorted((CORPUS / name).glob("*"))


@contextmanager
def memory_below(limit_nbytes: int) -> Iterator[None]:
    """Assert that no more than this many bytes of Python and numpy memory are taken inside, over what was before."""
    alone = not tracemalloc.is_tracing()
    if alone:
        tracemalloc.start()
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        if alone:
            tracemalloc.stop()
    assert peak - before <= limit_nbytes, f"{peak - before} bytes of memory for one input; the limit is {limit_nbytes}"


_highest = 0


def peak_rss() -> int:
    """The most bytes this process ever had resident, also before a mark began anew."""
    return max(_highest, _resident_nbytes("VmHWM"))


@contextmanager
def resident_below(limit_nbytes: int) -> Iterator[None]:
    """As `memory_below`, of resident memory: what is merely announced, and never touched, is none."""
    global _highest
    _highest = peak_rss()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = _resident_nbytes("VmRSS")
    yield
    peak = _resident_nbytes("VmHWM")
    assert peak - before <= limit_nbytes, f"{peak - before} bytes resident for one input; the limit is {limit_nbytes}"


def _resident_nbytes(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split(maxsplit=1)[0]) * 1024


class Complaints(logging.Handler):
    """Collects what mmcache logs as an internal error: what it survives, but must never meet."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []
        logging.getLogger("mmcache").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(logging.Formatter().format(record))

    def check(self) -> None:
        """Raise AssertionError if there was one."""
        found, self.found = self.found, []
        assert not found, f"an internal error was logged: {found[0]}"

    def close(self) -> None:
        logging.getLogger("mmcache").removeHandler(self)
        super().close()


def in_time(feed: Callable[[], bool], what: str) -> None:
    """Have `feed` end within ANSWER_S; only an input that is late several times in a row is a hang."""
    for _ in range(TRIES):
        begin = time.monotonic()
        ended = feed()
        took_s = time.monotonic() - begin
        if ended and took_s <= ANSWER_S:
            return
    raise AssertionError(f"{what} took {took_s:.1f} s, {TRIES} times in a row; the limit is {ANSWER_S:g} s")


class Descriptors:
    """Sees that this process does not open ever more of them. The fuzzer around has some of its own, from the start."""

    def __init__(self) -> None:
        self._most = 0

    def check(self) -> None:
        """Raise AssertionError if there are more than at the first check, by SPARE_DESCRIPTORS."""
        found = len(os.listdir("/proc/self/fd"))
        self._most = self._most or found + SPARE_DESCRIPTORS
        assert found <= self._most, f"{found} descriptors are open, where {self._most - SPARE_DESCRIPTORS} were"
