"""What the tests with the toy engine share: configurations, prompts, adapters, bad entries, what is stored."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mmcache
from mmcache.identity import directory_digest
from mmcache_connectors.vllm.groups import CHUNK, FULL, WINDOW, Group
from tests.integration.support import eventually
from tests.integration.toy_blocks import Lora, Request
from tests.integration.toy_engine import ToyEngine
from tests.integration.toy_memory import FACTS, HEADS, adapter_bytes, keys_of, stored

ONE = [Group(0, FULL, 0, ("a",), HEADS, 1)]
HYBRID = [
    Group(0, FULL, 0, ("a",), HEADS, 1),
    Group(1, WINDOW, 10, ("b",), HEADS, 1),
    Group(2, CHUNK, 12, ("c",), HEADS, 1),
]
CUT = [Group(0, FULL, 0, ("a",), HEADS // 2, 2)]
CONFIGURATIONS = [
    pytest.param(ONE, 1, True, id="one-async"),
    pytest.param(ONE, 1, False, id="one-sync"),
    pytest.param(HYBRID, 1, True, id="hybrid-async"),
    pytest.param(CUT, 2, True, id="tp2-async"),
    pytest.param(ONE, 2, True, id="tp2-copied-heads"),
]


def prompt(seed: int, count: int) -> list[int]:
    """Random tokens: the first `count` of those that belong to a seed."""
    chance = random.Random(seed)
    return [chance.randrange(1000) for _ in range(count)]


def finish(engine: ToyEngine, *requests: Request) -> None:
    """Run these to their end, and store what waits to be stored."""
    engine.run(*requests)
    for worker in engine.workers:
        assert worker.flush(10)


def run_one(engine: ToyEngine, name: str, tokens: list[int], **more: Any) -> Request:
    """A request alone, with nothing in the engine's own prefix cache."""
    assert engine.forget_local()
    request = engine.add(Request(name, tokens, **more))
    finish(engine, request)
    return request


def step_until(engine: ToyEngine, holds: Callable[[], bool], what: str) -> None:
    def holds_after_a_step() -> bool:
        engine.step()
        return holds()

    eventually(holds_after_a_step, what)


def answered(engine: ToyEngine, *requests: Request) -> None:
    """Wait until it is known what the cache holds for these; nothing is admitted meanwhile."""
    eventually(
        lambda: all(engine.scheduler.matched(request, 0)[0] is not None for request in requests), "they are looked up"
    )
    engine.scheduler.take_loads()  # there are none: the time waited in this step begins anew


def overwrite(cache: mmcache.Client, key: mmcache.Key) -> bool:
    """Replace an entry by one of another shape under the same key."""
    assert cache.delete(key) == [True]
    return bool(cache.put(key, [b"another shape"])[0])


def spoil(url: str, engine: ToyEngine, tokens: list[int], row: int) -> None:
    """One block of these tokens becomes an entry of another shape: loads fail there."""
    with mmcache.connect(url) as cache:
        assert overwrite(cache, keys_of(FACTS, tokens).for_part(engine.parts.of_group[0][-1])[row])


def entries(
    engine: ToyEngine, tokens: list[int], *, salt: str = "", adapter: tuple[str, bytes] = ("", b""), epoch: int = 0
) -> tuple[int, int]:
    """(entries stored for these tokens, those whose bytes are wrong). `adapter`: digest of its files, its weights."""
    told = (salt, adapter[1], engine.epoch_weights[epoch])
    with mmcache.connect(engine.settings.url) as cache:
        return stored(cache, engine.parts, engine.facts_of(epoch), tokens, told, adapter[0])


def train(folder: Path, seed: int) -> tuple[str, bytes]:
    """Write an adapter's files, over those of the one before; their digest, and the weights an engine reads."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(random.Random(seed).randbytes(100 + seed))
    return directory_digest(folder), adapter_bytes(str(folder))


def lora(folder: Path, number: int, name: str = "sql") -> Lora:
    return Lora(number, name, str(folder))


class Gate:
    """Holds the calls of a function back until it is opened: a slow cache, which a stopped one is not for long."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function, self._open = function, threading.Event()
        self.open = self._open.set
        self.called = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.called += 1
        assert self._open.wait(20)
        return self._function(*args, **kwargs)
