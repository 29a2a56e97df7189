"""The vLLM connector's two sides against a real server, in an engine that checks every byte it would read."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

import mmcache
from mmcache.client.blocking import Client
from mmcache.keys import Namespace
from mmcache.keyset import Keys, Part
from mmcache.testing.process import ServerProcess
from mmcache.transport.base import Result
from mmcache_connectors.paged import PagedGroup
from mmcache_connectors.vllm.groups import Group
from mmcache_connectors.vllm.plan import Blocks, Job
from mmcache_connectors.vllm.settings import Settings
from mmcache_connectors.vllm.worker import GroupMemory, WorkerSide
from mmcache_kernels import TorchMover, TritonMover
from tests.integration.support import eventually, in_time, suspend
from tests.integration.toy_blocks import Request
from tests.integration.toy_cases import (
    CONFIGURATIONS,
    ONE,
    Gate,
    answered,
    entries,
    finish,
    prompt,
    run_one,
    spoil,
    step_until,
)
from tests.integration.toy_engine import ToyEngine, close_all
from tests.integration.toy_memory import BLOCK


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    close_all()


@pytest.fixture
def server() -> Iterator[ServerProcess]:
    with ServerProcess("16MiB") as process:
        yield process


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


@pytest.mark.parametrize("mover", [TorchMover, TritonMover])
@pytest.mark.parametrize(("groups", "tp", "load_async"), CONFIGURATIONS)
def test_an_engine_on_a_device_loads_what_one_in_host_memory_saved_and_the_other_way(
    server: ServerProcess, groups: list[Group], tp: int, load_async: bool, mover: Any
) -> None:
    tokens, more = prompt(1, 50), prompt(2, 40)
    run_one(ToyEngine(server.url, groups, tp=tp), "cold", tokens)
    device = ToyEngine(server.url, groups, tp=tp, load_async=load_async, mover=mover)
    assert run_one(device, "same", tokens).external == 48
    assert run_one(device, "more", more).external == 0
    device.close()
    assert device.wrong == 0
    host = ToyEngine(server.url, groups, tp=tp, load_async=load_async)
    assert run_one(host, "more", more).external == 36
    assert host.wrong == 0


@pytest.mark.parametrize(("groups", "tp", "load_async"), CONFIGURATIONS)
def test_only_what_the_engine_does_not_hold_itself_is_loaded(
    server: ServerProcess, groups: list[Group], tp: int, load_async: bool
) -> None:
    tokens = prompt(1, 50)
    run_one(ToyEngine(server.url, groups, tp=tp), "cold", tokens)
    engine = ToyEngine(server.url, groups, tp=tp, load_async=load_async)
    finish(engine, engine.add(Request("some", tokens[:20])))
    more = engine.add(Request("more", tokens))
    finish(engine, more)
    again = engine.add(Request("again", tokens))
    finish(engine, again)
    assert (more.local, more.external) == (20, 28) or (len(groups), more.local, more.external) == (3, 16, 32)
    assert (again.local, again.external) == (48, 0)
    assert engine.wrong == 0


def test_of_a_prompt_without_a_whole_block_nothing_is_asked_and_counted(server: ServerProcess) -> None:
    engine = ToyEngine(server.url, ONE)
    request = engine.add(Request("short", prompt(1, BLOCK)))
    assert engine.scheduler._identify.flush(10)  # before the engine comes to it
    finish(engine, request)
    assert engine.scheduler.counters["lookups"] == 0
    run_one(engine, "longer", prompt(1, BLOCK + 1))
    assert engine.scheduler.counters["lookups"] == 1


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
    assert big.forget_local()
    requests = [big.add(Request(f"r{i}", tokens)) for i in range(4)]
    answered(big, *requests)
    finish(big, *requests)
    assert big.scheduler.counters["waits_for_same_load"] > 0
    assert sorted((request.local, request.external) for request in requests) == [(0, 396), *[(396, 0)] * 3]
    assert big.wrong == 0


@pytest.mark.parametrize(("groups", "tp", "load_async"), CONFIGURATIONS)
def test_a_block_of_another_form_is_never_used(
    server: ServerProcess, groups: list[Group], tp: int, load_async: bool
) -> None:
    """A right key with another's bytes: the request is computed from there, and the block is stored anew."""
    engine = ToyEngine(server.url, groups, tp=tp, load_async=load_async)
    tokens = prompt(1, 50)
    run_one(engine, "cold", tokens)
    spoil(server.url, engine, tokens, 5)
    run_one(engine, "hit a bad block", tokens)
    seen = sum(worker.snapshot().get("verify_failures", 0) for worker in engine.workers)
    assert 1 <= seen <= tp // groups[0].shards  # ranks that hold copies of the same heads read it, until one drops it
    assert run_one(engine, "good again", tokens).external == 48
    assert engine.wrong == 0
    assert engine.counts["loads_failed"] >= 1


def test_a_dead_server_costs_no_request_more_than_the_deadline() -> None:
    tokens = prompt(1, 50)

    def longest_s() -> float:
        with ServerProcess("16MiB") as server:
            engine = ToyEngine(server.url, ONE, deadline_s=1.0)
            run_one(engine, "cold", tokens)
            server.stop(signal.SIGKILL)
        took = []
        for turn in range(3):
            started = time.monotonic()
            assert run_one(engine, f"dead {turn}", tokens).external == 0
            took.append(time.monotonic() - started)
        assert engine.wrong == 0
        return max(took)

    in_time(longest_s, 3.0)


def test_a_stopped_server_costs_no_request_more_than_the_deadline(server: ServerProcess) -> None:
    tokens = prompt(1, 50)

    def stopped_s() -> float:
        engine = ToyEngine(server.url, ONE, deadline_s=1.0)
        run_one(engine, "cold", tokens)
        assert engine.forget_local()
        request = engine.add(Request("while loading", tokens))
        answered(engine, request)
        suspend(server.pid)
        started = time.monotonic()
        try:
            engine.run(request)
            return time.monotonic() - started
        finally:
            os.kill(server.pid, signal.SIGCONT)
            assert engine.wrong == 0

    in_time(stopped_s, 4.0)


def test_an_aborted_load_gives_its_blocks_back(server: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ToyEngine(server.url, ONE)
    tokens = prompt(1, 50)
    run_one(engine, "cold", tokens)
    assert engine.forget_local()
    free = engine.pools[0].free_count()
    gate = Gate(engine.client.get_into)
    monkeypatch.setattr(engine.client, "get_into", gate)
    request = engine.add(Request("aborted", tokens))
    step_until(engine, lambda: request.state == "loading", "it loads")
    engine.end(request)
    gate.open()
    step_until(engine, lambda: not engine.requests, "its load has ended")
    assert engine.pools[0].free_count() == free
    assert engine.pools[0].cached_count() == 0  # what it was given holds nothing anybody may hit
    assert run_one(engine, "after", tokens).external == 48
    assert engine.wrong == 0


def test_nothing_is_cached_before_the_engine_knows_its_weights(server: ServerProcess) -> None:
    engine = ToyEngine(server.url, ONE)
    engine.known = False
    assert run_one(engine, "early", prompt(1, 50)).external == 0
    engine.known = True
    assert entries(engine, prompt(1, 50)) == (0, 0)
    assert run_one(engine, "later", prompt(1, 50)).external == 0
    assert run_one(engine, "then", prompt(1, 50)).external == 48


def test_hits_are_real(server: ServerProcess) -> None:
    """The checks that find wrong bytes, in an engine and in the cache, can fail."""
    engine = ToyEngine(server.url, ONE)
    tokens = prompt(1, 50)
    request = engine.add(Request("r", tokens, outputs=5))
    step_until(engine, lambda: request.state == "running", "it runs")
    engine.memory[0].arrays[0][request.blocks[0][2], 1, 1, 3] += 1
    finish(engine, request)
    assert engine.wrong > 0
    assert entries(engine, tokens) == (12, 0)
    engine.epoch_weights[0] = 1  # as if it should have computed with others
    assert entries(engine, tokens) == (12, 12)


@pytest.mark.parametrize(("deadline_s", "most_nbytes"), [(10.0, 16 << 20), (0.05, 3_750_000)])
def test_a_question_covers_no_more_than_may_arrive_in_time_and_may_be_pinned(
    deadline_s: float, most_nbytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, memory = 40, torch.zeros(4, 2 * 40 + 1, 2, 16, 2048)
    paged = PagedGroup(list(memory.unbind(0)), num_blocks=2 * count + 1, block_tokens=16)
    keys = Namespace(kind="kv", model="m", dtype="float32", layout="LHNC", block_size=16).block_keys(range(count * 16))
    asked: list[int] = []
    ask = Client.get_into

    def noted(self: Client, some: Keys, places: Sequence[Any]) -> list[Result]:
        asked.append(len(some))
        return ask(self, some, places)

    with ServerProcess("128MiB") as server, mmcache.connect(server.url) as client:
        part = Part(kv_group=(0, 1), layers=None, kv_heads=(0, 2, 2))
        worker = WorkerSide(Settings(url=server.url, deadline_s=deadline_s), client, [GroupMemory(paged, part, True)])
        worker.save([Job("save", (Blocks(0, keys, list(range(1, count + 1))),))])
        assert worker.flush(30)
        monkeypatch.setattr(Client, "get_into", noted)
        load = Job("load", (Blocks(0, keys, list(range(count + 1, 2 * count + 1))),))

        def asks_for_all() -> bool:  # a machine that pauses within the little time there is ends a load
            asked.clear()
            worker.start_loads([load], asynchronous=False)
            return sum(asked) == count

        eventually(asks_for_all, "a load goes on to its end")
    assert max(asked) == most_nbytes // paged.spec().nbytes < count
