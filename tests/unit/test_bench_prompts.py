"""The prompts of `mmcache bench serve`: the same for the same seed, unlike for another; what comes back, does."""

from __future__ import annotations

import base64
import io
import itertools
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mmcache.bench.prompts import ASKED, Prompt, Shape, prompts
from mmcache.errors import ConfigError

CAPTIONING = Shape(
    workload="captioning", requests=14, questions=4, images=3, size=(64, 48), characters=200, seed="0"
)  # fmt: skip
CHAT = replace(CAPTIONING, workload="chat", requests=30, questions=5)
BOTH = pytest.mark.parametrize("shape", [CAPTIONING, CHAT], ids=lambda shape: str(shape.workload))


def images(messages: list[dict[str, Any]]) -> list[str]:
    parts = [part for message in messages if isinstance(message["content"], list) for part in message["content"]]
    return [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]


def sessions(found: list[Prompt]) -> dict[str, list[Prompt]]:
    out: dict[str, list[Prompt]] = {}
    for prompt in found:
        out.setdefault(prompt.name.split(",")[0], []).append(prompt)
    return out


@BOTH
def test_the_same_seed_asks_the_same(shape: Shape) -> None:
    found = prompts(shape)
    assert [vars(prompt) for prompt in prompts(shape)] == [vars(prompt) for prompt in found]
    assert len(found) == shape.requests
    assert {prompt.place for prompt in found} == set(range(shape.questions))


@BOTH
def test_another_seed_shares_nothing(shape: Shape) -> None:
    mine, other = prompts(shape), prompts(replace(shape, seed="1"))
    starts = {prompt.messages[0]["content"][:16] for prompt in mine}
    assert len(starts) == 1
    assert starts.isdisjoint(prompt.messages[0]["content"][:16] for prompt in other)
    seen = [{url for prompt in found for url in images(prompt.messages)} for found in (mine, other)]
    assert seen[0].isdisjoint(seen[1])


def test_questions_are_about_the_same_media() -> None:
    found = sessions(prompts(CAPTIONING))
    assert [len(session) for session in found.values()].count(4) == 3
    for name, session in found.items():
        assert len({tuple(images(prompt.messages)) for prompt in session}) == 1
        assert len(set(images(session[0].messages))) == 3
        said = [prompt.messages[1]["content"][-1]["text"] for prompt in session]
        assert len({text[: CAPTIONING.characters] for text in said}) == 1
        assert len(set(said)) == len(said)
        assert [prompt.place for prompt in session] == list(range(len(session)))
        assert name.split()[0] in ("images", "video")
    assert len({images(session[0].messages)[0] for session in found.values()}) == len(found)


def test_images_are_jpeg_files_of_their_size() -> None:
    from PIL import Image

    (url, *_) = images(prompts(CAPTIONING)[0].messages)
    head, data = url.split(",")
    assert head == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert (image.format, image.size) == ("JPEG", (64, 48))
        assert np.asarray(image).std() > 5


def test_a_conversation_grows_and_photos_come_back() -> None:
    found = sessions(prompts(replace(CHAT, requests=60)))
    for session in found.values():
        for before, after in itertools.pairwise(session):
            assert after.messages[: len(before.messages)] == before.messages
            assert [message["role"] for message in after.messages[len(before.messages) :]] == ["assistant", "user"]
        assert 1 <= len(images(session[-1].messages)) <= CHAT.images
    sent = [url for session in found.values() for url in images(session[-1].messages)]
    assert len(set(sent)) < len(sent)  # in other conversations
    assert any(len(images(session[-1].messages)) > 1 for session in found.values())


@BOTH
def test_without_images_contents_are_texts(shape: Shape) -> None:
    found = prompts(replace(shape, images=0))
    assert all(isinstance(message["content"], str) for prompt in found for message in prompt.messages)
    assert "image" not in json.dumps([prompt.messages for prompt in found])


@pytest.mark.parametrize("requests", [1, 3, 4, 5])
def test_any_number_of_requests_can_be_asked_for(requests: int) -> None:
    assert len(prompts(replace(CAPTIONING, requests=requests, images=0))) == requests


def test_more_questions_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match=f"choose 1 to {len(ASKED)}"):
        prompts(replace(CAPTIONING, questions=len(ASKED) + 1))
