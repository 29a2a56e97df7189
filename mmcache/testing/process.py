"""A real `mmcache serve` in a process of its own, for tests, benchmarks and demos."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from mmcache.errors import TransportError
from mmcache.testing.values import eventually


def children_of(pid: int) -> list[int]:
    """The processes that a process has started and that have not ended: man 5 proc_tid_children.

    Those of one thread in the order in which they were started, as long as none is started again. Raises OSError if
    there is no such process.
    """
    return [int(child) for children in _of_threads(pid, "children") for child in children.split()]


def suspend(pid: int) -> None:
    """SIGSTOP a process, and wait until every thread of it has stopped: the signal alone only asks for it."""
    os.kill(pid, signal.SIGSTOP)

    def all_stopped() -> bool:
        return {stat.rpartition(")")[2].split()[0] for stat in _of_threads(pid, "stat")} == {"T"}

    eventually(all_stopped, f"process {pid} stopped")


def _of_threads(pid: int, name: str) -> Iterator[str]:
    """What a file of /proc says of each thread, the first one first; one that ends meanwhile says nothing."""
    for thread in sorted(map(int, os.listdir(f"/proc/{pid}/task"))):
        with suppress(FileNotFoundError, ProcessLookupError):
            yield Path(f"/proc/{pid}/task/{thread}/{name}").read_text()


class ServerProcess:
    """Starts a server on a free loopback port and stops it on leaving; `url` reaches it. Use as a context manager.

    `shards` has what each said when it was ready; `url` and the like are the first one's. With the `command` "up" it is
    a cluster, which `cluster_url` reaches.

    Extra words go to `mmcache serve` as they are; `environment` adds MMCACHE_ settings, of which none are inherited;
    `under` comes before the command, and must become it (`ip netns exec NAME`).
    `said` is what it wrote to stderr, once it has ended. Raises TransportError with the server's own words if it does
    not become ready.
    """

    def __init__(
        self,
        memory: str = "1GiB",
        *arguments: str,
        listen: str = "127.0.0.1:0",
        ready_s: float = 60.0,
        environment: Mapping[str, str] | None = None,
        under: Sequence[str] = (),
        command: str = "serve",
    ) -> None:
        words = [
            *under,
            sys.executable,
            "-m",
            "mmcache",
            command,
            "--listen",
            listen,
            "--memory",
            memory,
            "--json",
            *arguments,
        ]
        self._command, self._ready_s = words, ready_s
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("MMCACHE_")}
        self._environment = inherited | dict(environment or {})
        self._stderr: IO[bytes] | None = None
        self.process: subprocess.Popen[str] | None = None
        self.url = self.cluster_url = self.unix_path = self.grpc_address = self.said = ""
        self.shards: list[dict[str, Any]] = []

    def start(self) -> ServerProcess:
        """Start it and wait until it accepts."""
        # A file, as a pipe nobody reads would stop a talkative server; closed when the process has ended.
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        process = subprocess.Popen(
            self._command, stdout=subprocess.PIPE, stderr=self._stderr, text=True, env=self._environment
        )
        assert process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            answered = selector.select(self._ready_s)
        line = process.stdout.readline() if answered else ""
        if not line:
            process.kill()
            self._end(process)
            raise TransportError(f"`mmcache serve` did not become ready: {self.said.strip() or 'it said nothing'}")
        ready = json.loads(line)
        self.process = process
        self.shards = ready.get("shards", [ready])
        self.cluster_url = ready.get("url", "") if "shards" in ready else ""
        first = self.shards[0]
        self.url, self.unix_path = first["url"], first["unix_path"]
        self.grpc_address = first.get("grpc_address", "")
        return self

    @property
    def pid(self) -> int:
        """The server's process id."""
        assert self.process is not None
        return self.process.pid

    def stop(self, signal_number: int = signal.SIGTERM, timeout_s: float = 15.0) -> int:
        """Send the signal, wait, and return the exit code; SIGKILL if it does not end in time."""
        process, self.process = self.process, None
        if process is None:
            return 0
        process.send_signal(signal_number)
        self._end(process, timeout_s)
        return process.returncode

    def _end(self, process: subprocess.Popen[str], timeout_s: float = 10.0) -> None:
        try:
            process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        assert self._stderr is not None
        with self._stderr as stderr:
            stderr.seek(0)
            self.said = stderr.read().decode(errors="replace")

    def __enter__(self) -> ServerProcess:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
