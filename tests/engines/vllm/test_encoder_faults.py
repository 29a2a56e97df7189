"""The encoder cache when things go wrong, and beside the KV connector: right answers, soon, whatever happens."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.engines.cache import Cache
from tests.engines.vllm.encoder import SIGHT, Encoding, sharing
from tests.engines.vllm.harness import Expected, Settings, ask, words
from tests.engines.vllm.models import IMAGE, VIDEO

pytestmark = pytest.mark.full
DEADLINE_S = 4.0
SLACK_S = 3.5  # what a busy machine adds to a request
PATIENCE_S = 30.0
CLIP = {"kind": "frames", "seed": 33}
FEW = [ask(words(700, 40) + IMAGE, 31), ask(IMAGE + words(701, 40) + VIDEO, 32, videos=[CLIP])]
MANY = [ask(words(710 + i, 30) + IMAGE + words(730 + i, 10 * i), 40 + i % 6, max_tokens=16) for i in range(16)]
OTHER_TEXT = [one | {"text": words(750 + i, 40) + one["text"]} for i, one in enumerate(FEW)]
EXPECTED = Expected.plan(SIGHT, *FEW, *MANY, *OTHER_TEXT)
PAIR = Settings("vision", SIGHT.llm | {"tensor_parallel_size": 2})
Expected.plan(PAIR, *FEW)


def _large(seed: int) -> dict[str, Any]:
    """A picture of 64 embeddings."""
    return {"kind": "picture", "seed": seed, "width": 224, "height": 224}


def _soon(engine: Encoding) -> None:
    """A request takes no longer than one without media that can be known, and the deadline."""
    (answer,), _ = engine.answers(FEW[0])
    assert answer.same(EXPECTED.of(FEW[0])[0])
    assert answer.seconds < DEADLINE_S + SLACK_S


def _until_known(engine: Encoding) -> None:
    until = time.monotonic() + PATIENCE_S
    while engine.right(*FEW):
        assert time.monotonic() < until, engine.engine.log()[-4000:]
        time.sleep(0.2)


def test_a_server_that_comes_stops_dies_and_comes_back() -> None:
    EXPECTED.prepare()
    with (
        Cache("64MiB", serving=False) as cache,
        Encoding(SIGHT, sharing(SIGHT, cache.url, load_buffer_mib=1, deadline_s=DEADLINE_S)) as engine,
    ):
        assert engine.right(*FEW) == 3, "nobody is there"
        _soon(engine)
        cache.start()
        _until_known(engine)
        for end, again in ((cache.suspend, cache.resume), (cache.kill, cache.start)):
            engine.engine.begin("generate", asks=MANY, together=True)
            time.sleep(0.15)
            end()
            tokens = [answer["tokens"] for answer in engine.engine.finish()]
            assert tokens == [truth.tokens for truth in EXPECTED.of(*MANY)]
            _soon(engine)
            engine.right(*MANY, *FEW, together=True)
            again()
            _until_known(engine)


def test_a_cache_too_small_for_the_work_only_forgets() -> None:
    EXPECTED.prepare()
    with Cache("1MiB", pinned_share=1.0) as cache:
        shared = sharing(SIGHT, cache.url, load_buffer_mib=1, save_buffer_mib=1)
        with Encoding(SIGHT, shared) as engine:
            for seed in range(1000, 1090, 3):  # 3 MiB in all
                engine.engine.generate(ask(3 * IMAGE, *map(_large, range(seed, seed + 3))))
            engine.right(*MANY, *FEW, together=True)
            cache.settle()
            assert cache.counters()["evictions"] > 0
            assert engine.right(*FEW) <= 3


def test_both_connectors_share_one_engine() -> None:
    """Where blocks cover an item nobody asks for its embedding; under another text only the embedding is known."""
    EXPECTED.prepare()
    with Cache() as cache:
        shared = sharing(SIGHT, cache.url, llm={"enable_prefix_caching": True})
        with Encoding(SIGHT, shared, kv={"url": cache.url}) as engine:
            assert engine.right(*FEW) == 3
            cache.settle()
        with Encoding(SIGHT, shared, kv={"url": cache.url}) as engine:
            assert engine.right(*OTHER_TEXT) == 0
            assert engine.counters()["items_hit"] == 3
            cache.settle()
            answers, passes = engine.answers(*OTHER_TEXT)
            assert passes == 0
            assert all(answer.cached >= 32 for answer in answers)
            assert engine.engine.counters()["worker"]["blocks_loaded"] > 0


def test_an_engine_whose_workers_may_be_elsewhere_only_stores() -> None:
    """An executor this connector does not know: what it promised would be missing in the step, and vLLM would end."""
    EXPECTED.prepare()
    unknown = {"distributed_executor_backend": "vllm.v1.executor.uniproc_executor.UniProcExecutor"}
    with Cache() as cache, Encoding(SIGHT, sharing(SIGHT, cache.url, llm=unknown)) as engine:
        for _ in range(2):
            assert engine.right(*FEW) == 3
            cache.settle()
        assert cache.counters()["stored"] == 3
        assert "none is loaded" in engine.engine.log()


def test_two_tensor_parallel_workers_load_what_one_stored() -> None:
    Expected.plan(PAIR).prepare()
    with Cache() as cache:
        for hits in (0, 3):
            with Encoding(PAIR, sharing(PAIR, cache.url)) as engine:
                engine.right(*FEW)
                cache.settle()
                assert engine.counters().get("items_hit", 0) == hits, engine.counters()
        assert cache.counters()["stored"] == 3
