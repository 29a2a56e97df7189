"""The OpenAI server, its engine in a process of its own: chats with pictures and embeddings, a restart, bad input, a
dead cache; and examples/ask.py, which asks it."""

from __future__ import annotations

import base64
import io
import re
import subprocess
import sys
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engines.cache import Cache
from tests.engines.vllm.api_server import ANSWER_S, ApiServer
from tests.engines.vllm.harness import BLOCK, words
from tests.engines.vllm.images import picture
from tests.engines.vllm.models import ROOT

pytestmark = pytest.mark.full
KV_NBYTES = 2 * 2 * 2 * 32 * 4  # of one token: layers, keys and values, heads, head size, float32
EMBEDS = ("--enable-mm-embeds", "--enable-prompt-embeds")


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


def _check_reason(server: ApiServer) -> None:
    """Of a prompt that nobody knows. A busy machine learns it too late, now and then."""
    for seed in range(660, 663):
        server.chat(text(words(seed, 200)), max_tokens=64)
        if server.told["mmcache"]["missed"]["reason"] != "not known yet":
            break
    assert server.told["mmcache"]["missed"]["reason"].startswith("never stored"), server.told


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


def _ask(port: int, folder: Path) -> None:
    """The example's client, as a person would use it: twice, and where nothing listens."""
    from PIL import Image

    Image.fromarray(picture(30)).save(folder / "a.png")
    ask = [sys.executable, str(ROOT / "examples/ask.py"), f"http://127.0.0.1:{port}", words(654, 200)]
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
    with ApiServer("", *EMBEDS) as server:
        truths = {name: server.chat(*parts)[:3] for name, parts in known.items() if name != "forged"}
        truths["forged"] = server.chat(*[{k: v for k, v in part.items() if k != "uuid"} for part in FORGED])[:3]
        crowd = [server.chat(*parts)[:3] for parts in CROWD]
        refusals = [_refused(server, parts) for parts in (BROKEN, LONG)]
    with Cache() as cache:
        with ApiServer(cache.url, *EMBEDS, PYTHONHASHSEED="1") as server:
            for name in (*CHATS, "named"):
                assert server.chat(*known[name])[:3] == truths[name], name
            cache.settle()
        with ApiServer(cache.url, *EMBEDS, PYTHONHASHSEED="2") as server:
            loaded = 0
            for name, parts in CHATS.items():
                said, logprobs, length, cached = server.chat(*parts)
                assert (said, logprobs, length) == truths[name], name
                assert cached >= 0.95 * ((length - 1) // BLOCK * BLOCK), (name, server.told)
                assert server.told["mmcache"] == {"cached_tokens": cached}
                loaded += cached
            for name in (*OTHERS, "forged"):
                *answer, cached = server.chat(*known[name])
                assert (tuple(answer), cached) == (truths[name], 128), name
            _check_reason(server)
            _check_metrics(server, loaded + 128)  # of "forged"; the engine held those of "other"
            _check_openai_client(server)
            assert [_refused(server, parts) for parts in (BROKEN, LONG)] == refusals
            _ask(server.port, tmp_path)
            with ThreadPoolExecutor(len(CROWD)) as pool:
                running = [pool.submit(server.chat, *parts) for parts in CROWD]
                cache.kill()
                assert [one.result()[:3] for one in running] == crowd
            assert server.chat(*CHATS["text"])[:3] == truths["text"]
