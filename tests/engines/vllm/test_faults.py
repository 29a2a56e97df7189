"""Whatever happens to the cache, every request ends with the right answer, and soon: a failure is a miss."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from mmcache.testing.values import eventually
from tests.engines.cache import Cache
from tests.engines.vllm import damage
from tests.engines.vllm.harness import VISION, Answer, Ask, Engine, Expected, ask, words
from tests.engines.vllm.models import IMAGE

DEADLINE_S = 4.0  # where the server is not always there
SLACK_S = 3.5  # what a busy machine adds to a request
PATIENCE_S = 30.0
GONE, BACK = "does not answer", "answers again"
MOST_CHANGES = 6  # of a server that is gone three times, and stands still a few more
SOME = [ask(words(300, 330)), ask(words(301, 100) + IMAGE + words(302, 100), 1), ask(words(303, 700))]
MANY = [ask(words(310 + i, 200 + 9 * i), *([i] if i % 3 == 0 else []), max_tokens=24) for i in range(16)]
OTHERS = [ask(words(330 + i, 400)) for i in range(6)]
PICTURE = ask(words(340, 100) + IMAGE + words(341, 60), 40, max_tokens=200)
EXPECTED = Expected.plan(VISION, *SOME, *MANY, *OTHERS, PICTURE)
Damage = Callable[[Cache], object]


@pytest.fixture(scope="module", params=["async", "sync"])
def small(request: pytest.FixtureRequest) -> Iterator[tuple[Engine, Cache]]:
    """An engine before a cache of 4 MiB, about a hundred blocks, all of which may be pinned."""
    EXPECTED.prepare()
    with Cache("4MiB", pinned_share=1.0) as cache, Engine(VISION, _settings(cache.url, request.param)) as engine:
        yield engine, cache


def _settings(url: str, load_mode: str, **more: object) -> dict[str, object]:
    return {"url": url, "load_mode": load_mode, **more}


def _right(engine: Engine, *asks: Ask, together: bool = False) -> list[int]:
    """Ask with vLLM's own cache empty; every answer must be right. How many tokens of each were not computed."""
    answers, truths = engine.fresh(*asks, together=together), EXPECTED.of(*asks)
    for answer, truth in zip(answers, truths, strict=True):
        assert answer.same(truth), (answer, truth)
    return [answer.cached for answer in answers]


def _hit(engine: Engine, *asks: Ask) -> bool:
    answers, truths = engine.fresh(*asks), EXPECTED.of(*asks)
    assert all(answer.same(truth) for answer, truth in zip(answers, truths, strict=True))
    return all(answer.hit for answer in answers)


def flip_payloads(cache: Cache) -> None:
    """A bit well inside every payload."""
    assert cache.flip(cache.digests(), 8 * 4096)


def flip_headers(cache: Cache) -> None:
    """A bit of the key in every header."""
    assert cache.flip(cache.digests(), 8 * 100)


def reshape(cache: Cache) -> None:
    """Under every key a valid frame of another shape."""
    assert damage.reshape(cache, cache.digests())


@pytest.mark.parametrize("harm", [flip_payloads, flip_headers, reshape])
def test_damaged_blocks_are_noticed_and_computed(small: tuple[Engine, Cache], harm: Damage) -> None:
    engine, cache = small
    cache.forget(cache.digests())
    _right(engine, *SOME)
    cache.settle()
    assert _hit(engine, *SOME)
    harm(cache)
    before = engine.counters()["worker"].get("verify_failures", 0)
    _right(engine, *SOME)
    assert engine.counters()["worker"]["verify_failures"] >= before + len(SOME)
    cache.settle()
    if harm is not reshape:  # damaged entries are dropped, and stored again; a valid one stays what it is
        assert _hit(engine, *SOME), "the damage was not repaired"


def test_a_picture_whose_blocks_cannot_be_loaded_is_encoded(small: tuple[Engine, Cache]) -> None:
    """vLLM does not send a worker the features of a picture that a hit covers, and this one was never encoded here."""
    engine, cache = small
    cache.forget(cache.digests())
    _right(engine, PICTURE)
    cache.settle()
    engine.reset()
    assert engine.call("step", what="reborn")
    flip_payloads(cache)
    before = engine.counters()["worker"].get("load_failures", 0)
    _right(engine, PICTURE)
    assert engine.counters()["worker"]["load_failures"] == before + 1


def test_a_picture_whose_blocks_are_gone_when_its_request_resumes_is_encoded(small: tuple[Engine, Cache]) -> None:
    engine, cache = small
    cache.forget(cache.digests())
    _right(engine, PICTURE)
    cache.settle()
    engine.reset()
    assert engine.call("step", what="reborn")
    asks, loaded = {"resumed": PICTURE}, engine.counters()["worker"]["blocks_loaded"]
    while engine.counters()["worker"]["blocks_loaded"] == loaded:
        assert not engine.call("step", what="advance", asks=asks, steps=10, aborts=[]), "it ended without a load"
        asks = {}
    cache.forget(cache.digests())
    engine.call("step", what="advance", asks={}, steps=10, aborts=[])
    assert engine.call("step", what="forget") == 1, "it did not run"
    answer = Answer(**engine.call("step", what="drain")["resumed"])
    assert answer.same(EXPECTED.of(PICTURE)[0])
    assert answer.external >= 160


def test_blocks_damaged_while_many_requests_run(small: tuple[Engine, Cache]) -> None:
    engine, cache = small
    cache.forget(cache.digests())
    _right(engine, *MANY, together=True)
    cache.settle()
    assert cache.flip(cache.digests(), 8 * 5000)
    _right(engine, *MANY, together=True)
    assert engine.counters()["worker"]["verify_failures"] > 0


def test_a_cache_too_small_for_the_work_only_forgets(small: tuple[Engine, Cache]) -> None:
    engine, cache = small
    for _ in range(2):
        _right(engine, *MANY, *SOME, *OTHERS, together=True)
    cache.settle()
    assert cache.counters()["evictions"] > 0


def test_refused_puts_are_counted_and_harm_nobody(small: tuple[Engine, Cache]) -> None:
    engine, cache = small
    cache.forget(cache.digests())
    evicted = cache.counters()["evictions"]

    def full() -> bool:
        _right(engine, *MANY)
        return cache.counters()["evictions"] > evicted

    eventually(full, "the cache is full", PATIENCE_S)
    assert cache.hold()  # now nothing can be evicted
    before = engine.counters()["worker"].get("saves_refused", 0)
    assert _right(engine, *OTHERS, together=True) == [0] * len(OTHERS)
    cache.settle()
    assert engine.counters()["worker"]["saves_refused"] > before
    cache.let_go()
    _right(engine, *OTHERS)
    cache.settle()
    assert _hit(engine, OTHERS[-1])


def _eventually_hits(engine: Engine, *asks: Ask) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not _hit(engine, *asks):
        assert time.monotonic() < deadline, f"never hit again\n{engine.log()[-4000:]}"
        time.sleep(0.2)


def _said(engine: Engine, what: str) -> int:
    """How often the log says this, of all servers. Of each it says in turn that it is gone and that it is back."""
    lines = Counter(re.findall(rf"(?m)^.*<(?:Client|Shard) (\S+)> ({GONE}|{BACK})", engine.log()))
    for server, _ in lines:
        assert lines[server, GONE] - lines[server, BACK] in (0, 1), lines
        assert lines[server, GONE] <= MOST_CHANGES, lines
    return sum(count for (_, change), count in lines.items() if change == what)


def _bounded(engine: Engine, wanted: Ask) -> None:
    """One request takes no longer than one that does not look into the cache, and the deadline."""
    engine.reset()
    (without,) = engine.generate(wanted | {"skip_reading": True})
    engine.reset()
    (answer,) = engine.generate(wanted)
    assert answer.same(EXPECTED.of(wanted)[0])
    assert answer.seconds < without.seconds + DEADLINE_S + SLACK_S


@pytest.mark.parametrize("load_mode", ["async", pytest.param("sync", marks=pytest.mark.full)])
def test_a_server_that_comes_stops_dies_and_comes_back(load_mode: str) -> None:
    """One engine through all of it; each change of a server is one line in its log."""
    EXPECTED.prepare()
    with (
        Cache("64MiB", serving=False) as cache,
        Engine(VISION, _settings(cache.url, load_mode, deadline_s=DEADLINE_S)) as engine,
    ):
        assert _right(engine, *SOME) == [0] * len(SOME), "nobody is there"
        _bounded(engine, SOME[0])
        assert bool(_said(engine, GONE)) == cache.listed
        cache.start()
        _eventually_hits(engine, *SOME)
        assert bool(_said(engine, BACK)) == cache.listed

        engine.reset()
        gone, back = _said(engine, GONE), _said(engine, BACK)
        engine.begin("generate", asks=MANY, together=True)
        time.sleep(0.15)
        cache.suspend()
        _check(engine, MANY)
        _bounded(engine, SOME[2])
        assert _right(engine, *SOME) == [0] * len(SOME)
        assert _said(engine, GONE) > gone
        cache.resume()
        _eventually_hits(engine, *SOME)
        assert _said(engine, BACK) > back

        engine.reset()
        gone, back = _said(engine, GONE), _said(engine, BACK)
        engine.begin("generate", asks=MANY, together=True)
        time.sleep(0.15)
        cache.kill()
        _check(engine, MANY)
        _bounded(engine, SOME[1])
        assert _said(engine, GONE) > gone
        cache.start()
        _eventually_hits(engine, *SOME)
        assert _said(engine, BACK) > back


def _check(engine: Engine, asks: list[Ask]) -> None:
    tokens = [answer["tokens"] for answer in engine.finish()]
    assert tokens == [truth.tokens for truth in EXPECTED.of(*asks)]
