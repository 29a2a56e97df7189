"""The OpenAI server, its engine in a process of its own: chats with pictures, a restart, bad input, a dead cache."""

from __future__ import annotations

import base64
import io
import signal
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from mmcache.testing.process import ServerProcess
from tests.engines.vllm.api_server import ApiServer
from tests.engines.vllm.harness import BLOCK, words
from tests.engines.vllm.images import picture

pytestmark = pytest.mark.full


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
            for name, parts in CHATS.items():
                said, logprobs, length, cached = server.chat(*parts)
                assert (said, logprobs, length) == truths[name], name
                assert cached >= 0.95 * ((length - 1) // BLOCK * BLOCK), name
            for name in ("other", "forged"):
                *answer, cached = server.chat(*known[name])
                assert (tuple(answer), cached) == (truths[name], 128), name
            assert [_refused(server, parts) for parts in (BROKEN, LONG)] == refusals
            with ThreadPoolExecutor(len(CROWD)) as pool:
                running = [pool.submit(server.chat, *parts) for parts in CROWD]
                cache.stop(signal.SIGKILL)
                assert [one.result()[:3] for one in running] == crowd
            assert server.chat(*CHATS["text"])[:3] == truths["text"]
