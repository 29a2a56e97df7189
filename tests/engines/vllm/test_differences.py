"""What differs is never answered from the cache: tokens before the first difference are reused, none after it.

The first engine stored one of two prompts that differ in one thing; a restarted engine is asked the other, and must
answer what an engine without any cache answers to that other one.
"""

from __future__ import annotations

import os
import shutil
from typing import Any

import pytest

from tests.engines.cache import Cache
from tests.engines.vllm.harness import BLOCK, VISION, Ask, Engine, Expected, ask, words, written
from tests.engines.vllm.models import FOLDER, IMAGE, VIDEO

pytestmark = pytest.mark.usefixtures("unchanged")

Pair = tuple[Ask, Ask, int]
BEFORE, AFTER = words(200, 128), words(201, 120)
BOTH = words(202, 70) + IMAGE + words(203, 60) + IMAGE + words(204, 90)
SECOND = (70 + 26 + 60 + 1) // BLOCK * BLOCK  # tokens before the second of two pictures, in whole blocks
WIDE, TALL = ({"kind": "strip", "seed": 3, "tiles": 6, "upright": upright} for upright in (False, True))
LYING: dict[str, Any] = {"kind": "picture", "seed": 4, "width": 150, "height": 30}
STANDING: dict[str, Any] = {"kind": "picture", "seed": 4, "width": 30, "height": 150}
EVERY, HALF = ({"kind": "frames", "seed": 5, "every": every} for every in (1, 2))
SMALL = {"size": {"shortest_edge": 4 * 28 * 28, "longest_edge": 8 * 28 * 28}}


def picture(*pictures: int | dict[str, Any], text: str = BEFORE + IMAGE + AFTER, **more: Any) -> Ask:
    """A prompt of one picture in the middle, unless the text says otherwise."""
    return ask(text, *pictures, **more)


# What was stored, what is asked then, and how many tokens of it may, and must, come from the cache.
PAIRS: dict[str, Pair] = {
    "another image": (picture(100), picture(101), 128),
    "one pixel": (picture(102), picture({"kind": "picture", "seed": 102, "changed": True}), 128),
    "two images swapped": (picture(103, 104, text=BOTH), picture(104, 103, text=BOTH), 64),
    "another second image": (picture(105, 106, text=BOTH), picture(105, 107, text=BOTH), SECOND),
    "another max_pixels": (picture(108), picture(108, kwargs=SMALL), 128),
    "the same patches in another grid": (picture(WIDE), picture(TALL), 128),
    "width and height exchanged": (picture(LYING), picture(STANDING), 128),
    "a known uuid on another image": (
        picture(109, uuids={"image": ["forged"]}),
        picture(110, uuids={"image": ["forged"]}),
        128,
    ),
    "a video of another frame rate": (
        ask(BEFORE + VIDEO + words(205, 90), videos=[EVERY]),
        ask(BEFORE + VIDEO + words(205, 90), videos=[HALF]),
        128,
    ),
    "an adapter": (ask(words(206, 300)), ask(words(206, 300), lora=["one", 1, "adapter"]), 0),
    "no adapter": (ask(words(207, 300), lora=["one", 1, "adapter"]), ask(words(207, 300)), 0),
    "another adapter": (
        ask(words(208, 300), lora=["one", 1, "adapter"]),
        ask(words(208, 300), lora=["two", 2, "adapter-retrained"]),
        0,
    ),
    "a salt": (ask(words(209, 300)), ask(words(209, 300), salt="mine"), 0),
    "another salt": (ask(words(210, 300), salt="mine"), ask(words(210, 300), salt="yours"), 0),
    "no salt": (ask(words(211, 300), salt="mine"), ask(words(211, 300)), 0),
}
for pair in PAIRS.values():
    written(pair[0])
EXPECTED = Expected.plan(VISION, *(other for _, other, _ in PAIRS.values()))


@pytest.mark.parametrize("name", PAIRS)
def test_nothing_after_the_first_difference_is_reused(reader: Engine, store: Cache, name: str) -> None:
    _, other, shared = PAIRS[name]
    (answer,), (truth,) = reader.fresh(other), EXPECTED.of(other)
    assert answer.same(truth), (answer, truth)
    assert answer.cached == shared
    store.settle()
    assert reader.found(other, truth).hit, "what differs was not stored for itself"


RETRAINED = FOLDER.parent / "adapter-under-one-name"
OLD = ask(words(220, 300), lora=["renewed", 5, "adapter"])
NEW = ask(words(220, 300), lora=["renewed", 6, "adapter-retrained"])
SAME_NAME = Expected.plan(VISION, OLD, NEW)


def test_an_adapter_retrained_under_one_name_and_path_is_another(reader: Engine, store: Cache) -> None:
    """First the old weights, then, in the same place and under the same name, the new ones, in one engine.

    vLLM's own caches go by name and path and may mix the two up, so of the new ones nothing is stored either.
    """
    old, new = SAME_NAME.of(OLD, NEW)
    assert not old.same(new)
    numbers = iter(range(50, 60))
    for model, truth, stored in (("adapter", old, True), ("adapter-retrained", new, False)):
        shutil.rmtree(RETRAINED, ignore_errors=True)
        shutil.copytree(FOLDER / model, RETRAINED)
        number = next(numbers)
        wanted = ask(words(220, 300), lora=["renewed", number, os.fspath(RETRAINED)])
        (answer,) = reader.fresh(wanted)
        assert answer.same(truth), (model, answer, truth)
        assert answer.cached == 0
        store.settle()
        answer = reader.found(wanted, truth)
        assert answer.cached == (answer.reusable if stored else 0)
