"""Text in the real engine: pages come back after a restart, and without a cache everything goes on."""

from __future__ import annotations

import signal
import time
from os import kill

import pytest

from tests.engines.sglang.harness import Answer, Cache, Engine
from tests.engines.sglang.prompts import TEXTS, ids

DEADLINE_S = 1.0  # the backend's default


@pytest.mark.parametrize("name", TEXTS)
def test_a_restarted_engine_reads_its_pages(text_engine: Engine, text_cache: Cache, name: str) -> None:
    truth = text_cache.answers[name]
    assert truth.storage <= (304 if name == "same beginning" else 0)
    text_engine.flush()
    answer = text_engine.ask(TEXTS[name])
    assert answer.tokens == truth.tokens
    assert answer.storage >= 0.95 * answer.full


def test_a_prompt_that_goes_on_reads_what_there_is(text_engine: Engine, text_cache: Cache) -> None:
    text_engine.flush()
    answer = text_engine.ask(TEXTS["plain"][:200] + ids(1500, 100))
    assert answer.storage == 192


def test_a_salt_shares_nothing(text_engine: Engine, text_cache: Cache) -> None:
    text_engine.flush()
    answer = text_engine.ask(TEXTS["plain"], cache_salt="somebody")
    assert (answer.cached, answer.tokens) == (0, text_cache.answers["plain"].tokens)


def test_nothing_changes_when_the_cache_stops_and_dies(text_engine: Engine, text_cache: Cache) -> None:
    """Last here: the cache does not come back."""
    truth = text_cache.answers["plain"]
    text_engine.flush()
    plain = _timed(text_engine, truth)
    kill(text_cache.pid, signal.SIGSTOP)
    text_engine.flush()
    stopped = _timed(text_engine, truth)
    kill(text_cache.pid, signal.SIGCONT)
    text_cache.stop(signal.SIGKILL)
    time.sleep(2.5)  # the longest pause before a server that failed is asked again
    text_engine.flush()
    dead = _timed(text_engine, truth)
    assert max(stopped, dead) < plain + 2 * DEADLINE_S + 1.0, text_engine.log()[-3000:]
    lines = [line for line in text_engine.log().splitlines() if "mmcache" in line and "does not answer" in line]
    assert 1 <= len(lines) <= 2, lines


def _timed(engine: Engine, truth: Answer) -> float:
    started = time.monotonic()
    answer = engine.ask(TEXTS["plain"])
    assert answer.tokens == truth.tokens
    return time.monotonic() - started
