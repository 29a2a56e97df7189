"""The OpenAI server, its engine in a process of its own: chats with pictures and embeddings, a restart, bad input, a
dead cache; and examples/vllm/ask.py, which asks it."""

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
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest

from mmcache.testing.process import ServerProcess
from tests.engines.vllm.harness import BLOCK, ENVIRONMENT, START_S, made, words
from tests.engines.vllm.images import picture
from tests.engines.vllm.models import ROOT

pytestmark = pytest.mark.full
ANSWER_S = 60.0


class ApiServer:
    """`vllm serve` with mmcache, or without (url ""). Use as a context manager."""

    def __init__(self, url: str, **environment: str) -> None:
        connector = {
            "kv_connector": "MMCacheKVConnector",
            "kv_connector_module_path": "mmcache_connectors.vllm",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"url": url},
        }
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(made("vision"))]
        self.command += ["--served-model-name", "m", "--host", "127.0.0.1", "--port", str(self.port)]
        self.command += ["--dtype", "float32", "--enforce-eager", "--block-size", str(BLOCK)]
        self.command += ["--max-model-len", "1024", "--max-num-seqs", "8", "--enable-prompt-tokens-details"]
        self.command += ["--enable-mm-embeds", "--enable-prompt-embeds"]
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


def _rows(seed: int) -> Any:
    """24 embeddings of the model's width: those of a picture of 168 x 112, or of 24 tokens."""
    return np.random.default_rng(seed).standard_normal((24, 128), np.float32)


def image_embeds(seed: int) -> dict[str, Any]:
    """With a name of its own: the one that vLLM finds for an embedding is another under another PYTHONHASHSEED."""
    file = io.BytesIO()
    np.save(file, _rows(seed))
    rows = base64.b64encode(file.getvalue()).decode()
    value = {"image_embeds": rows, "image_grid_thw": [1, 8, 12]}
    return {"type": "image_embeds", "image_embeds": value, "uuid": f"rows {seed}"}


def prompt_embeds(seed: int) -> dict[str, Any]:
    import torch

    file = io.BytesIO()
    torch.save(torch.from_numpy(_rows(seed)), file)
    return {"type": "prompt_embeds", "data": base64.b64encode(file.getvalue()).decode()}


CHATS: dict[str, list[dict[str, Any]]] = {
    "text": [text(words(600, 400))],
    "image": [text(words(601, 128)), image(1), text(words(602, 100))],
    "two images": [text(words(603, 90)), image(2), text(words(604, 60)), image(3), text(words(605, 90))],
    "image embeds": [text(words(650, 128)), image_embeds(1), text(words(651, 100))],
    "prompt embeds": [text(words(652, 128)), prompt_embeds(1), text(words(653, 100))],
}
OTHERS = {  # as one of CHATS, but for what stands between two texts
    "other": [text(words(601, 128)), image(4), text(words(602, 100))],
    "other image embeds": [text(words(650, 128)), image_embeds(2), text(words(651, 100))],
    "other prompt embeds": [text(words(652, 128)), prompt_embeds(2), text(words(653, 100))],
}
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


def _ask(port: int, folder: Path) -> None:
    """The example's client, as a person would use it: twice, and where nothing listens."""
    from PIL import Image

    Image.fromarray(picture(30)).save(folder / "a.png")
    ask = [sys.executable, str(ROOT / "examples/vllm/ask.py"), f"http://127.0.0.1:{port}", words(654, 200)]
    ask += ["--image", str(folder / "a.png"), "--max-tokens", "8"]
    for wanted in (False, True):
        done = subprocess.run(ask, capture_output=True, text=True, check=True)
        found = re.search(r"^(\d+) prompt tokens, (\d+) cached; ", done.stdout, re.MULTILINE)
        assert found, done.stdout
        assert (int(found[2]) >= 0.8 * int(found[1])) == wanted
    ask[2] = "http://127.0.0.1:1"
    done = subprocess.run(ask, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "http://127.0.0.1:1" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_server_over_http(tmp_path: Path) -> None:
    known = {**CHATS, **OTHERS, "named": NAMED, "forged": FORGED}
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
            for name, parts in CHATS.items():
                said, logprobs, length, cached = server.chat(*parts)
                assert (said, logprobs, length) == truths[name], name
                assert cached >= 0.95 * ((length - 1) // BLOCK * BLOCK), name
            for name in (*OTHERS, "forged"):
                *answer, cached = server.chat(*known[name])
                assert (tuple(answer), cached) == (truths[name], 128), name
            assert [_refused(server, parts) for parts in (BROKEN, LONG)] == refusals
            _ask(server.port, tmp_path)
            with ThreadPoolExecutor(len(CROWD)) as pool:
                running = [pool.submit(server.chat, *parts) for parts in CROWD]
                cache.stop(signal.SIGKILL)
                assert [one.result()[:3] for one in running] == crowd
            assert server.chat(*CHATS["text"])[:3] == truths["text"]
