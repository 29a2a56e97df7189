"""The OpenAI server, its engine in a process of its own: chats with pictures, a restart, bad input, a dead cache."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import pytest

from mmcache.testing.process import ServerProcess
from tests.engines.vllm.harness import BLOCK, ENVIRONMENT, START_S, made, words
from tests.engines.vllm.images import picture
from tests.engines.vllm.models import ROOT

pytestmark = pytest.mark.full
ANSWER_S = 60.0
KV_NBYTES = 2 * 2 * 2 * 32 * 4  # of one token: layers, keys and values, heads, head size, float32


class ApiServer:
    """`vllm serve` with mmcache, or without (url ""). Use as a context manager."""

    def __init__(self, url: str, **environment: str) -> None:
        connector = {
            "kv_connector": "MMCacheKVConnector",
            "kv_connector_module_path": "mmcache_connectors.vllm",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"url": url, "deadline_s": 4.0},  # a busy machine's
        }
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(made("vision"))]
        self.command += ["--served-model-name", "m", "--host", "127.0.0.1", "--port", str(self.port)]
        self.command += ["--dtype", "float32", "--enforce-eager", "--block-size", str(BLOCK)]
        self.command += ["--max-model-len", "1024", "--max-num-seqs", "8", "--enable-prompt-tokens-details"]
        flag = ["--kv-transfer-config", json.dumps(connector)] if url else ["--no-enable-prefix-caching"]
        self.command += flag
        self.environment = os.environ | ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"} | environment

    def __enter__(self) -> Self:
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            self.command, cwd=ROOT, env=self.environment, stdout=self.log, stderr=self.log, start_new_session=True
        )
        deadline = time.monotonic() + START_S
        while not self._healthy():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                pytest.fail("the server did not become ready")
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
        """The answer's text, its logprobs, the prompt's tokens, and how many of them were cached."""
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
            f"http://127.0.0.1:{self.port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=ANSWER_S) as response:
            answer = json.load(response)
        self.told = answer["kv_transfer_params"]
        (choice,), usage = answer["choices"], answer["usage"]
        logprobs = [round(one["logprob"], 2) for one in choice["logprobs"]["content"]]
        cached = (usage["prompt_tokens_details"] or {}).get("cached_tokens", 0)
        return choice["message"]["content"], logprobs, usage["prompt_tokens"], cached


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


def image(seed: int, **more: Any) -> dict[str, Any]:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture(seed)).save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}, **more}


CHATS: dict[str, list[dict[str, Any]]] = {
    "text": [text(words(600, 400))],
    "image": [text(words(601, 128)), image(1), text(words(602, 100))],
    "two images": [text(words(603, 90)), image(2), text(words(604, 60)), image(3), text(words(605, 90))],
}
OTHER = [text(words(601, 128)), image(4), text(words(602, 100))]
NAMED = [text(words(606, 128)), image(5, uuid="a name"), text(words(607, 100))]
FORGED = [text(words(606, 128)), image(6, uuid="a name"), text(words(607, 100))]
BROKEN = [text("what is this?"), {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}]
LONG = [text(words(608, 2000))]
CROWD = [[text(words(610 + i, 300)), image(10 + i), text(words(630 + i, 60))] for i in range(8)]


def _refused(server: ApiServer, parts: list[dict[str, Any]]) -> int:
    with pytest.raises(urllib.error.HTTPError) as caught:
        server.chat(*parts)
    with caught.value:
        return caught.value.code


def _check_metrics(server: ApiServer, loaded: int) -> None:
    """All that is documented is there; what this run shows is right. `loaded`: tokens."""
    shown = server.metrics()
    rows = re.findall(r"^\| `(vllm:mmcache_\w+)` \|([^|]*)\|", (ROOT / "docs" / "vllm.md").read_text(), re.MULTILINE)
    documented = {name: set(re.findall(r"`(\w+)`", labels)) for name, labels in rows}
    found = {name: set(re.findall(r'(\w+)="', labels)) for name, labels in map(_parts, shown)}
    totals = {name.removesuffix("_sum"): labels for name, labels in found.items() if name.endswith(("_total", "_sum"))}
    assert totals == documented
    assert shown['vllm:mmcache_hit_tokens_total{transport="shared_memory"}'] == loaded
    assert shown['vllm:mmcache_bytes_total{direction="load",transport="shared_memory"}'] == loaded * KV_NBYTES
    assert shown["vllm:mmcache_load_seconds_count{}"] == len(CHATS) + 1
    for name in ("load_failures", "verify_failures", "lookup_timeouts", "audit_differences"):
        assert shown[f"vllm:mmcache_{name}_total{{}}"] == 0


def _parts(series: str) -> tuple[str, str]:
    name, _, labels = series.partition("{")
    return name, labels


def _check_openai_client(server: ApiServer) -> None:
    """The usual client reads such responses, streamed or not."""
    from openai import OpenAI

    client = OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", timeout=ANSWER_S)
    said: dict[str, Any] = {
        "model": "m", "messages": [{"role": "user", "content": CHATS["text"]}], "temperature": 0, "max_tokens": 4,
    }  # fmt: skip
    whole = client.chat.completions.create(**said)
    assert (whole.model_extra or {})["kv_transfer_params"] == {"mmcache": {"cached_tokens": 0}}  # the engine held it
    pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**said, stream=True)]
    assert "".join(pieces) == whole.choices[0].message.content


def test_the_server_over_http() -> None:
    known = {**CHATS, "other": OTHER, "named": NAMED, "forged": FORGED}
    with ApiServer("") as server:
        truths = {name: server.chat(*parts)[:3] for name, parts in known.items() if name != "forged"}
        truths["forged"] = server.chat(*[{k: v for k, v in part.items() if k != "uuid"} for part in FORGED])[:3]
        crowd = [server.chat(*parts)[:3] for parts in CROWD]
        refusals = [_refused(server, parts) for parts in (BROKEN, LONG)]
    with ServerProcess("256MiB") as cache:
        with ApiServer(cache.url, PYTHONHASHSEED="1") as server:
            for name in (*CHATS, "named"):
                assert server.chat(*known[name])[:3] == truths[name], name
            time.sleep(1.0)  # what is left of its blocks is stored
        with ApiServer(cache.url, PYTHONHASHSEED="2") as server:
            loaded = 0
            for name, parts in CHATS.items():
                said, logprobs, length, cached = server.chat(*parts)
                assert (said, logprobs, length) == truths[name], name
                assert cached >= 0.95 * ((length - 1) // BLOCK * BLOCK), (name, server.told)
                assert server.told["mmcache"] == {"cached_tokens": cached}
                loaded += cached
            for name in ("other", "forged"):
                *answer, cached = server.chat(*known[name])
                assert (tuple(answer), cached) == (truths[name], 128), name
            assert server.told["mmcache"]["missed"]["reason"].startswith("never stored")
            _check_metrics(server, loaded + 128)  # of "forged"; the engine held those of "other"
            _check_openai_client(server)
            assert [_refused(server, parts) for parts in (BROKEN, LONG)] == refusals
            with ThreadPoolExecutor(len(CROWD)) as pool:
                running = [pool.submit(server.chat, *parts) for parts in CROWD]
                cache.stop(signal.SIGKILL)
                assert [one.result()[:3] for one in running] == crowd
            assert server.chat(*CHATS["text"])[:3] == truths["text"]
