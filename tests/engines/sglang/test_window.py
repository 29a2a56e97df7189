"""A model of which every second layer sees the last tokens alone: two pools, each stored by its own policy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines.sglang.harness import Cache, Engine, running
from tests.engines.sglang.models import WINDOW
from tests.engines.sglang.prompts import PAGE, TEXTS, ids
from tests.engines.sglang.stored import forget, keys_of

NAME, FULL_PAGES = "plain", len(TEXTS["plain"]) // PAGE
WINDOW_PAGES = -(-(WINDOW - 1) // PAGE)
SETTINGS = {"max_total_tokens": 4096}


@pytest.fixture(scope="module")
def filled(made: Path) -> Iterator[tuple[Engine, Cache]]:
    """An engine that was asked, and what it answered when it found nothing."""
    with Cache() as cache, running(made / "window", {"url": cache.url}, **SETTINGS) as engine:
        truth = cache.answers[NAME] = engine.ask(TEXTS[NAME])
        assert truth.cached == 0
        engine.flush()  # refused until everything is stored
        cache.settle()
        yield engine, cache


def again(engine: Engine) -> tuple[list[int], int]:
    """The answer, and how many tokens of it came out of the cache, with other work's pages on the device."""
    engine.flush()
    engine.ask(ids(1100, 700), cache_salt="other work")
    engine.flush()
    answer = engine.ask(TEXTS[NAME])
    return answer.tokens, answer.storage


def test_every_page_is_stored_and_of_the_window_the_last(filled: tuple[Engine, Cache]) -> None:
    _, cache = filled
    assert cache.counters()["entries"] == FULL_PAGES + WINDOW_PAGES


def test_both_are_read(filled: tuple[Engine, Cache]) -> None:
    engine, cache = filled
    truth = cache.answers[NAME]
    assert again(engine) == (truth.tokens, truth.full)


@pytest.mark.parametrize("page", [FULL_PAGES - WINDOW_PAGES, FULL_PAGES - 1])
def test_without_a_whole_window_nothing_can_go_on(filled: tuple[Engine, Cache], page: int) -> None:
    """And what is missing is stored again."""
    engine, cache = filled
    truth = cache.answers[NAME]
    cache.settle()
    forget(cache, keys_of(engine, TEXTS[NAME], "swa")[page : page + 1])
    assert again(engine) == (truth.tokens, 0)
    cache.settle()
    assert again(engine) == (truth.tokens, truth.full)


@pytest.mark.full
def test_a_restarted_engine_reads_both(made: Path, filled: tuple[Engine, Cache]) -> None:
    """Last here: two engines at once would be too much, so the first has to go."""
    engine, cache = filled
    truth = cache.answers[NAME]
    engine.stop()
    with running(made / "window", {"url": cache.url}, **SETTINGS) as second:
        assert again(second) == (truth.tokens, truth.full)
