"""Fixtures of the vLLM suite. It runs in the engine's own environment (install-vllm.sh), never in mmcache's.

Most tests share three engines, started one after another: the plain one, whose answers are the truth; a first one with
mmcache, which stores what modules said with `written`; and `reader`, a true restart, once for each way to load.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engines.cache import Cache
from tests.engines.vllm.harness import VISION, WRITTEN, Engine, Expected, FirstRun, Settings

TIMEOUT_S = 900  # an engine start, and every case it serves, may be one test's fixture
# Nothing of this may reach a key: the second engine is another process in every way it can be.
OTHER_HASHES = {"prefix_caching_hash_algo": "sha256_cbor"}
OTHER_PROCESS = {"PYTHONHASHSEED": "4242"}


def pytest_configure(config: pytest.Config) -> None:
    """`-m "not full"` is the quick suite."""
    config.addinivalue_line("markers", "full: takes long; not part of the quick suite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Engines start slowly: give every test of this folder more time than the project's default."""
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TIMEOUT_S))


@pytest.fixture(scope="session")
def first_run() -> Iterator[FirstRun]:
    """The plain engine's answers to everything, then the first engine's run over WRITTEN, before an empty cache."""
    Expected.plan(VISION, *WRITTEN).prepare()
    with Cache() as cache:
        with Engine(VISION, {"url": cache.url}, {"PYTHONHASHSEED": "1"}) as writer:
            answers = writer.generate(*WRITTEN)
            writer.fresh(*[wanted for wanted in WRITTEN if "lora" in wanted])  # see `Engine.found`
            cache.settle()
            counters = writer.counters()["worker"]
        yield FirstRun(cache, answers, counters)


@pytest.fixture(scope="session")
def store(first_run: FirstRun) -> Cache:
    """The cache that the suite's first engine filled; `reader` reads it."""
    return first_run.cache


@pytest.fixture(scope="session", params=["async", "sync"])
def reader(request: pytest.FixtureRequest, store: Cache) -> Iterator[Engine]:
    """A fresh engine before the filled cache, one for each load mode."""
    settings = Settings(VISION.model, VISION.llm | OTHER_HASHES)
    cache: dict[str, Any] = {"url": store.url, "load_mode": request.param}
    with Engine(settings, cache, OTHER_PROCESS) as engine:
        yield engine


@pytest.fixture
def unchanged(store: Cache) -> Iterator[None]:
    """What a test stores is gone when it ends, so that no test depends on another."""
    before = set(store.digests())
    yield
    store.settle()
    store.forget([digest for digest in store.digests() if digest not in before])
