"""Audits by the vLLM connector's sides: a share of hits is computed anew and compared; what differs is dropped."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

import mmcache
from mmcache.config import ServerConfig
from mmcache.server.serve import Server
from mmcache.testing import faults
from mmcache.testing.process import ServerProcess
from mmcache_connectors.vllm.groups import Group
from tests.integration.toy_blocks import Request
from tests.integration.toy_cases import CONFIGURATIONS, ONE, entries, finish, prompt, run_one, spoil, step_until
from tests.integration.toy_engine import ToyEngine, close_all
from tests.integration.toy_memory import FACTS, keys_of

TOKENS = prompt(1, 50)
BAD_BLOCK = 5


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    close_all()


@pytest.fixture
def server() -> Iterator[ServerProcess]:
    with ServerProcess("16MiB") as process:
        yield process


def plant(engine: ToyEngine, tokens: list[int], row: int) -> int:
    """Under the keys of one block other bytes of the right form, header and checksums; how many parts it has."""
    planted = 0
    with mmcache.connect(engine.settings.url) as cache:
        for group, parts in zip(engine.groups, engine.parts.of_group, strict=True):
            shape = engine.memory[0].paged[group.index].shape
            for part in parts:
                key = keys_of(FACTS, tokens).for_part(part)[row]
                assert cache.delete(key) == [True]
                other = np.random.default_rng(planted).integers(0, 256, shape, np.uint8)
                planted += bool(cache.put(key, [other])[0])
    return planted


def counted(engine: ToyEngine) -> Counter[str]:
    return sum((Counter(dict(worker.snapshot())) for worker in engine.workers), Counter())


@pytest.mark.parametrize(("groups", "tp", "load_async"), CONFIGURATIONS)
def test_a_wrong_value_is_found_and_stored_anew(
    server: ServerProcess, groups: list[Group], tp: int, load_async: bool, caplog: pytest.LogCaptureFixture
) -> None:
    run_one(ToyEngine(server.url, groups, tp=tp), "cold", TOKENS)
    probe = ToyEngine(server.url, groups, tp=tp, audit_share=1.0, load_async=load_async)
    planted = plant(probe, TOKENS, BAD_BLOCK)
    assert entries(probe, TOKENS)[1] == planted
    request = run_one(probe, "audit", TOKENS)
    assert (request.external, probe.wrong) == (0, 0)
    found = counted(probe)
    parts = sum(map(len, probe.parts.of_group))
    assert (found["audit_blocks"], found["audit_differences"]) == (12 * parts, planted)
    assert (found["blocks_saved"], found["blocks_present"]) == (planted, 12 * parts - planted)
    assert probe.scheduler.counters["audit_requests"] == 1
    assert entries(probe, TOKENS) == (12 * parts, 0)
    ranks = len(probe.parts.of_group[0])
    assert sum("audit: what is stored under" in line for line in caplog.messages) == ranks
    run_one(probe, "again", TOKENS)
    assert counted(probe)["audit_differences"] == planted
    reader = ToyEngine(server.url, groups, tp=tp, load_async=load_async)
    assert run_one(reader, "after", TOKENS).external == 48
    assert reader.wrong == 0


@pytest.mark.parametrize("load_async", [True, False])
def test_only_what_the_engine_does_not_hold_itself_is_audited(server: ServerProcess, load_async: bool) -> None:
    """In chunks, and with blocks behind the hit, which are stored without a comparison."""
    run_one(ToyEngine(server.url, ONE), "cold", TOKENS)
    probe = ToyEngine(server.url, ONE, audit_share=1.0, load_async=load_async, chunk_tokens=7)
    finish(probe, probe.add(Request("some", TOKENS[:21])))
    before = counted(probe)["audit_blocks"]
    assert before == 5
    longer = probe.add(Request("more", TOKENS + prompt(2, 31)))
    finish(probe, longer)
    assert (longer.local, longer.external) == (20, 0)
    assert counted(probe)["audit_blocks"] - before == 12 - 5
    assert counted(probe)["audit_differences"] == probe.wrong == 0
    assert entries(probe, longer.all_token_ids) == (20, 0)


def test_an_entry_of_another_form_differs(server: ServerProcess) -> None:
    probe = ToyEngine(server.url, ONE, audit_share=1.0)
    run_one(probe, "cold", TOKENS)
    spoil(server.url, probe, TOKENS, BAD_BLOCK)
    run_one(probe, "audit", TOKENS)
    assert (counted(probe)["audit_blocks"], counted(probe)["audit_differences"]) == (12, 1)
    assert entries(probe, TOKENS) == (12, 0)


def test_a_damaged_entry_is_counted_and_stored_anew() -> None:
    """Its bytes no longer match their checksum: that says nothing of what engines compute."""
    server = Server(ServerConfig(listen="127.0.0.1:0", memory_nbytes=16 << 20))
    server.start()
    try:
        assert server.address is not None
        probe = ToyEngine("mmcache://{}:{}".format(*server.address), ONE, audit_share=1.0)
        run_one(probe, "cold", TOKENS)
        damaged = keys_of(FACTS, TOKENS).for_part(probe.parts.of_group[0][0]).digests[BAD_BLOCK]
        faults.flip_bit(server.shard, damaged, 8 * 460)
        run_one(probe, "audit", TOKENS)
        found = counted(probe)
        assert (found["audit_blocks"], found["audit_differences"], found["verify_failures"]) == (11, 0, 1)
        assert entries(probe, TOKENS) == (12, 0)
    finally:
        close_all()
        server.stop()


def test_a_share_of_the_hits_is_audited_and_the_rest_is_used(server: ServerProcess) -> None:
    engine = ToyEngine(server.url, ONE, audit_share=0.25, draw=random.Random(1).random)
    run_one(engine, "cold", TOKENS)
    used = [run_one(engine, f"r{number}", TOKENS).external for number in range(40)]
    assert set(used) == {0, 48}
    assert engine.scheduler.counters["audit_requests"] == used.count(0)
    assert 5 <= used.count(0) <= 15
    assert counted(engine)["audit_blocks"] == 12 * used.count(0)


def test_nothing_is_audited_by_default(server: ServerProcess) -> None:
    engine = ToyEngine(server.url, ONE)
    for name in ("cold", "warm"):
        run_one(engine, name, TOKENS)
    assert not any(name.startswith("audit") for name in [*counted(engine), *+engine.scheduler.counters])


def test_a_request_preempted_during_its_audit_is_compared_once(server: ServerProcess) -> None:
    run_one(ToyEngine(server.url, ONE), "cold", TOKENS)
    probe = ToyEngine(server.url, ONE, audit_share=1.0, chunk_tokens=9)
    request = probe.add(Request("r", TOKENS, outputs=8))
    step_until(probe, lambda: request.computed >= 27, "it runs")
    probe.preempt(request)
    assert probe.forget_local()
    finish(probe, request)
    assert counted(probe)["audit_blocks"] == 12
    assert probe.scheduler.counters["audit_requests"] == 1
    assert probe.wrong == 0
