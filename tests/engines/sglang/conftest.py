"""Fixtures of the SGLang suite. It runs in the engine's own environment (install-sglang.sh), never in mmcache's.

Each model is started twice before one cache: a first engine stores what was asked of it and is killed, a second one
reads. Truth is what an engine answers that finds nothing in a cache. One engine runs at a time.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines.sglang.harness import HERE, Answer, Cache, Engine, running, shim_environment
from tests.engines.sglang.prompts import MANY, PICTURED, STORED, TEXTS, Pictured

TIMEOUT_S = 600  # an engine start may be one test's fixture
NOWHERE = "mmcache://127.0.0.1:1"


def pytest_configure(config: pytest.Config) -> None:
    """`-m "not full"` is the quick suite."""
    config.addinivalue_line("markers", "full: takes long; not part of the quick suite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Engines start slowly: give every test of this folder more time than the project's default."""
    for item in items:
        if item.path.is_relative_to(HERE) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TIMEOUT_S))


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models `text`, `vl` and `window`, and the pictures in `pictures`."""
    folder = tmp_path_factory.mktemp("sglang")
    for script, *words in (("models.py", folder), ("pictures.py", folder / "pictures", folder / "vl")):
        command = [sys.executable, "-W", "ignore", str(HERE / script), *map(str, words)]
        done = subprocess.run(command, env=shim_environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def text_cache(made: Path) -> Iterator[Cache]:
    """The cache an engine filled with TEXTS and MANY before it was killed, and what it answered then."""
    with Cache() as cache:
        with running(made / "text", {"url": cache.url}) as engine:
            for name, prompt in TEXTS.items():
                engine.flush()  # else a shared beginning is found on the device
                truth = cache.answers[name] = engine.ask(prompt, cache_salt=f"found nowhere: {name}")
                assert truth.cached == 0
                engine.flush()
                assert engine.ask(prompt).tokens == truth.tokens
            engine.flush()
            cache.many = engine.ask_many(MANY)
            engine.flush()  # refused until everything is stored
            cache.settle()
        yield cache


@pytest.fixture(scope="module")
def text_engine(made: Path, text_cache: Cache) -> Iterator[Engine]:
    """A second text engine before the filled cache, set otherwise in what decides no page's bytes."""
    others = {"port": 31777, "mem_fraction_static": 0.12, "max_total_tokens": 6144, "hicache_ratio": 3}
    with running(made / "text", {"url": text_cache.url}, **others) as engine:
        yield engine


@pytest.fixture(scope="session")
def alone(made: Path) -> tuple[dict[str, Answer], str]:
    """What a VL engine whose cache cannot be reached answers to everything in PICTURED, and its log."""
    with running(made / "vl", {"url": NOWHERE}) as engine:
        return {name: asked(engine, made, PICTURED[name]) for name in PICTURED}, engine.log()


@pytest.fixture(scope="session")
def vl_truth(alone: tuple[dict[str, Answer], str]) -> dict[str, Answer]:
    """The answers of the engine without a cache."""
    return alone[0]


@pytest.fixture(scope="session")
def vl_cache(made: Path, vl_truth: dict[str, Answer]) -> Iterator[Cache]:
    """The cache an engine filled with STORED of PICTURED, out of memory that it lent, before it was killed."""
    with Cache() as cache:
        with running(made / "vl", {"url": cache.url}, environment={"MMCACHE_SGLANG_LEND": "1"}) as engine:
            for name in STORED:
                cache.answers[name] = asked(engine, made, PICTURED[name])
            engine.flush()  # refused until everything is stored
            cache.settle()
            assert cache.counters()["bytes_lent"] > 0.8 * cache.counters()["bytes_written"]
        yield cache


@pytest.fixture(scope="module")
def vl_engine(made: Path, vl_cache: Cache) -> Iterator[Engine]:
    """A second VL engine before the filled cache."""
    with running(made / "vl", {"url": vl_cache.url}) as engine:
        yield engine


def asked(engine: Engine, made: Path, prompt: Pictured) -> Answer:
    """Ask about pictures, with nothing in the engine's own caches."""
    engine.flush()
    return engine.ask(prompt.text, [made / "pictures" / f"{name}.png" for name in prompt.pictures])
