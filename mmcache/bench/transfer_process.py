"""The processes of `mmcache bench transfer`: clients that obey orders, and what CPU time a process has used."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from mmcache.errors import TransportError

WAIT_S = 10.0


class Worker:
    """A measuring process. Ask, then take the answer: several asked before any answers work at the same time."""

    def __init__(self) -> None:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  # closed in `end`
        words = [sys.executable, "-m", "mmcache.bench.transfer_worker"]
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, text=True
        )

    def ask(self, **order: Any) -> None:
        """Send one order. Raises TransportError if the process has ended."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        except OSError:
            self._raise()

    def answer(self) -> dict[str, Any]:
        """Wait for its answer. Raises TransportError, with its own last words, if there is none."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._raise()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def do(self, **order: Any) -> dict[str, Any]:
        """Ask, and wait for the answer."""
        self.ask(**order)
        return self.answer()

    def _raise(self) -> None:
        self._process.wait(WAIT_S)
        self._stderr.seek(0)
        said = self._stderr.read().decode(errors="replace").strip().splitlines()
        raise TransportError(f"a measuring process ended: {said[-1] if said else 'it said nothing'}")

    def end(self) -> None:
        """Close its stdin, on which it ends; kill it if it does not."""
        try:
            self._process.communicate(timeout=WAIT_S)
        except (subprocess.TimeoutExpired, OSError):
            self._process.kill()
            self._process.communicate()
        self._stderr.close()


@contextmanager
def workers_of(clients: int) -> Iterator[list[Worker]]:
    """So many processes, ended on leaving."""
    with ExitStack() as stack:
        workers = []
        for _ in range(clients):
            workers.append(Worker())
            stack.callback(workers[-1].end)
        yield workers


def all_do(workers: Sequence[Worker], **order: Any) -> list[dict[str, Any]]:
    """Give all the same order, and wait for all."""
    for worker in workers:
        worker.ask(**order)
    return [worker.answer() for worker in workers]


def cpu_ns(pid: int) -> int:
    """CPU time, user and system, that all threads of a process have used, those that have ended too, in nanoseconds.

    Raises OSError if there is no such process. The clock of another process: man 3 clock_getcpuclockid, whose number
    Linux makes from the process id (include/linux/posix-timers_types.h, CPUCLOCK_SCHED).
    """
    return time.clock_gettime_ns((~pid << 3) | 2)
