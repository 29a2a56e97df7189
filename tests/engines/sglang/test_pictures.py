"""Pictures in the real engine: the same one hits, another one never, however alike they are to SGLang's own hash."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.engines.sglang.conftest import asked
from tests.engines.sglang.harness import Answer, Cache, Engine
from tests.engines.sglang.prompts import BEFORE_PAGES, PAGE, PICTURED, STORED, about

ALIKE = (("row", "column"), ("wide", "tall"))


@pytest.mark.parametrize("pair", ALIKE)
def test_the_pairs_differ_in_their_grids_alone(made: Path, pair: tuple[str, str]) -> None:
    features = json.loads((made / "pictures" / "features.json").read_text())
    (one, grid), (other, other_grid) = (features[name] for name in pair)
    assert one == other
    assert grid != other_grid


def test_without_a_cache_the_engine_works_and_says_so_once(alone: tuple[dict[str, Answer], str]) -> None:
    vl_truth, log = alone
    assert all(answer.storage == 0 for answer in vl_truth.values())
    assert vl_truth["row"].tokens != vl_truth["column"].tokens
    assert vl_truth["first"].tokens != vl_truth["second"].tokens
    lines = [line for line in log.splitlines() if "does not answer" in line]
    assert len(lines) == 1
    assert "everything is a miss until it does" in lines[0]


@pytest.mark.parametrize("name", STORED)
def test_the_same_picture_hits_after_a_restart(
    vl_engine: Engine, made: Path, vl_truth: dict[str, Answer], vl_cache: Cache, name: str
) -> None:
    assert vl_cache.answers[name].tokens == vl_truth[name].tokens
    answer = asked(vl_engine, made, PICTURED[name])
    assert answer.tokens == vl_truth[name].tokens
    assert answer.storage == answer.full > BEFORE_PAGES


@pytest.mark.parametrize("name", ["second", "touched", "column", "tall"])
def test_another_picture_hits_only_before_it(
    vl_engine: Engine, made: Path, vl_truth: dict[str, Answer], name: str
) -> None:
    answer = asked(vl_engine, made, PICTURED[name])
    assert answer.tokens == vl_truth[name].tokens
    assert answer.storage == answer.cached == BEFORE_PAGES


def test_a_second_picture_that_differs_ends_the_hit(vl_engine: Engine, made: Path, vl_truth: dict[str, Answer]) -> None:
    name = "first touched"
    answer = asked(vl_engine, made, PICTURED[name])
    assert answer.tokens == vl_truth[name].tokens
    second = answer.prompt - 60 - 1 - 16  # words, the end mark and the second picture's tokens
    assert answer.storage == second // PAGE * PAGE


def test_a_hash_from_the_caller_is_not_believed(vl_engine: Engine, made: Path) -> None:
    pictures = made / "pictures"
    prompts = {name: about(name, first=700) for name in ("first", "second")}
    told = {"mm_hashes": ["00000000000000ab"]}
    for name, expected in (("first", 0), ("second", BEFORE_PAGES)):
        vl_engine.flush()
        assert vl_engine.ask(prompts[name].text, [pictures / f"{name}.png"], **told).storage == expected


def test_one_engine_does_not_confuse_them_either(vl_engine: Engine, made: Path, vl_truth: dict[str, Answer]) -> None:
    """SGLang's own tiers, and its cache of vision embeddings, go by the same identity."""
    vl_engine.flush()
    for name in ("row", "column", "wide", "tall"):
        prompt = PICTURED[name]
        answer = vl_engine.ask(prompt.text, [made / "pictures" / f"{name}.png" for name in prompt.pictures])
        assert answer.tokens == vl_truth[name].tokens, name


def test_replaced_weights_end_it(vl_engine: Engine, made: Path, vl_truth: dict[str, Answer], vl_cache: Cache) -> None:
    """Last here: what this engine computes from now on is not what its keys say."""
    assert asked(vl_engine, made, PICTURED["first"]).storage > 0
    vl_engine.replace_weights(made / "vl")
    vl_cache.settle()
    stored = vl_cache.counters()["stored"]
    for prompt, truth in ((PICTURED["first"], vl_truth["first"].tokens), (about("first", first=1300), None)):
        answer = asked(vl_engine, made, prompt)
        assert answer.storage == 0
        assert truth in (None, answer.tokens)
    vl_cache.settle()
    assert vl_cache.counters()["stored"] == stored
    assert len(vl_engine.lines("weights of this engine are replaced")) == 1
