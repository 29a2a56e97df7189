"""SGLang-diffusion as tests use it: start it in a process of its own, ask it for pictures, end it."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mmcache_connectors.sglang.diffusion_plugin import PREFIX
from tests.engines.sglang.harness import START_S, shim_environment
from tests.engines.sglang_diffusion.counting import LINE

HERE = Path(__file__).resolve().parent
ANSWER_S = 120.0


class Made(NamedTuple):
    """A picture's digest, and how often a text encoder ran for it."""

    picture: str
    passes: int


class Diffusion:
    """An engine process. `settings`: of mmcache, as variables of its environment without their prefix."""

    def __init__(self, model: Path, plugins: Path, settings: Mapping[str, str] | None) -> None:
        environment = shim_environment() | {PREFIX + name: text for name, text in (settings or {}).items()}
        environment["PYTHONPATH"] += f"{os.pathsep}{plugins}"
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        read, write = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(HERE / "driver.py"), str(write), str(model)],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            text=True,
            pass_fds=[write],
            env=environment,
            start_new_session=True,
        )
        os.close(write)
        self._answers = os.fdopen(read, "rb", buffering=0)

    def wait_ready(self) -> Diffusion:
        """Wait until it takes prompts; AssertionError, with its log, if it ends or takes too long."""
        assert self._read(START_S) == {"ready": True}
        return self

    def ask(self, prompt: str) -> Made:
        """Have it make a picture; AssertionError if it fails or takes too long."""
        before = len(self.lines(LINE))
        assert self._process.stdin is not None
        print(json.dumps(prompt), file=self._process.stdin, flush=True)
        picture: str = self._read(ANSWER_S)["picture"]
        return Made(picture, len(self.lines(LINE)) - before)

    def lines(self, *words: str) -> list[str]:
        """Those lines of the log in which all of `words` stand."""
        return [line for line in self.log().splitlines() if all(word in line for word in words)]

    def log(self) -> str:
        """Everything it has written to stdout and stderr."""
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, 0).decode(errors="replace")

    def stop(self) -> None:
        """End it and everything it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._answers.close()
        self._log.close()

    def _read(self, within_s: float) -> dict[str, Any]:
        deadline = time.monotonic() + within_s
        line = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._answers, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                assert selector.select(max(deadline - time.monotonic(), 0)), f"no answer\n{self.log()}"
                piece = self._answers.read(1 << 12)
                assert piece, f"the engine ended\n{self.log()}"
                line += piece
        found: dict[str, Any] = json.loads(line)
        return found


@contextlib.contextmanager
def diffusing(model: Path, plugins: Path, settings: Mapping[str, str] | None) -> Iterator[Diffusion]:
    """An engine that is ready; killed on leaving, as a crash would end it."""
    engine = Diffusion(model, plugins, settings)
    try:
        yield engine.wait_ready()
    finally:
        engine.stop()
