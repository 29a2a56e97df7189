"""An engine that the backend is attached to, and detached from, while it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engines.sglang.harness import Cache, running
from tests.engines.sglang.prompts import BEFORE_PAGES, PICTURED, TEXTS

LATER: dict[str, Any] = {"environment": {"MMCACHE_SGLANG_ATTACH": "1"}, "hicache_storage_backend": None}


@pytest.mark.full
def test_what_was_stored_comes_back_after_every_attachment(made: Path) -> None:
    with Cache() as cache, running(made / "text", {"url": cache.url}, **LATER) as engine:
        truth = engine.ask(TEXTS["plain"])
        assert cache.counters()["stored"] == 0
        for stored in (0, truth.full):
            tried = engine.attach({"url": cache.url})
            assert tried["attached"], tried["said"]
            engine.flush()
            answer = engine.ask(TEXTS["plain"])
            assert (answer.tokens, answer.storage) == (truth.tokens, stored)
            cache.settle()
            assert engine.detach()["detached"]
            engine.flush()
            assert engine.ask(TEXTS["plain"]).storage == 0
        assert engine.lines("mmcache", "failed inside") == []


@pytest.mark.full
def test_pictures_met_before_are_told_apart_after(made: Path) -> None:
    """SGLang's own names of a row and a column of tiles are one."""
    with Cache() as cache, running(made / "vl", {"url": cache.url}, **LATER) as engine:
        prompts = {name: (PICTURED[name].text, [made / "pictures" / f"{name}.png"]) for name in ("row", "column")}
        truth = {name: engine.ask(*prompt).tokens for name, prompt in prompts.items()}
        assert truth["row"] != truth["column"]
        assert engine.attach({"url": cache.url})["attached"]
        found = []
        for name, prompt in [*prompts.items(), *prompts.items()]:
            engine.flush()
            answer = engine.ask(*prompt)
            assert answer.tokens == truth[name]
            found.append((answer.storage, answer.full))
            cache.settle()
        (first, _), (second, _), *again = found
        assert (first, second) == (0, BEFORE_PAGES)
        assert all(storage == full > BEFORE_PAGES for storage, full in again)


@pytest.mark.full
def test_weights_replaced_before_are_not_forgotten(made: Path) -> None:
    with Cache() as cache, running(made / "text", {"url": cache.url}, **LATER) as engine:
        engine.replace_weights(made / "text")
        assert engine.attach({"url": cache.url})["attached"]
        engine.flush()
        engine.ask(TEXTS["plain"])
        cache.settle()
        assert cache.counters()["stored"] == 0
