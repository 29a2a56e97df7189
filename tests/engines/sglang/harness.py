"""Engines as tests use them: start one in a process of its own, ask it, end it; and prompts to ask about."""

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

from tests.engines import cache
from tests.engines.sglang.prompts import PAGE

HERE = Path(__file__).resolve().parent
START_S = 240.0
ANSWER_S = 60.0
DEADLINE_S = 4.0  # of the cache, on a busy machine: what it has in time is a hit
BACKEND: dict[str, Any] = {
    "backend_name": "mmcache",
    "module_path": "mmcache_connectors.sglang.hicache",
    "class_name": "MMCacheHiCacheStorage",
    "interface_v1": 1,
    "deadline_s": DEADLINE_S,
    "hicache_storage_pass_prefix_keys": True,
    "prefetch_threshold": PAGE,
}


def shim_environment() -> dict[str, str]:
    """This process's environment, and what SGLang needs to run without a GPU."""
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(HERE / "shim"), os.environ.get("PYTHONPATH")))),
        "SGLANG_USE_CPU_ENGINE": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _cores(ranks: int) -> dict[str, str]:
    """On which core each of several ranks runs, which SGLang wants to be told."""
    cores = sorted(os.sched_getaffinity(0))
    bound = "|".join(str(cores[rank % len(cores)]) for rank in range(ranks))
    return {"SGLANG_CPU_OMP_THREADS_BIND": bound} if ranks > 1 else {}


class Answer(NamedTuple):
    """What an engine made of a request: its tokens, and how many of the prompt's came from where."""

    tokens: list[int]
    prompt: int
    cached: int
    storage: int

    @classmethod
    def of(cls, made: dict[str, Any]) -> Answer:
        """From what the driver says."""
        return cls(made["tokens"], made["prompt"], made["cached"], made["details"].get("storage", 0))

    @property
    def full(self) -> int:
        """Tokens in full pages that can be reused: the last token is always computed."""
        return (self.prompt - 1) // PAGE * PAGE


class Driven:
    """A process that is told what to do a line at a time, and answers in JSON, a line each, on a pipe of its own.

    "{answers}" in its command stands for the pipe's descriptor. Its log is kept.
    """

    def __init__(self, command: list[str], environment: Mapping[str, str]) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        read, write = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", *(word.replace("{answers}", str(write)) for word in command)],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            text=True,
            pass_fds=[write],
            env=dict(environment),
            start_new_session=True,
        )
        os.close(write)
        self._answers = os.fdopen(read, "rb", buffering=0)
        self._partial = b""

    def tell(self, line: str) -> None:
        """Send it one line."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def read(self, within_s: float) -> dict[str, Any]:
        """Its next answer; AssertionError, with its log, if it ends or takes too long."""
        deadline = time.monotonic() + within_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._answers, selectors.EVENT_READ)
            while b"\n" not in self._partial:
                assert selector.select(max(deadline - time.monotonic(), 0)), f"no answer\n{self.log()}"
                piece = self._answers.read(1 << 16)
                assert piece, f"the engine ended\n{self.log()}"
                self._partial += piece
        line, _, self._partial = self._partial.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found

    def log(self) -> str:
        """Everything it has written to stdout and stderr."""
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, 0).decode(errors="replace")

    def lines(self, *words: str) -> list[str]:
        """Those lines of the log in which all of `words` stand."""
        return [line for line in self.log().splitlines() if all(word in line for word in words)]

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


class Engine(Driven):
    """An engine process. `ask` runs a request; `log` is what it has written so far."""

    def __init__(
        self,
        model: Path,
        cache: Mapping[str, Any] | None,
        environment: Mapping[str, str] | None = None,
        **arguments: Any,
    ) -> None:
        settings: dict[str, Any] = {
            "model_path": str(model),
            "device": "cpu",
            "dtype": "bfloat16",
            "attention_backend": "torch_native",
            "mem_fraction_static": 0.1,
            "max_total_tokens": 8192,
            "disable_overlap_schedule": True,
            "skip_server_warmup": True,
            "grammar_backend": "none",
            "host": "127.0.0.1",
            "page_size": PAGE,
            "enable_cache_report": True,
            "log_level": "info",
            "sleep_on_idle": True,
        }
        if model.name == "vl":
            settings |= {"mm_attention_backend": "sdpa", "enable_multimodal": True}
        if cache is not None:
            settings |= {
                "enable_hierarchical_cache": True,
                "hicache_ratio": 2,
                "hicache_storage_backend": "dynamic",
                "hicache_storage_backend_extra_config": json.dumps(BACKEND | dict(cache)),
                "hicache_storage_prefetch_policy": "wait_complete",
                "hicache_io_backend": "direct",
                "hicache_mem_layout": "page_first_direct",
            }
        super().__init__(
            [str(HERE / "driver.py"), "{answers}", json.dumps(settings | arguments)],
            shim_environment() | dict(environment or {}) | _cores(arguments.get("tp_size", 1)),
        )

    def wait_ready(self) -> Engine:
        """Wait until it answers requests; AssertionError, with its log, if it ends or takes too long."""
        assert self.read(START_S) == {"ready": True}
        return self

    def ask(self, prompt: str | list[int], images: list[Path] | None = None, **more: Any) -> Answer:
        """Run one request greedily; AssertionError if it fails or takes too long."""
        words = {"text" if isinstance(prompt, str) else "ids": prompt}
        made = self._send({**words, "images": [str(image) for image in images or []], **more})
        assert "tokens" in made, f"{made}\n{self.log()}"
        return Answer.of(made)

    def ask_many(self, prompts: list[list[int]]) -> list[Answer]:
        """Run several requests at the same time."""
        made = self._send({"many": prompts})
        assert "all" in made, f"{made}\n{self.log()}"
        return [Answer.of(one) for one in made["all"]]

    def flush(self) -> None:
        """Forget what the engine itself caches, on the device and in host memory; it must be idle."""
        deadline = time.monotonic() + 20.0
        while not self._send({"flush": True}).get("flushed"):
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.2)

    def replace_weights(self, model: Path) -> None:
        """Have it read its weights anew from `model`, while it runs."""
        self.flush()  # refused until it is idle, as the update would be
        assert self._send({"weights": str(model)}) == {"replaced": True}, self.log()

    def attach(self, cache: Mapping[str, Any]) -> dict[str, Any]:
        """Try to attach the backend while it runs, as PUT /hicache/storage-backend does."""
        self.flush()
        return self._send({"attach": json.dumps(BACKEND | dict(cache))})

    def detach(self) -> dict[str, Any]:
        """Detach the backend while it runs, as DELETE /hicache/storage-backend does."""
        self.flush()
        return self._send({"detach": True})

    def ended(self, within_s: float = START_S) -> bool:
        """Wait until it has ended by itself."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(within_s)
        return self._process.poll() is not None

    def _send(self, request: dict[str, Any]) -> dict[str, Any]:
        self.tell(json.dumps(request))
        return self.read(ANSWER_S)


class Cache(cache.Cache):
    """The cache of tests.engines.cache, and what an engine that filled it answered meanwhile."""

    quiet_s = 1.0  # SGLang writes after it has answered

    def __init__(self, memory: str = "64MiB", **settings: Any) -> None:
        super().__init__(memory, **settings)
        self.answers: dict[str, Answer] = {}
        self.many: list[Answer] = []


@contextlib.contextmanager
def running(model: Path, cache: Mapping[str, Any] | None = None, **arguments: Any) -> Iterator[Engine]:
    """An engine that is ready; killed on leaving, as a crash would end it."""
    engine = Engine(model, cache, **arguments)
    try:
        yield engine.wait_ready()
    finally:
        engine.stop()
