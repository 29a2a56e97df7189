"""Tensor-parallel ranks of one number read what those of another wrote, where the layout allows it; else nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engines.sglang.harness import Cache, running
from tests.engines.sglang.prompts import TEXTS

BY_HEADS = {"hicache_mem_layout": "page_head", "hicache_io_backend": "kernel"}


@pytest.mark.full
@pytest.mark.parametrize(
    ("settings", "arguments", "shared"), [({"tp_lcm_size": 2}, BY_HEADS, True), ({}, {}, False)], ids=["head", "direct"]
)
@pytest.mark.parametrize("ranks", [(1, 2), (2, 1)], ids=["1 to 2", "2 to 1"])
def test_what_one_number_of_ranks_wrote_another_reads(
    made: Path, ranks: tuple[int, int], settings: dict[str, Any], arguments: dict[str, Any], shared: bool
) -> None:
    writer, reader = ranks
    with Cache() as cache:
        own = {"url": cache.url, **settings}
        with running(made / "text", own, tp_size=writer, **arguments) as engine:
            engine.ask(TEXTS["plain"])
            cache.settle()
            assert cache.counters()["entries"] == len(TEXTS["plain"]) // 16 * (2 if shared else writer)
        with running(made / "text", own, tp_size=reader, **arguments) as engine:
            answer = engine.ask(TEXTS["plain"])
            assert answer.storage == (answer.full if shared else 0)
            engine.flush()
            assert engine.ask(TEXTS["plain"], cache_salt="found nowhere").tokens == answer.tokens
