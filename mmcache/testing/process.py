"""A real `mmcache serve` in a process of its own, for tests, benchmarks and demos."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from types import TracebackType

from mmcache.errors import TransportError


class ServerProcess:
    """Starts a server on a free loopback port and stops it on leaving; `url` reaches it. Use as a context manager.

    Extra words go to `mmcache serve` as they are; `environment` adds MMCACHE_ settings, of which none are inherited.
    `said` is what it wrote to stderr, once it has ended. Raises TransportError with the server's own words if it does
    not become ready.
    """

    def __init__(
        self,
        memory: str = "1GiB",
        *arguments: str,
        listen: str = "127.0.0.1:0",
        ready_s: float = 30.0,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        command = [
            sys.executable,
            "-m",
            "mmcache",
            "serve",
            "--listen",
            listen,
            "--memory",
            memory,
            "--json",
            *arguments,
        ]
        self._command, self._ready_s = command, ready_s
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("MMCACHE_")}
        self._environment = inherited | dict(environment or {})
        self.process: subprocess.Popen[str] | None = None
        self.url = self.unix_path = self.said = ""

    def start(self) -> ServerProcess:
        """Start it and wait until it accepts."""
        process = subprocess.Popen(
            self._command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=self._environment
        )
        assert process.stdout is not None
        assert process.stderr is not None
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            answered = selector.select(self._ready_s)
        line = process.stdout.readline() if answered else ""
        if not line:
            process.kill()
            said = process.communicate()[1].strip()
            raise TransportError(f"`mmcache serve` did not become ready: {said or 'it said nothing'}")
        ready = json.loads(line)
        self.process = process
        self.url, self.unix_path = ready["url"], ready["unix_path"]
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
        try:
            _, self.said = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            _, self.said = process.communicate()
        return process.returncode

    def rss_nbytes(self) -> int:
        """The server's resident memory."""
        with open(f"/proc/{self.pid}/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def wait_exit(self, timeout_s: float = 10.0) -> int:
        """Wait for it to end by itself."""
        deadline = time.monotonic() + timeout_s
        while self.process is not None and self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.stop() if self.process is not None and self.process.poll() is None else self._reap()

    def _reap(self) -> int:
        process, self.process = self.process, None
        if process is None:
            return 0
        _, self.said = process.communicate()
        return process.returncode

    def __enter__(self) -> ServerProcess:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
