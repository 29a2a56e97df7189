"""What a client process writes down of its calls, a row each, in a file that outlives a SIGKILL; and its troubles.

Times are CLOCK_MONOTONIC's, which all processes of a host share.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

OPS: Final = ("get_into", "put", "match_prefix", "pin_prefix", "acquire", "contains", "release")
CALL: Final = np.dtype(
    [
        ("began_s", "f8"),
        ("took_s", "f8"),
        ("waited_s", "f8"),  # of that: its thread was ready to run, and no CPU was free
        ("op", "u1"),
        ("asked", "u4"),  # values that this client knows to have been stored
        ("hits", "u4"),  # of those
        ("compared", "u4"),  # values whose every byte was
    ]
)
Calls = NDArray[Any]


def cpu_wait_s() -> float:
    """For how long the calling thread was ready to run and did not, since it began (proc_pid_schedstat, the second
    number). 0 where the kernel does not count it."""
    try:
        return int(Path(f"/proc/self/task/{threading.get_native_id()}/schedstat").read_text().split()[1]) / 1e9
    except OSError:
        return 0.0


def go_first(priority: int = 1) -> None:
    """Have this thread run before all others of this machine, where that is allowed: what it measures is then its own.
    It must sleep most of the time (sched(7): SCHED_RR)."""
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(priority))


class Recorder:
    """Writes the records of one process into FOLDER/NAME.calls and FOLDER/NAME.troubles. Use as a context manager."""

    def __init__(self, folder: Path, name: str) -> None:
        self._calls = (folder / f"{name}.calls").open("ab", buffering=0)
        self._troubles = (folder / f"{name}.troubles").open("a")
        self._row = np.zeros(1, CALL)

    def call(self, op: str, times: tuple[float, float, float], counts: tuple[int, int, int]) -> None:
        """One call, after it has ended. `times` and `counts`: the first and the last three columns of CALL."""
        self._row[0] = (*times, OPS.index(op), *counts)
        self._calls.write(self._row.tobytes())

    def trouble(self, what: str, detail: str) -> None:
        """What may not happen, now."""
        self._troubles.write(json.dumps({"at_s": time.monotonic(), "what": what, "detail": detail}) + "\n")
        self._troubles.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._calls.close()
        self._troubles.close()


def read_calls(path: Path) -> Calls:
    """The calls of a process; a row that SIGKILL cut off is left out."""
    data = path.read_bytes() if path.exists() else b""
    return np.frombuffer(data[: len(data) // CALL.itemsize * CALL.itemsize], CALL)


def read_troubles(path: Path) -> list[dict[str, Any]]:
    """The troubles of a process."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]
