"""Requests the engine cannot serve are refused as by an engine without mmcache, and harm nobody after them."""

from __future__ import annotations

import pytest

from tests.engines.vllm.harness import VISION, Engine, Expected, ask, words, written
from tests.engines.vllm.models import IMAGE

GOOD = written(ask(words(500, 200) + IMAGE, 1))
BAD = {
    "longer than max_model_len": ask(words(501, 1100)),
    "an image that cannot be decoded": ask(words(502, 100) + IMAGE, {"kind": "broken"}),
    "more images than allowed": ask(words(503, 100) + 4 * IMAGE, 1, 2, 3, 4),
    "an empty prompt": ask(tokens=[]),
}
EXPECTED = Expected.plan(VISION, GOOD, *BAD.values())


@pytest.mark.parametrize("name", BAD)
def test_the_engine_refuses_it_as_it_does_without_a_cache(reader: Engine, name: str) -> None:
    bad, good, after = reader.generate(BAD[name], GOOD, GOOD)
    truth, fine = EXPECTED.of(BAD[name], GOOD)
    assert truth.error
    assert bad.error.partition(":")[0] == truth.error.partition(":")[0]
    assert good.same(fine)
    assert after.same(fine)
