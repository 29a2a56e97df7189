"""SGLang's encoder beside the vLLM suite's engines. The suite runs in vLLM's environment; SGLang has its own.

SGLANG_PYTHON names that one's interpreter; `.engines/sglang/bin/python` unless it is set.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from tests.engines.cross.kept import Kept, read
from tests.engines.vllm.models import ROOT

PYTHON = Path(os.environ.get("SGLANG_PYTHON", ROOT / ".engines" / "sglang" / "bin" / "python")).absolute()
SHIM = ROOT / "tests" / "engines" / "sglang" / "shim"
START_S = 300.0
ANSWER_S = 180.0
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join(str(ROOT / place) for place in (SHIM, "", "connectors", "kernels")),
    "SGLANG_USE_CPU_ENGINE": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class SGLangEncoder:
    """One encoder process. Use as a context manager; leaving it ends the process."""

    def __init__(
        self, model: Path, dtype: str, *more: str, environment: Mapping[str, str] | None = None, python: Path = PYTHON
    ) -> None:
        """`more`: further arguments of the encoder server."""
        self._arguments = [
            *("--model-path", str(model), "--dtype", dtype, "--encoder-only", "--device", "cpu"),
            *("--encoder-transfer-backend", "zmq_to_tokenizer", "--host", "127.0.0.1"),
            *("--mm-attention-backend", "sdpa", "--attention-backend", "torch_native", *more),
        ]
        self._environment = {**os.environ, **ENVIRONMENT, **(environment or {})}
        self._python = python

    def __enter__(self) -> Self:
        self._log = tempfile.TemporaryFile()
        read_fd, write_fd = os.pipe()
        self._process = subprocess.Popen(
            [
                *(str(self._python), "-W", "ignore", "-m", "tests.engines.cross.sglang_driver"),
                *(str(write_fd), json.dumps(self._arguments)),
            ],
            cwd=ROOT,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            text=True,
            pass_fds=[write_fd],
        )
        os.close(write_fd)
        self._answers = os.fdopen(read_fd)
        try:
            assert self._answer(START_S) == "ready"
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._answers.close()
        self._log.close()

    def encode(self, pictures: Sequence[Path]) -> tuple[dict[str, Kept], int]:
        """(by the pictures' names, what the tower was given and what came out; how often it ran)."""
        with tempfile.NamedTemporaryFile(suffix=".npz") as out:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps({"pictures": list(map(str, pictures)), "out": out.name}) + "\n")
            self._process.stdin.flush()
            passes = self._answer(ANSWER_S)
            return by_name(read(out.name)), passes

    def log(self) -> str:
        """Everything it said so far."""
        log = self._log.fileno()
        return os.pread(log, os.fstat(log).st_size, 0).decode(errors="replace")

    def _answer(self, timeout_s: float) -> Any:
        with selectors.DefaultSelector() as selector:
            selector.register(self._answers, selectors.EVENT_READ)
            line = self._answers.readline() if selector.select(timeout_s) else ""
        assert line, f"no answer within {timeout_s:.0f} s, or the process ended\n{self.log()[-8000:]}"
        return json.loads(line)


def vllm_encode(engine: Any, pictures: Sequence[Path]) -> tuple[dict[str, Kept], int]:
    """The same of an Engine that runs `tests.engines.cross.vllm_driver`."""
    with tempfile.NamedTemporaryFile(suffix=".npz") as out:
        passes = engine.call("encode", pictures=list(map(str, pictures)), out=out.name)
        return by_name(read(out.name)), passes


def by_name(kept: Mapping[str, Kept]) -> dict[str, Kept]:
    """By the file's name instead of its path."""
    return {Path(path).stem: one for path, one in kept.items()}
