"""What the tests of warm restarts share: a server killed or replaced under its holder, and that memory from outside."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import mmcache
from mmcache.errors import MMCacheError
from mmcache.testing.process import ServerProcess, children_of
from tests.integration.support import eventually

# Before a command: root becomes as any other user here, without a capability (linux/prctl.h: PR_CAPBSET_DROP).
WITHOUT_CAPABILITIES = (
    sys.executable,
    "-c",
    "import ctypes, os, sys\n"
    "for one in range(64): ctypes.CDLL(None).prctl(24, one, 0, 0, 0)\n"
    "os.execvp(sys.argv[1], sys.argv[1:])",
)


def counters_of(url: str) -> dict[str, int]:
    """What the server there counts; nothing where none answers."""
    try:
        with mmcache.connect(url, deadline_s=2.0) as cache:
            found: dict[str, int] = cache.stat()["counters"]
            return found
    except MMCacheError:
        return {}


def next_life(server: ServerProcess, before: list[int], url: str = "") -> dict[str, int]:
    """Wait until another server than these processes answers; its counters."""

    def answered() -> dict[str, int]:
        now = children_of(server.pid)
        return counters_of(url or server.url) if now and now != before else {}

    found: dict[str, int] = eventually(answered, "the next server answers")
    return found


def kill(server: ServerProcess) -> dict[str, int]:
    """SIGKILL the server under its holder; the counters of the next."""
    before = children_of(server.pid)
    os.kill(before[0], signal.SIGKILL)
    return next_life(server, before)


def replace(server: ServerProcess) -> dict[str, int]:
    """Have the holder put another server in its place, of the code that is installed now."""
    before = children_of(server.pid)
    os.kill(server.pid, signal.SIGHUP)
    return next_life(server, before)


class Memory:
    """A map of another process by the name of its file, read and written past everything, as a debugger may."""

    def __init__(self, pid: int, name: str) -> None:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        (line,) = [one for one in lines if name in one and "rw-s" in one]
        start, _, end = line.split()[0].partition("-")
        self.start, self.nbytes = int(start, 16), int(end, 16) - int(start, 16)
        self._file = os.open(f"/proc/{pid}/mem", os.O_RDWR)

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *exc: Any) -> None:
        os.close(self._file)

    def read(self, at: int, nbytes: int) -> bytes:
        """Bytes from `at` on."""
        return os.pread(self._file, nbytes, self.start + at)

    def write(self, at: int, data: bytes) -> None:
        """Put these there."""
        assert os.pwrite(self._file, data, self.start + at) == len(data)
