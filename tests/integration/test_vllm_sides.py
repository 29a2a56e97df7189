"""The vLLM connector's two sides against a real server, in an engine that checks every byte it would read."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import mmcache
from mmcache.testing.process import ServerProcess
from mmcache_connectors.vllm.groups import CHUNK, FULL, WINDOW, Group
from tests.integration.support import eventually, suspend
from tests.integration.toy_engine import HEADS, Request, ToyEngine, close_all

ONE = [Group(0, FULL, 0, ("a",), HEADS, 1)]
HYBRID = [
    Group(0, FULL, 0, ("a",), HEADS, 1),
    Group(1, WINDOW, 10, ("b",), HEADS, 1),
    Group(2, CHUNK, 12, ("c",), HEADS, 1),
]
CUT = [Group(0, FULL, 0, ("a",), HEADS // 2, 2)]


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    close_all()


@pytest.fixture
def server() -> Iterator[ServerProcess]:
    with ServerProcess("16MiB") as process:
        yield process


def prompt(seed: int, count: int) -> list[int]:
    return [random.Random(seed).randrange(1000) + place % 7 for place in range(count)]


def run_one(engine: ToyEngine, name: str, tokens: list[int], **more: Any) -> Request:
    request = engine.add(Request(name, list(tokens), **more))
    engine.run(request)
    for worker in engine.workers:
        assert worker.flush(10)
    return request


def step_until(engine: ToyEngine, holds: Callable[[], bool], what: str) -> None:
    def holds_after_a_step() -> bool:
        engine.step()
        return holds()

    eventually(holds_after_a_step, what)


CONFIGURATIONS = [
    pytest.param(ONE, 1, True, id="one-async"),
    pytest.param(ONE, 1, False, id="one-sync"),
    pytest.param(HYBRID, 1, True, id="hybrid-async"),
    pytest.param(CUT, 2, True, id="tp2-async"),
    pytest.param(ONE, 2, True, id="tp2-copied-heads"),
]


@pytest.mark.parametrize(("groups", "tp", "load_async"), CONFIGURATIONS)
def test_another_engine_loads_what_one_saved(
    server: ServerProcess, groups: list[Group], tp: int, load_async: bool
) -> None:
    first = ToyEngine(server.url, groups, tp=tp, load_async=load_async)
    tokens = prompt(1, 50)
    assert run_one(first, "cold", tokens).external == 0
    first.close()
    second = ToyEngine(server.url, groups, tp=tp, load_async=load_async, chunk_tokens=7)
    assert run_one(second, "same", tokens).external == 48
    assert run_one(second, "a prefix", tokens[:30] + prompt(2, 20)).external == 28
    assert run_one(second, "at a border", tokens[:32]).external == 28  # one token must be computed
    assert run_one(second, "another", prompt(3, 50)).external == 0
    assert run_one(second, "short", tokens[:4]).external == 0
    assert second.wrong == 0


def test_turns_find_what_was_decoded_unless_told_not_to_keep_it(server: ServerProcess) -> None:
    engine = ToyEngine(server.url, ONE)
    first = run_one(engine, "turn 1", prompt(1, 10), outputs=30)
    assert run_one(engine, "turn 2", first.all_token_ids + [5] * 6).external == 36
    careful = ToyEngine(server.url, ONE, save_decode_blocks=False, extra_facts={"other": "1"})
    first = run_one(careful, "turn 1", prompt(1, 10), outputs=30)
    assert run_one(careful, "turn 2", first.all_token_ids + [5] * 6).external == 8
    assert engine.wrong == careful.wrong == 0


def test_salts_and_skipping_and_sessions(server: ServerProcess) -> None:
    engine = ToyEngine(server.url, ONE)
    tokens = prompt(1, 40)
    run_one(engine, "a", tokens, cache_salt="a")
    assert run_one(engine, "b", tokens, cache_salt="b").external == 0
    assert run_one(engine, "none", tokens).external == 0
    assert run_one(engine, "a again", tokens, cache_salt="a").external == 36
    assert run_one(engine, "unread", tokens, skip_reading_prefix_cache=True).external == 0
    assert run_one(engine, "session", prompt(9, 40), resumable=True).external == 0
    assert run_one(engine, "after a session", prompt(9, 40)).external == 0
    assert engine.wrong == 0


def test_the_same_prompt_at_once_is_loaded_once(server: ServerProcess) -> None:
    tokens = prompt(1, 400)
    big = ToyEngine(server.url, ONE, num_blocks=500)
    run_one(big, "cold", tokens)
    requests = [big.add(Request(f"r{i}", list(tokens))) for i in range(4)]
    big.run(*requests)
    assert big.scheduler.counters["waits_for_same_load"] > 0
    assert [request.external for request in requests] == [396] * 4
    assert big.wrong == 0


@pytest.mark.parametrize(("groups", "tp", "load_async"), CONFIGURATIONS)
def test_a_block_of_another_form_is_never_used(
    server: ServerProcess, groups: list[Group], tp: int, load_async: bool
) -> None:
    """A right key with another's bytes: the request is computed from there, and the block is stored anew."""
    engine = ToyEngine(server.url, groups, tp=tp, load_async=load_async)
    tokens = prompt(1, 50)
    run_one(engine, "cold", tokens)
    with mmcache.connect(server.url) as cache:
        chain = engine.namespaces.get("", "")
        assert chain is not None
        keys = chain.block_keys(tokens)
        part = engine.scheduler._parts.of_group[0][-1]
        assert overwrite(cache, keys.for_part(part)[5])
    run_one(engine, "hit a bad block", tokens)
    seen = sum(worker.snapshot().get("verify_failures", 0) for worker in engine.workers)
    assert 1 <= seen <= tp // groups[0].shards  # ranks that hold copies of the same heads read it, until one drops it
    assert engine.wrong == 0
    assert run_one(engine, "good again", tokens).external == 48
    assert engine.wrong == 0


def overwrite(cache: mmcache.Client, key: mmcache.Key) -> bool:
    """Replace an entry by one of another shape under the same key."""
    assert cache.delete(key) == [True]
    return bool(cache.put(key, [b"another shape"])[0])


def test_a_dead_server_costs_no_request_more_than_the_deadline(server: ServerProcess) -> None:
    engine = ToyEngine(server.url, ONE, deadline_s=1.0)
    tokens = prompt(1, 50)
    run_one(engine, "cold", tokens)
    server.stop(signal.SIGKILL)
    for turn in range(3):
        started = time.monotonic()
        assert run_one(engine, f"dead {turn}", tokens).external == 0
        assert time.monotonic() - started < 3.0
    assert engine.wrong == 0


def test_a_stopped_server_costs_no_request_more_than_the_deadline(server: ServerProcess) -> None:
    engine = ToyEngine(server.url, ONE, deadline_s=1.0)
    tokens = prompt(1, 50)
    run_one(engine, "cold", tokens)
    request = engine.add(Request("while loading", list(tokens)))
    eventually(lambda: engine.scheduler.matched(request, 0)[0] is not None, "it is looked up")
    suspend(server.pid)
    started = time.monotonic()
    try:
        engine.run(request, steps=10**6)
    finally:
        os.kill(server.pid, signal.SIGCONT)
    assert time.monotonic() - started < 4.0
    assert engine.wrong == 0


def test_an_aborted_load_gives_its_blocks_back(server: ServerProcess) -> None:
    engine = ToyEngine(server.url, ONE)
    tokens = prompt(1, 50)
    run_one(engine, "cold", tokens)
    free = len(engine.free[0])
    request = engine.add(Request("aborted", list(tokens)))
    step_until(engine, lambda: request.state == "loading", "it loads")
    engine.end(request)
    step_until(engine, lambda: not engine.requests, "its load has ended")
    assert len(engine.free[0]) == free
    assert run_one(engine, "after", tokens).external == 48
    assert engine.wrong == 0


def test_new_weights_find_nothing_of_the_old(server: ServerProcess) -> None:
    engine = ToyEngine(server.url, ONE)
    tokens = prompt(1, 50)
    run_one(engine, "cold", tokens)
    engine.facts = lambda: {"model": "toy", "dtype": "uint8", "weights_epoch": "2"}
    engine.scheduler.reset()
    assert run_one(engine, "new weights", tokens).external == 0
    assert run_one(engine, "new weights again", tokens).external == 48


def test_nothing_is_cached_before_the_engine_knows_its_weights(server: ServerProcess) -> None:
    engine = ToyEngine(server.url, ONE)
    known, engine.facts = engine.facts, lambda: None
    assert run_one(engine, "early", prompt(1, 50)).external == 0
    engine.facts = known
    assert run_one(engine, "later", prompt(1, 50)).external == 0
    assert run_one(engine, "then", prompt(1, 50)).external == 48


@pytest.mark.parametrize(("groups", "tp", "load_async"), CONFIGURATIONS)
@pytest.mark.parametrize("seed", range(3))
def test_no_mix_of_requests_faults_and_preemption_gives_a_wrong_byte(
    groups: list[Group], tp: int, load_async: bool, seed: int
) -> None:
    """Prompts that share prefixes, memory for a few of them, a cache too small, bad and vanishing blocks, aborts."""
    chance = random.Random(seed)
    with ServerProcess("256KiB") as server, mmcache.connect(server.url, deadline_s=1.0) as saboteur:
        engine = ToyEngine(
            server.url, groups, tp=tp, load_async=load_async, num_blocks=40, chunk_tokens=9, save_buffer_mib=64
        )
        stems = [prompt(stem, 60) for stem in range(4)]
        namespace = engine.namespaces.get("", "")
        assert namespace is not None
        for number in range(60):
            tokens = stems[chance.randrange(4)][: chance.randrange(3, 60)] + prompt(number, chance.randrange(9))
            engine.add(Request(f"r{number}", tokens, outputs=chance.randrange(1, 12)))
            for _ in range(chance.randrange(6)):
                engine.step()
            running = [one for one in engine.requests.values() if one.state in ("running", "loading")]
            if running and chance.random() < 0.2:
                engine.end(chance.choice(running))
            elif chance.random() < 0.3:
                keys = namespace.block_keys(stems[chance.randrange(4)]).for_part(engine.scheduler._parts.of_group[0][0])
                key = chance.choice(list(keys))
                if saboteur.delete(key) == [True] and chance.random() < 0.7:
                    saboteur.put(key, [b"another shape"])
        engine.run(*engine.requests.values(), steps=10**5)
        assert engine.wrong == 0
        assert sum(len(free) for free in engine.free) == 39 * len(groups)  # no block was lost
        for worker in engine.workers:
            assert worker.snapshot()["blocks_loaded"] > 0


def test_hits_are_real(server: ServerProcess) -> None:
    """The check that finds wrong bytes can fail."""
    engine = ToyEngine(server.url, ONE)
    tokens = prompt(1, 50)
    request = engine.add(Request("r", list(tokens), outputs=5))
    step_until(engine, lambda: request.state == "running", "it runs")
    engine.memory[0][0][request.blocks[0][2], 1, 1, 3] += 1
    engine.run(request)
    assert engine.wrong > 0
