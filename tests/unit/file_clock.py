"""The clock by which file systems tell when a file changed: it goes on a few milliseconds at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mmcache.testing.values import eventually


def change_after(time_ns: int, path: Path, change: Callable[[Path], object]) -> None:
    """Make this change until the file says that it was made after `time_ns`, Unix time."""

    def is_after() -> bool:
        change(path)
        return path.stat().st_ctime_ns > time_ns

    eventually(is_after, f"{path} changes after {time_ns} ns")
