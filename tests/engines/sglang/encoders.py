"""Encoder servers as tests use them: start SGLang's in a process of its own, have it encode pictures, end it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import zmq

from mmcache_connectors.sglang.plugin import PREFIX
from tests.engines.cache import free_ports
from tests.engines.sglang.harness import ANSWER_S, DEADLINE_S, HERE, START_S, shim_environment

GLOBAL_CACHE = ("--enable-mm-global-cache",)
ROW_NBYTES = 64 * 2  # of one token's embedding: the model's width, bfloat16


class Encoded(NamedTuple):
    """The embeddings' bytes as they came over ZMQ, for how many items the model was run, and the names of all."""

    data: bytes
    encoded: int
    names: list[str]


class Encoder:
    """An encoder server. `settings`: of mmcache, as variables of its environment without their prefix."""

    def __init__(self, model: Path, settings: Mapping[str, str] | None, *arguments: str, pool_nbytes: int = 0) -> None:
        (self._port,) = free_ports(1)
        words = [
            *("--model-path", str(model), "--encoder-only", "--device", "cpu", "--mm-attention-backend", "sdpa"),
            *("--encoder-transfer-backend", "zmq_to_tokenizer", "--host", "127.0.0.1", "--port", str(self._port)),
            *(arguments if "--dtype" in arguments else (*arguments, "--dtype", "bfloat16")),
        ]
        told = dict(settings or {})
        if "URL" in told:
            told.setdefault("DEADLINE_S", str(DEADLINE_S))
        environment = shim_environment() | {PREFIX + name: text for name, text in told.items()}
        if pool_nbytes:
            environment |= {"ENCODER_POOL_NBYTES": str(pool_nbytes), "ENCODER_PAGE_NBYTES": str(4 * ROW_NBYTES)}
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(HERE / "encoder_driver.py"), *words],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env=environment,
            start_new_session=True,
        )

    def wait_ready(self) -> Encoder:
        """Wait until it answers requests; AssertionError, with its log, if it ends or takes too long."""
        deadline = time.monotonic() + START_S
        while True:
            assert self._process.poll() is None, f"the encoder server ended\n{self.log()}"
            with (
                contextlib.suppress(OSError, http.client.HTTPException),
                urllib.request.urlopen(self._at("health"), timeout=10) as answer,
            ):
                assert answer.status == 200
                return self
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.2)

    def encode(self, pictures: Sequence[Path], hashes: Sequence[object] | None = None) -> Encoded:
        """Have pictures encoded as one request; AssertionError if it fails or takes too long."""
        before = self.passes
        with zmq.Context() as context, context.socket(zmq.PULL) as receiver:
            request: dict[str, Any] = {
                "req_id": uuid.uuid4().hex,
                "modality": "image",
                "mm_items": [str(picture) for picture in pictures],
                "num_parts": 1,
                "part_idx": 0,
                "prefill_host": "127.0.0.1",
                "embedding_port": receiver.bind_to_random_port("tcp://127.0.0.1"),
            }
            self._post("encode", request | ({"hashes": list(hashes)} if hashes else {}))
            assert receiver.poll(ANSWER_S * 1000), self.log()
            parts = receiver.recv_multipart()
        assert len(parts) == 2, self.log()
        names = [line.split()[3:] for line in self.lines("names asked for:")]
        return Encoded(parts[1], self.passes - before, names[-1] if names else [])

    @property
    def passes(self) -> int:
        """Items the encoder's model was run for, so far."""
        return sum(int(line.split()[-2]) for line in self.lines("encoder pass over"))

    def modules(self) -> list[str]:
        """What is imported in its process of mmcache's."""
        os.kill(self._process.pid, signal.SIGUSR1)
        deadline = time.monotonic() + ANSWER_S
        while not self.lines("modules of mmcache:"):
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.1)
        found: list[str] = json.loads(self.lines("modules of mmcache:")[-1].partition(":")[2])
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
        self._log.close()

    def _at(self, path: str) -> str:
        return f"http://127.0.0.1:{self._port}/{path}"

    def _post(self, path: str, body: Mapping[str, Any]) -> None:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._at(path), json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
                answer.read()
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{error.read().decode(errors='replace')}\n{self.log()}") from None


@contextlib.contextmanager
def encoding(
    model: Path, settings: Mapping[str, str] | None, *arguments: str, pool_nbytes: int = 0
) -> Iterator[Encoder]:
    """An encoder server that is ready; killed on leaving, as a crash would end it.

    `pool_nbytes`: of its host memory, where SGLang has 4 GiB.
    """
    encoder = Encoder(model, settings, *arguments, pool_nbytes=pool_nbytes)
    try:
        yield encoder.wait_ready()
    finally:
        encoder.stop()
