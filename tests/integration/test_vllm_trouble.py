"""A slow, stopped or cramped cache, and code that raises, under the vLLM connector's two sides."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import Any

import pytest

import mmcache
from mmcache.testing.process import ServerProcess
from mmcache_connectors.device import DeviceBlocks
from mmcache_connectors.vllm.groups import Group
from mmcache_kernels import TorchMover
from tests.integration.support import eventually, suspend
from tests.integration.toy_blocks import Request
from tests.integration.toy_cases import CONFIGURATIONS, ONE, Gate, answered, entries, finish, prompt, run_one
from tests.integration.toy_engine import ToyEngine, close_all
from tests.integration.toy_memory import FACTS, keys_of

pytestmark = pytest.mark.alone

DEADLINE_S = 3.0
ONE_DEADLINE_S = 1.8 * DEADLINE_S  # never two of them, even where the machine stands still for seconds
ASKED_AT_ONCE = 10  # what is answered in the little time there is for a question


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    close_all()


@pytest.fixture
def server() -> Iterator[ServerProcess]:
    with ServerProcess("16MiB") as process:
        yield process


@contextmanager
def stopped(server: ServerProcess) -> Iterator[float]:
    """The server does nothing meanwhile; gives when that began."""
    suspend(server.pid)
    try:
        yield time.monotonic()
    finally:
        os.kill(server.pid, signal.SIGCONT)


def times_to_end(engine: ToyEngine, requests: list[Request], step_s: float) -> list[float]:
    """Seconds from now until each has ended; a step takes at least `step_s`, as a model's does."""
    started = time.monotonic()
    ends: dict[Request, float] = {}
    while len(ends) < len(requests):
        engine.step()
        now = time.monotonic()
        ends.update({one: now - started for one in requests if one.state == "ended" and one not in ends})
        assert now - started < 20
        time.sleep(step_s)
    return list(ends.values())


def store(server: ServerProcess, prompts: list[list[int]]) -> None:
    """By an engine that has time for it."""
    engine = ToyEngine(server.url, ONE, num_blocks=len(prompts) * 14)
    finish(engine, *(engine.add(Request(f"cold {seed}", one)) for seed, one in enumerate(prompts)))


def found(engine: ToyEngine, prompts: list[list[int]]) -> list[Request]:
    """Requests for these, each known to find 48 tokens: some are asked for again where a pause of the machine was
    longer than the little time there is for a question."""
    numbers = count()

    def all_found(some: list[list[int]]) -> list[Request]:
        requests = [engine.add(Request(f"found {next(numbers)}", one)) for one in some]
        answered(engine, *requests)
        if all(engine.scheduler.matched(request, 0)[0] == 48 for request in requests):
            return requests
        for request in requests:
            engine.end(request)
        return []

    requests: list[Request] = []
    for first in range(0, len(prompts), ASKED_AT_ONCE):
        requests += eventually(partial(all_found, prompts[first : first + ASKED_AT_ONCE]), "all are found")
    return requests


# ------------------------------------------------------------------------------------------------------ exceptions
def boom(*args: Any, **kwargs: Any) -> Any:
    raise MemoryError("injected")


WAYS: list[tuple[str, Callable[[ToyEngine], object]]] = [
    ("runs", lambda engine: engine.scheduler._identifier),
    ("_load", lambda engine: engine.scheduler),
    ("_save", lambda engine: engine.scheduler),
    ("chain", lambda engine: engine.scheduler._identifier),
    ("pin_prefix", lambda engine: engine.lookup_client),
    ("get_into", lambda engine: engine.client),
    ("put", lambda engine: engine.client),
]


@pytest.mark.parametrize(("name", "where"), WAYS, ids=[name for name, _ in WAYS])
@pytest.mark.parametrize(("groups", "tp", "load_async"), CONFIGURATIONS[:3])
def test_an_exception_anywhere_is_a_miss(
    server: ServerProcess, groups: list[Group], tp: int, load_async: bool, name: str,
    where: Callable[[ToyEngine], object], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What the engine was promised is reported as failed, and computed; the requests end, and so do the next ones."""
    tokens = prompt(1, 50)
    run_one(ToyEngine(server.url, groups, tp=tp), "cold", tokens)
    engine = ToyEngine(server.url, groups, tp=tp, load_async=load_async, chunk_tokens=7)
    with monkeypatch.context() as patch:
        patch.setattr(where(engine), name, boom)
        requests = [engine.add(Request(str(seed), tokens[: 30 + seed], outputs=9)) for seed in range(3)]
        finish(engine, *requests)
    assert engine.wrong == 0
    assert engine.counts["loads_failed"] <= len(requests)  # none is tried again and again
    assert (engine.counts["loads_failed"] > 0) == (name in ("_load", "get_into"))
    for request in requests:
        assert entries(engine, request.all_token_ids)[1] == 0
    assert engine.forget_local()  # no block is lost
    assert run_one(engine, "after", tokens).external == 48
    assert engine.wrong == 0


# ------------------------------------------------------------------------------------------------------ time
def test_after_many_pins_a_stopped_server_costs_later_requests_one_deadline(server: ServerProcess) -> None:
    """Pins to be given back, and questions nobody waits for any more, keep no later request waiting."""
    prompts = [prompt(seed, 50) for seed in range(40)]
    store(server, prompts)
    engine = ToyEngine(server.url, ONE, deadline_s=DEADLINE_S, num_blocks=40 * 14)
    requests = found(engine, prompts)
    with stopped(server):
        assert max(times_to_end(engine, requests, 0.002)) < ONE_DEADLINE_S
        assert engine.counts["external_tokens"] == 40 * 48
        later = []
        for seed in range(24):
            later += times_to_end(engine, [engine.add(Request(f"later {seed}", prompt(100 + seed, 50)))], 0.002)
    assert sorted(later)[12] < 0.8 * engine.settings.lookup_s  # most were not even asked about
    assert max(later) < ONE_DEADLINE_S
    assert engine.wrong == 0


@pytest.mark.parametrize("load_async", [True, False])
def test_requests_that_wait_for_one_load_wait_no_longer_than_its_deadline(
    server: ServerProcess, load_async: bool
) -> None:
    tokens = prompt(1, 50)
    store(server, [tokens])
    engine = ToyEngine(server.url, ONE, deadline_s=DEADLINE_S, load_async=load_async, num_blocks=24 * 14)
    requests = found(engine, [tokens] * 24)
    with stopped(server):
        ends = times_to_end(engine, requests, 0.02)
    assert max(ends) < ONE_DEADLINE_S
    assert engine.counts["loads_failed"] > 0
    assert engine.wrong == 0


def test_loads_that_wait_for_their_turn_do_not_time_out(server: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty loads of .25 s for two threads take longer than a cache that does not answer is waited for."""
    prompts = [prompt(seed, 50) for seed in range(30)]
    store(server, prompts)
    engine = ToyEngine(server.url, ONE, deadline_s=4.0, num_blocks=30 * 14)
    real = engine.client.get_into

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.25)
        return real(*args, **kwargs)

    monkeypatch.setattr(engine.client, "get_into", slow)
    requests = found(engine, prompts)
    assert max(times_to_end(engine, requests, 0.0)) > engine.settings.load_s  # else this shows nothing
    assert engine.counts["loads_failed"] == 0
    assert [request.external for request in requests] == [48] * 30


# ------------------------------------------------------------------------------------------------------ room
def test_a_hit_longer_than_one_question_may_pin_is_pinned_whole() -> None:
    tokens = prompt(1, 3_201)
    with (
        ServerProcess("4MiB", environment={"MMCACHE_MAX_INLINE_NBYTES": "65536"}) as server,
        mmcache.connect(server.url) as cache,
    ):
        engine = ToyEngine(server.url, ONE, num_blocks=810)
        run_one(engine, "cold", tokens)
        assert engine.forget_local()
        request = engine.add(Request("r", tokens))
        answered(engine, request)
        counters = cache.stat()["counters"]
        assert counters["held_bytes"] == counters["bytes_used"] > 6 * 65536
        finish(engine, request)
        assert (request.external, engine.wrong) == (3_200, 0)


def test_what_found_no_room_on_its_way_out_is_stored_while_the_request_still_runs(
    server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ToyEngine(server.url, ONE, save_buffer_mib=1, chunk_tokens=8)
    gate = Gate(engine.client.put)
    monkeypatch.setattr(engine.client, "put", gate)
    request = engine.add(Request("long", prompt(1, 60), outputs=40))
    while request.num_tokens < 80:
        engine.step()
    dropped = engine.workers[0].snapshot()["saves_dropped"]
    assert dropped > 0
    gate.open()
    engine.workers[0].flush(10)
    while request.state == "running":
        engine.step()
        engine.workers[0].flush(10)
    assert entries(engine, request.all_token_ids) == (request.num_tokens // 4, 0)


@pytest.mark.parametrize("room", ["buffer", "step"])
def test_what_is_stored_of_a_request_that_ends_too_soon_has_no_holes(
    server: ServerProcess, room: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ToyEngine(
        server.url, ONE, save_buffer_mib=1, chunk_tokens=8, save_blocks_per_step=1 if room == "step" else 10**6
    )
    gate = Gate(engine.client.put)
    monkeypatch.setattr(engine.client, "put", gate)
    requests = [engine.add(Request(str(seed), prompt(seed, 50), outputs=seed + 1)) for seed in range(3)]
    while requests[0].state != "running" or requests[0].computed < 24:
        engine.step()
    gate.open()
    finish(engine, *requests)
    found = 0
    with mmcache.connect(server.url) as cache:
        for request in requests:
            flags = cache.contains(keys_of(FACTS, request.all_token_ids).for_part(engine.parts.of_group[0][0]))
            assert flags == sorted(flags, reverse=True)
            assert entries(engine, request.all_token_ids)[1] == 0
            found += sum(flags)
    assert 0 < found < 3 * 12 or room == "buffer"


def test_a_gather_that_fails_costs_its_blocks_and_no_buffer(
    server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ToyEngine(server.url, ONE, mover=TorchMover, save_buffer_mib=4)
    monkeypatch.setattr(DeviceBlocks, "gather", lambda *given: 1 / 0)
    for seed in range(4):
        run_one(engine, f"failing {seed}", prompt(seed, 30))
    assert engine.workers[0]._save_buffers.free_share() == 1
    assert engine.workers[0].counters["saves_dropped"] > 0
    monkeypatch.undo()
    run_one(engine, "working", prompt(9, 30))
    engine.close()
    assert run_one(ToyEngine(server.url, ONE), "again", prompt(9, 30)).external == 28


@pytest.mark.parametrize("load_async", [True, False])
def test_loads_that_cannot_be_put_in_order_with_the_engine_are_reported_as_failed(
    server: ServerProcess, monkeypatch: pytest.MonkeyPatch, load_async: bool
) -> None:
    run_one(ToyEngine(server.url, ONE), "cold", prompt(1, 30))
    engine = ToyEngine(server.url, ONE, mover=TorchMover, load_async=load_async)
    monkeypatch.setattr(DeviceBlocks, "mark", lambda *given: 1 / 0)
    run_one(engine, "hit", prompt(1, 30))
    assert engine.wrong == 0
    assert engine.counts["loads_failed"] == 1
