"""`vllm serve` in a process of its own, over HTTP."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from typing import Any, Self

from tests.engines.cache import free_ports
from tests.engines.vllm.harness import BLOCK, DEADLINE_S, ENVIRONMENT, START_S, made
from tests.engines.vllm.models import ROOT

ANSWER_S = 60.0


class ApiServer:
    """The OpenAI server of a model of `models.MODELS`, with mmcache, or plain (url ""). Use as a context manager.

    `flags` come last, so they win over what is set here; `environment` adds variables.
    """

    def __init__(self, url: str, *flags: str, model: str = "vision", **environment: str) -> None:
        connector = {
            "kv_connector": "MMCacheKVConnector",
            "kv_connector_module_path": "mmcache_connectors.vllm",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"url": url, "deadline_s": DEADLINE_S},
        }
        (self.port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(made(model))]
        self.command += ["--served-model-name", "m", "--host", "127.0.0.1", "--port", str(self.port)]
        self.command += ["--dtype", "float32", "--enforce-eager", "--block-size", str(BLOCK)]
        self.command += ["--max-model-len", "1024", "--max-num-seqs", "8", "--enable-prompt-tokens-details"]
        self.command += ["--kv-transfer-config", json.dumps(connector)] if url else ["--no-enable-prefix-caching"]
        self.command += flags
        self.environment = os.environ | ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"} | environment

    def __enter__(self) -> Self:
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            self.command, cwd=ROOT, env=self.environment, stdout=self.log, stderr=self.log, start_new_session=True
        )
        deadline = time.monotonic() + START_S
        while not self._healthy():
            if self.process.poll() is not None or time.monotonic() > deadline:
                said = os.pread(self.log.fileno(), 1 << 20, 0)[-8000:].decode(errors="replace")
                self.__exit__()
                raise AssertionError(f"the server did not become ready\n{said}")
            time.sleep(0.5)
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)  # its own session: the engine's processes, and no others
            self.process.wait()
        self.log.close()

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def metrics(self) -> dict[str, float]:
        """The connector's on /metrics, by name and labels, without the model's and the engine's."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=ANSWER_S) as answer:
            lines = answer.read().decode().splitlines()
        pairs = [line.rsplit(" ", 1) for line in lines if line.startswith("vllm:mmcache_")]
        return {re.sub(r'(engine|model_name)="[^"]*",?', "", name): float(value) for name, value in pairs}

    def chat(self, *parts: dict[str, Any], **more: Any) -> tuple[str, list[float], int, int]:
        """The answer's text, its logprobs, the prompt's tokens, and how many of them were cached. `told` is what the
        connector said of it."""
        body = {
            "model": "m",
            "messages": [{"role": "user", "content": parts}],
            "temperature": 0,
            "max_tokens": 8,
            "ignore_eos": True,
            "logprobs": True,
            **more,
        }
        request = urllib.request.Request(
            f"{self.url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=ANSWER_S) as response:
            answer = json.load(response)
        self.told = answer["kv_transfer_params"]
        (choice,), usage = answer["choices"], answer["usage"]
        logprobs = [round(one["logprob"], 2) for one in choice["logprobs"]["content"]]
        cached = (usage["prompt_tokens_details"] or {}).get("cached_tokens", 0)
        return choice["message"]["content"], logprobs, usage["prompt_tokens"], cached
