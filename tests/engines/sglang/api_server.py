"""`python -m sglang.launch_server` in a process of its own, over HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Self

from tests.engines.cache import free_ports
from tests.engines.sglang.harness import BACKEND, HERE, START_S, shim_environment
from tests.engines.sglang.prompts import PAGE


class ApiServer:
    """The OpenAI server of a model with mmcache, or plain and without a prefix cache (url ""). A context manager.

    `flags` come last, so they win over what is set here.
    """

    def __init__(self, model: Path, url: str, *flags: str) -> None:
        (port,) = free_ports(1)
        self.address = f"http://127.0.0.1:{port}"
        self.url = f"{self.address}/v1"
        self.command = [sys.executable, "-W", "ignore", str(HERE / "launch.py"), "--model-path", str(model)]
        self.command += ["--served-model-name", "m", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
        self.command += ["--dtype", "bfloat16", "--attention-backend", "torch_native", "--mm-attention-backend", "sdpa"]
        self.command += ["--enable-multimodal", "--mem-fraction-static", "0.1", "--max-total-tokens", "16384"]
        self.command += ["--page-size", str(PAGE), "--disable-overlap-schedule", "--skip-server-warmup"]
        self.command += ["--grammar-backend", "none", "--sleep-on-idle"]
        if url:
            self.command += ["--enable-hierarchical-cache", "--hicache-ratio", "2", "--hicache-io-backend", "direct"]
            self.command += ["--hicache-mem-layout", "page_first_direct", "--hicache-storage-backend", "dynamic"]
            self.command += ["--hicache-storage-backend-extra-config", json.dumps(BACKEND | {"url": url})]
            self.command += ["--hicache-storage-prefetch-policy", "wait_complete"]
        else:
            self.command += ["--disable-radix-cache"]
        self.command += flags

    def __enter__(self) -> Self:
        self._log = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            self.command, env=shim_environment(), stdout=self._log, stderr=self._log, start_new_session=True
        )
        deadline = time.monotonic() + START_S
        while not self._healthy():
            if self._process.poll() is not None or time.monotonic() > deadline:
                said = self.log()[-8000:]
                self.__exit__()
                raise AssertionError(f"the server did not become ready\n{said}")
            time.sleep(0.25)
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # its own session: the engine's processes, and no others
        self._process.wait()
        self._log.close()

    def log(self) -> str:
        """Everything it has written to stdout and stderr."""
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, 0).decode(errors="replace")

    def flush(self) -> None:
        """Forget what the engine itself caches, on the device and in host memory; it must be idle."""
        deadline = time.monotonic() + 20.0
        while not self._answers("/flush_cache", b""):
            assert time.monotonic() < deadline, self.log()[-8000:]
            time.sleep(0.2)

    def _healthy(self) -> bool:
        return self._answers("/health")

    def _answers(self, path: str, body: bytes | None = None) -> bool:
        try:
            with urllib.request.urlopen(self.address + path, body, timeout=10) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False
