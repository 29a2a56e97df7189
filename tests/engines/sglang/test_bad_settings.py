"""Settings that cannot work end the engine's start, and say what to change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engines.sglang.harness import running


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"url": "mmcache://127.0.0.1:1", "colour": 1}, "unknown setting 'colour' for mmcache; the known ones are url"),
        ({"url": "embedded://"}, "every scheduler process would hold a cache of its own"),
    ],
)
def test_the_engine_does_not_start(made: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(AssertionError, match="the engine ended") as raised, running(made / "text", settings):
        pass
    assert said in str(raised.value)
