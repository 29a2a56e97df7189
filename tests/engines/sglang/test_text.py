"""Text in the real engine: pages come back after a restart, and without a cache everything goes on."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable

import pytest

import mmcache
from mmcache.client.plan import LONGEST_PAUSE_S
from mmcache.keys import Keys
from tests.engines.cache import SHARDS, most_said
from tests.engines.sglang.harness import DEADLINE_S, Answer, Cache, Engine
from tests.engines.sglang.prompts import MANY, PAGE, TEXTS, ids
from tests.engines.sglang.stored import flip, forget, keys_of, reshape

MiB = 1 << 20


@pytest.mark.parametrize("name", TEXTS)
def test_a_restarted_engine_reads_its_pages(text_engine: Engine, text_cache: Cache, name: str) -> None:
    truth = text_cache.answers[name]
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


def test_sixteen_at_once_read_theirs(text_engine: Engine, text_cache: Cache) -> None:
    text_engine.flush()
    answers = text_engine.ask_many(MANY)
    assert [answer.tokens for answer in answers] == [truth.tokens for truth in text_cache.many]
    own = 120 // PAGE * PAGE  # each prompt's, behind what all begin with
    assert sum(answer.storage for answer in answers) >= 0.9 * len(answers) * own
    for answer in answers:  # what one has read, the others find in the engine
        assert answer.cached >= 0.95 * answer.full


@pytest.mark.parametrize("damage", [forget, flip, reshape])
def test_a_page_that_is_lost_or_damaged_ends_the_hit_and_is_stored_again(
    text_engine: Engine, text_cache: Cache, damage: Callable[[Cache, Keys], None]
) -> None:
    truth = text_cache.answers["plain"]
    keys = keys_of(text_engine, TEXTS["plain"])
    damage(text_cache, keys[10:11])
    for storage in (10 * PAGE, truth.full):
        text_engine.flush()
        answer = text_engine.ask(TEXTS["plain"])
        assert (answer.storage, answer.tokens) == (storage, truth.tokens)
        text_cache.settle()


def test_others_may_fill_the_cache_while_pages_are_read(text_engine: Engine, text_cache: Cache) -> None:
    """Pages leave between the answer that they are there and their reading: they are computed."""
    full = threading.Event()

    def fill() -> None:
        space = mmcache.Namespace(kind="embedding", model="other@1", dtype="uint8")
        with mmcache.connect(text_cache.url) as client:
            for number in itertools.count():
                client.put(mmcache.embedding_key(space, number.to_bytes(32, "big")), [bytes(MiB)])
                if full.is_set():
                    return

    filler = threading.Thread(target=fill)
    filler.start()
    try:
        for name in (*TEXTS, *TEXTS):
            text_engine.flush()
            assert text_engine.ask(TEXTS[name]).tokens == text_cache.answers[name].tokens
    finally:
        full.set()
        filler.join()
    assert text_cache.counters()["evictions"] > 0
    text_cache.settle()
    for stored in (None, text_cache.answers["plain"].full):
        text_engine.flush()
        answer = text_engine.ask(TEXTS["plain"])
        assert stored in (None, answer.storage)
        text_cache.settle()


def test_nothing_changes_when_the_cache_stops_and_dies(text_engine: Engine, text_cache: Cache) -> None:
    """Last here: the cache does not come back."""
    truth = text_cache.answers["plain"]
    text_engine.flush()
    plain = _timed(text_engine, truth)
    before = len(text_engine.log())
    text_cache.suspend()
    waits, began_s = [], time.monotonic()
    for _ in range(6):
        text_engine.flush()
        waits.append(_timed(text_engine, truth) - plain)
    stopped, took_s = plain + max(waits), time.monotonic() - began_s
    assert sorted(waits)[1] < DEADLINE_S / 2, f"it is asked by every request, and not once in a while: {waits}"
    waited = sum(wait > 0.8 * DEADLINE_S for wait in waits)
    pauses = (took_s - waited * DEADLINE_S) / LONGEST_PAUSE_S  # for so many there was time
    assert waited <= SHARDS + pauses + 0.25, f"it is asked again too soon: {waits}, {took_s} s in all"
    time.sleep(DEADLINE_S + 0.5)  # what is still written would be answered
    text_cache.kill()  # as it is: resumed first, it could still answer
    time.sleep(2.5)  # the longest pause before a server that failed is asked again
    text_engine.flush()
    dead = _timed(text_engine, truth)
    assert max(stopped, dead) < plain + 2 * DEADLINE_S + 1.0, text_engine.log()[-3000:]
    said = text_engine.log()[before:]
    assert most_said(said, "does not answer") == 1
    assert "answers again" not in said
    assert text_engine.lines("failed inside") == []


def _timed(engine: Engine, truth: Answer) -> float:
    started = time.monotonic()
    answer = engine.ask(TEXTS["plain"])
    assert answer.tokens == truth.tokens
    return time.monotonic() - started
