"""A memory cgroup for one process: what it asks for beyond a limit, the kernel answers by killing it.

Pages that a process has already stay where they were counted, so the limit is about new ones.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from mmcache.testing.values import eventually

LIMIT_NBYTES: Final = 1 << 20


class NoLimit(Exception):
    """Why there is no such cgroup to be had here."""


def parent() -> Path:
    """Where memory cgroups are made (cgroups(7): either version). Raises NoLimit."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, options, *_ = line.split()
        root = Path(place)
        if kind == "cgroup" and "memory" in options.split(","):
            return root
        if kind == "cgroup2" and "memory" in _words(root / "cgroup.controllers"):
            with contextlib.suppress(OSError):
                (root / "cgroup.subtree_control").write_text("+memory")
            if "memory" in _words(root / "cgroup.subtree_control"):
                return root
    raise NoLimit("no cgroup with a memory controller may be made")


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def check() -> None:
    """Raises NoLimit where `limited` cannot work."""
    folder = parent() / f"mmcache-faults-{os.getpid()}"
    try:
        folder.mkdir()
        folder.rmdir()
    except OSError as error:
        raise NoLimit(f"{folder}: {error.strerror}") from None


@contextlib.contextmanager
def limited(pid: int, name: str) -> Iterator[None]:
    """The process gets hardly any more memory; in the end, where it lives, it may again."""
    root = parent()
    folder = root / f"mmcache-faults-{os.getpid()}-{name}"
    folder.mkdir()
    try:
        limit = folder / ("memory.max" if (folder / "memory.max").exists() else "memory.limit_in_bytes")
        limit.write_text(str(LIMIT_NBYTES))
        (folder / "cgroup.procs").write_text(str(pid))
        yield
    finally:
        for left in _words(folder / "cgroup.procs"):
            with contextlib.suppress(OSError):  # it has just ended
                (root / "cgroup.procs").write_text(left)
        eventually(lambda: _removed(folder), f"{folder} can be removed")


def _removed(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        folder.rmdir()
    return not folder.exists()
