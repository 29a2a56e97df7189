"""The client processes of a run: a lane each, which one process after another has."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from tests.faults.traffic.client import Settings

END_S = 30.0


@dataclass
class Life:
    """One process. `told`: what it printed at its end; `killed`: on purpose."""

    settings: Settings
    process: subprocess.Popen[bytes]
    stderr: IO[bytes]
    killed: bool = False
    code: int | None = None
    told: dict[str, Any] = field(default_factory=dict)
    said: str = ""

    @property
    def lane(self) -> str:
        """Whose it is."""
        return self.settings.name

    @property
    def stem(self) -> str:
        """Of its files."""
        return f"{self.settings.name}-{self.settings.life}"


class Clients:
    """Starts them, kills some, ends them all. `urls`: by lane, the URL and the population."""

    def __init__(self, urls: Mapping[str, tuple[str, str]], seed: int, folder: Path, chats: int = 8) -> None:
        self._urls, self._seed, self.folder, self._chats = dict(urls), seed, folder, chats
        self.lives: list[Life] = []
        self._now: dict[str, Life] = {}
        self._lock = threading.Lock()

    def start(self, name: str) -> None:
        """A process takes this lane."""
        url, population = self._urls[name]
        with self._lock:
            life = sum(one.lane == name for one in self.lives)
            place = list(self._urls).index(name)
            settings = Settings(url, name, life, self._seed * 100 + place, population, self._chats, str(self.folder))
            stderr = tempfile.TemporaryFile()  # noqa: SIM115
            process = subprocess.Popen(settings.words(), stdout=subprocess.PIPE, stderr=stderr)
            self._now[name] = Life(settings, process, stderr)
            self.lives.append(self._now[name])

    def pid(self, name: str) -> int:
        """Of the process that has the lane."""
        return self._now[name].process.pid

    def kill(self, name: str) -> None:
        """SIGKILL it."""
        life = self._now[name]
        life.killed = life.process.poll() is None  # else it had died of itself
        life.process.kill()
        self._end(life, END_S)

    def end(self) -> None:
        """Ask all to end, and wait; what does not end is killed, and counts as ended badly."""
        for life in self._now.values():
            if life.code is None:
                os.kill(life.process.pid, signal.SIGTERM)
        give_up_s = time.monotonic() + END_S
        for life in self._now.values():
            if life.code is None:
                self._end(life, give_up_s - time.monotonic())

    def _end(self, life: Life, wait_s: float) -> None:
        try:
            out, _ = life.process.communicate(timeout=max(0.1, wait_s))
        except subprocess.TimeoutExpired:
            life.process.kill()
            out, _ = life.process.communicate()
        life.code = life.process.returncode
        life.told = json.loads(out) if out.endswith(b"}\n") else {}
        with life.stderr as stderr:
            stderr.seek(0)
            life.said = stderr.read().decode(errors="replace")

    def __enter__(self) -> Clients:
        for name in self._urls:
            self.start(name)
        return self

    def __exit__(self, *error: object) -> None:
        for life in self.lives:
            if life.code is None:
                life.process.kill()
                self._end(life, END_S)
