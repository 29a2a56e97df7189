"""Settings that cannot work end the engine's start, and say what to change."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.engines.sglang.harness import Cache, running
from tests.engines.sglang.prompts import TEXTS


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


@pytest.mark.full
def test_a_running_engine_does_not_take_it(made: Path) -> None:
    """Attached later it would not know what happened to the weights before."""
    with Cache() as cache, running(made / "text", {"url": cache.url}, hicache_storage_backend=None) as engine:
        for _ in range(2):
            tried = engine.attach({"url": cache.url})
            assert not tried["attached"]
            assert "start SGLang with MMCACHE_SGLANG_ATTACH=1" in tried["said"]
        engine.ask(TEXTS["plain"])
        cache.settle()
        assert cache.counters()["stored"] == 0


@pytest.mark.full
def test_weights_replaced_on_disk_while_it_starts_are_not_named(made: Path, tmp_path: Path) -> None:
    """The engine works, stores nothing, and says what to do."""
    folder = tmp_path / "text"
    shutil.copytree(made / "text", folder)
    touching = threading.Event()

    def touch() -> None:
        while not touching.wait(0.5):
            (folder / "model.safetensors").touch()

    toucher = threading.Thread(target=touch)
    toucher.start()
    try:
        with Cache() as cache, running(folder, {"url": cache.url}) as engine:
            engine.ask(TEXTS["plain"])
            cache.settle()
            assert cache.counters()["stored"] == 0
            assert len(engine.lines("mmcache", "model.safetensors changed", '"model_identity"')) == 1
    finally:
        touching.set()
        toucher.join()
