"""Other ways SGLang hands pages over: the interface before v1, and the host layout with a buffer for each layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engines.sglang.harness import Cache, running
from tests.engines.sglang.prompts import TEXTS

WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "page by page": ({"interface_v1": 0}, {}),
    "layer first": ({}, {"hicache_mem_layout": "layer_first"}),
    "no prefix": ({"hicache_storage_pass_prefix_keys": False}, {}),
    "verify off": ({"verify": False, "model_identity": "tiny@1"}, {}),
}


@pytest.mark.full
@pytest.mark.parametrize("way", WAYS)
def test_pages_come_back(made: Path, text_cache: Cache, way: str) -> None:
    """In a namespace of its own: what the usual way stored is not found."""
    settings, arguments = WAYS[way]
    with running(made / "text", {"url": text_cache.url, **settings}, **arguments) as engine:
        for stored in (way == "no prefix", True):
            engine.flush()
            answer = engine.ask(TEXTS["plain"])
            assert answer.tokens == text_cache.answers["plain"].tokens
            assert answer.storage == (answer.full if stored else 0)
            text_cache.settle()


@pytest.mark.full
def test_a_cache_too_small_for_the_work_only_forgets(made: Path, text_cache: Cache) -> None:
    """Puts are refused, or what was stored before goes."""
    with Cache("256KiB") as small, running(made / "text", {"url": small.url}) as engine:
        for name in (*TEXTS, *TEXTS):
            engine.flush()
            answer = engine.ask(TEXTS[name])
            assert answer.tokens == text_cache.answers[name].tokens
            assert answer.storage < text_cache.answers["long"].full // 2
            small.settle()
        assert engine.lines("mmcache", "failed inside") == []
