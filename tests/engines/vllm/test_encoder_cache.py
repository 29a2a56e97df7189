"""The encoder cache: what one engine encoded, another does not encode again, and answers the same."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.engines.vllm.harness import Ask, Cache, Engine, Expected, Settings, ask, words
from tests.engines.vllm.models import IMAGE, VIDEO

SIGHT = Settings(
    "vision",
    {
        "enable_prefix_caching": False,  # or vLLM would not ask for the items of a prefix it knows
        "limit_mm_per_prompt": {"image": 3, "video": 1},
        "max_num_batched_tokens": 512,
    },
)
CLIP = {"kind": "frames", "seed": 1}
KNOWN = {
    "image": ask(words(600, 60) + IMAGE + words(601, 40), 1),
    "two images": ask(words(602, 60) + IMAGE + words(603, 30) + IMAGE, 2, 3),
    "one image twice": ask(IMAGE + words(604, 30) + IMAGE, 4, 4),
    "video": ask(words(605, 50) + VIDEO + words(606, 30), videos=[CLIP]),
    "image and video": ask(IMAGE + words(607, 30) + VIDEO, 5, videos=[{"kind": "frames", "seed": 2}]),
    "uuid": ask(words(608, 60) + IMAGE, 6, uuids={"image": ["a name"]}),
    "salt": ask(words(609, 60) + IMAGE, 7, salt="a tenant"),
}
HALF = ask(words(610, 40) + IMAGE + words(611, 40) + IMAGE, 1, 9)
EXPECTED = Expected.plan(SIGHT, *KNOWN.values(), HALF)


def right(engine: Engine, *asks: Ask, together: bool = False) -> int:
    """Every answer must be the plain engine's; how often the encoder ran for them."""
    answers, passes = engine.anew(*asks, together=together)
    for answer, truth in zip(answers, EXPECTED.of(*asks), strict=True):
        assert answer.same(truth), (answer, truth, engine.log()[-3000:])
    return passes


@pytest.fixture(scope="module")
def filled() -> Iterator[Cache]:
    EXPECTED.prepare()
    with Cache() as cache:
        with Engine(SIGHT, None, {"PYTHONHASHSEED": "1"}, {"url": cache.url}) as engine:
            assert right(engine, *KNOWN.values()) > 0
            cache.settle()
            print(engine.counters())
        yield cache


@pytest.fixture(scope="module")
def reader(filled: Cache) -> Iterator[Engine]:
    with Engine(SIGHT, None, {"PYTHONHASHSEED": "77"}, {"url": filled.url}) as engine:
        yield engine


@pytest.mark.parametrize("name", KNOWN)
def test_a_second_engine_encodes_nothing_it_can_find(reader: Engine, name: str) -> None:
    assert right(reader, KNOWN[name]) == 0, (reader.counters(), reader.log()[-6000:])


def test_of_two_images_only_the_unknown_one_is_encoded(reader: Engine) -> None:
    assert right(reader, HALF) == 1
