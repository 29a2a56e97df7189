"""Other models and settings than the shared engines have: a true restart each, and what must keep two engines apart."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.engines.cache import Cache
from tests.engines.vllm.harness import BLOCK, VISION, Answer, Ask, Engine, Expected, Settings, ask, made, words
from tests.engines.vllm.models import FOLDER
from tests.engines.vllm.sizes import kv_frames_said

HYBRID = Settings("hybrid", {"max_num_batched_tokens": 512})
TEXT = Settings("text")
WIDE = Settings("text", {"block_size": 64})
HALVES = Settings("text", {"dtype": "bfloat16"})
PAIR = Settings("text", {"tensor_parallel_size": 2})
EMBEDS = Settings("text", {"enable_prompt_embeds": True})
CRAMPED = Settings("text", {"num_gpu_blocks_override": 40, "disable_log_stats": False})

LONG = [ask(words(400, 300)), ask(words(401, 900)), ask(words(402, 700), max_tokens=60), ask(words(403, 40))]
LONGER = [ask(words(400, 300) + words(404, 200)), ask(words(401, 640) + words(405, 200))]
ROWS = [ask(embeds=[1, 300]), ask(embeds=[2, 200])]
MORE_ROWS = [ask(embeds=[1, 420])]
GREEDY = [ask(words(410 + i, 150), max_tokens=120) for i in range(8)]

full = pytest.mark.full
RESTARTS = [
    pytest.param(HYBRID, LONG, "async", id="hybrid"),
    pytest.param(HYBRID, LONG, "sync", id="hybrid, sync", marks=full),
    pytest.param(TEXT, LONG, "async", id="text", marks=full),
    pytest.param(TEXT, LONG, "sync", id="text, sync", marks=full),
    pytest.param(HALVES, LONG, "async", id="bfloat16", marks=full),
    pytest.param(PAIR, LONG, "async", id="tensor parallel", marks=full),
    pytest.param(EMBEDS, ROWS, "async", id="prompt embeds", marks=full),
]
FURTHER = {id(LONG): (LONGER, [288, 640]), id(ROWS): (MORE_ROWS, [288])}  # begin as what was seen, in so many tokens
for case in RESTARTS:
    settings, first_asks, _ = case.values
    Expected.plan(settings, *first_asks, *FURTHER[id(first_asks)][0])  # type: ignore[arg-type,misc]


def _same(answers: list[Answer], settings: Settings, *asks: Ask) -> list[Answer]:
    for answer, truth in zip(answers, Expected.plan(settings, *asks).of(*asks), strict=True):
        assert answer.same(truth), (answer, truth)
    return answers


def _engine(settings: Settings, cache: Cache, load_mode: str = "async", **environment: str) -> Engine:
    return Engine(settings, {"url": cache.url, "load_mode": load_mode}, environment)


@pytest.mark.parametrize(("settings", "asks", "load_mode"), RESTARTS)
def test_a_restarted_engine_computes_nothing_again(settings: Settings, asks: list[Ask], load_mode: str) -> None:
    Expected.plan(settings).prepare()
    further, shared = FURTHER[id(asks)]
    with Cache() as cache:
        with _engine(settings, cache, load_mode) as engine:
            _same(engine.generate(*asks), settings, *asks)
            cache.settle()
        assert cache.kv_frames() == kv_frames_said(settings)
        with _engine(settings, cache, load_mode, PYTHONHASHSEED="99") as engine:
            for answer in _same(engine.fresh(*asks), settings, *asks):
                assert answer.hit, (answer.cached, answer.reusable)
            answers = _same(engine.fresh(*further), settings, *further)
            assert [answer.cached for answer in answers] == shared
            assert engine.counters()["scheduler"].get("loads_failed", 0) == 0


@full
@pytest.mark.parametrize(("first", "second"), [(TEXT, PAIR), (PAIR, TEXT)], ids=["1 then 2", "2 then 1"])
def test_blocks_are_named_by_their_heads(first: Settings, second: Settings) -> None:
    """Half the heads are another part than all of them: what one worker stored is nothing to two, and the reverse."""
    truth = Expected.plan(TEXT, *LONG)
    truth.prepare()
    tokens = [answer.tokens for answer in truth.of(*LONG)]
    with Cache() as cache:
        for settings in (first, second, first):
            with _engine(settings, cache) as engine:
                answers = engine.fresh(*LONG)
                cache.settle()
            assert [answer.tokens for answer in answers] == tokens
            hits = [answer.hit for answer in answers]
            if settings is second:
                assert [answer.cached for answer in answers] == [0] * len(LONG)
        assert hits == [True] * len(LONG), "the second engine replaced what the first had stored"


APART = {
    "block size": (TEXT, WIDE),
    "dtype": (TEXT, HALVES),
    "rope": (
        TEXT,
        Settings("text", {"hf_overrides": {"rope_parameters": {"rope_type": "default", "rope_theta": 2e4}}}),
    ),
}
for _, other in APART.values():
    Expected.plan(other, *LONG)
Expected.plan(TEXT, *LONG)


@full
@pytest.mark.parametrize("name", APART)
def test_engines_of_another_configuration_share_nothing(name: str) -> None:
    first, second = APART[name]
    Expected.plan(first).prepare()
    Expected.plan(second).prepare()
    with Cache() as cache:
        with _engine(first, cache) as engine:
            _same(engine.generate(*LONG), first, *LONG)
            cache.settle()
        with _engine(second, cache) as engine:
            assert [answer.cached for answer in _same(engine.fresh(*LONG), second, *LONG)] == [0] * len(LONG)


@full
def test_other_weights_under_one_path_share_nothing(tmp_path: Path) -> None:
    path = tmp_path / "model"
    for name in ("text", "text-retrained"):
        made(name)
        Expected.plan(Settings(name), *LONG).prepare()
    with Cache() as cache:
        for name in ("text", "text-retrained"):
            shutil.rmtree(path, ignore_errors=True)
            shutil.copytree(FOLDER / name, path)
            with _engine(Settings(os.fspath(path)), cache) as engine:
                answers = engine.generate(*LONG)
                assert [answer.cached for answer in _same(answers, Settings(name), *LONG)] == [0] * len(LONG)
                cache.settle()


@full
def test_a_retrained_adapter_under_one_name_and_path_shares_nothing(tmp_path: Path) -> None:
    path = tmp_path / "adapter"
    prompt = words(406, 300)
    with Cache() as cache:
        for model, number in (("adapter", 1), ("adapter-retrained", 2)):
            plain = ask(prompt, lora=["renewed", number, model])
            Expected.plan(VISION, plain).prepare()
            shutil.rmtree(path, ignore_errors=True)
            shutil.copytree(made(model), path)
            wanted = ask(prompt, lora=["renewed", 1, os.fspath(path)])
            with _engine(VISION, cache) as engine:
                (truth,) = Expected.plan(VISION).of(plain)
                (answer,) = engine.fresh(wanted)
                assert answer.same(truth)
                assert answer.cached == 0
                cache.settle()
                assert engine.found(wanted, truth).cached == 288


@full
@pytest.mark.parametrize("load_mode", ["async", "sync"])
def test_preempted_requests_resume_with_what_was_stored(load_mode: str) -> None:
    """A pool of 40 blocks for 8 requests that grow to 9 blocks each."""
    expected = Expected.plan(CRAMPED, *GREEDY)
    expected.prepare()
    truths = [truth.tokens for truth in expected.of(*GREEDY)]
    with Cache() as cache:
        with _engine(CRAMPED, cache, load_mode) as engine:
            assert [answer.tokens for answer in engine.generate(*GREEDY, together=True)] == truths
            assert engine.call("metric", name="vllm:num_preemptions") > 0
            cache.settle()
            assert [answer.tokens for answer in engine.fresh(*GREEDY, together=True)] == truths
        with _engine(CRAMPED, cache, load_mode) as engine:
            answers = engine.fresh(*GREEDY, together=True)
            assert [answer.tokens for answer in answers] == truths
            assert engine.call("metric", name="vllm:num_preemptions") > 0
            assert all(answer.cached >= 150 // BLOCK * BLOCK for answer in answers), [one.cached for one in answers]


@full
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"url": "embedded://"}, "mmcache serve"),
        ({"url": "http://127.0.0.1"}, "http://127.0.0.1"),
        ({}, "url"),
        ({"url": "mmcache://127.0.0.1:1", "load_mod": "sync"}, "load_mod"),
        ({"url": "mmcache://127.0.0.1:1", "load_mode": "soon"}, "use async or sync"),
    ],
)
def test_a_wrong_setting_ends_the_start_with_its_name_and_the_remedy(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(AssertionError) as caught, Engine(TEXT, settings):
        pass
    assert "ConfigError" in str(caught.value)
    assert said in str(caught.value)
