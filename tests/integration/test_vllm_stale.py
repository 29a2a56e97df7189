"""What an engine's own prefix cache holds may be stale: nothing computed from that is stored, or served to others.

vLLM finds its own blocks by tokens, salt and the adapter's name and path, whatever the weights were, and blocks of a
synchronous load even before they hold anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mmcache.testing.process import ServerProcess
from tests.integration.support import PATIENCE_S
from tests.integration.toy_blocks import Request
from tests.integration.toy_cases import (
    ONE,
    Gate,
    answered,
    entries,
    finish,
    lora,
    prompt,
    run_one,
    spoil,
    step_until,
    train,
)
from tests.integration.toy_engine import ToyEngine, close_all

pytestmark = pytest.mark.alone

PROMPT = prompt(1, 50)
LONGER = PROMPT + prompt(2, 30)


class Patient(ToyEngine):
    """Saves when it is known what was admitted: a request here lasts one step, which a look at files may outlast."""

    def _schedule(self) -> dict[Request, int]:
        scheduled = super()._schedule()
        assert self.scheduler._identify.flush(PATIENCE_S)
        return scheduled


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    close_all()


@pytest.fixture
def server() -> Iterator[ServerProcess]:
    with ServerProcess("16MiB") as process:
        yield process


# ---------------------------------------------------------------------------------------------------- adapters
@pytest.mark.parametrize("load_async", [True, False])
def test_a_retrained_adapter_of_the_same_name_is_not_cached(
    server: ServerProcess, tmp_path: Path, load_async: bool
) -> None:
    """The engine answers the second with the first one's blocks; what it makes of them stays with it."""
    engine = Patient(server.url, ONE, load_async=load_async)
    old = train(tmp_path / "sql", 1)
    run_one(engine, "old", PROMPT, lora_request=lora(tmp_path / "sql", 1))
    assert entries(engine, PROMPT, adapter=old) == (12, 0)
    new = train(tmp_path / "sql", 2)
    stale = engine.add(Request("new", LONGER, lora_request=lora(tmp_path / "sql", 2)))
    finish(engine, stale)
    assert stale.local == 48
    assert engine.wrong == 1  # the engine's own mistake, which the check below would find in the cache
    run_one(engine, "fresh prompt, new id", prompt(3, 50), lora_request=lora(tmp_path / "sql", 2))
    run_one(engine, "fresh prompt, old id", prompt(4, 50), lora_request=lora(tmp_path / "sql", 1))
    for tokens in (LONGER, prompt(3, 50), prompt(4, 50)):
        assert entries(engine, tokens, adapter=new) == (0, 0)
    assert entries(engine, LONGER, adapter=old) == (12, 0)
    assert entries(engine, prompt(4, 50), adapter=old) == (0, 0)
    other = Patient(server.url, ONE, load_async=load_async)
    assert run_one(other, "new", LONGER, lora_request=lora(tmp_path / "sql", 1)).external == 0
    assert run_one(other, "new again", LONGER, lora_request=lora(tmp_path / "sql", 1)).external == 76
    assert entries(other, LONGER, adapter=new) == (20, 0)
    assert other.wrong == 0


def test_another_name_for_the_retrained_adapter_is_cached(server: ServerProcess, tmp_path: Path) -> None:
    engine = Patient(server.url, ONE)
    train(tmp_path / "sql", 1)
    run_one(engine, "old", PROMPT, lora_request=lora(tmp_path / "sql", 1))
    new = train(tmp_path / "sql-2", 2)
    request = engine.add(Request("new", PROMPT, lora_request=lora(tmp_path / "sql-2", 2, "sql-2")))
    finish(engine, request)
    assert (request.local, request.external) == (0, 0)
    assert entries(engine, PROMPT, adapter=new) == (12, 0)
    assert run_one(engine, "base", PROMPT).external == 0
    assert engine.wrong == 0


def test_an_adapter_rewritten_between_arrival_and_run_is_not_stored(server: ServerProcess, tmp_path: Path) -> None:
    engine = Patient(server.url, ONE)
    old = train(tmp_path / "sql", 1)
    request = engine.add(Request("r", PROMPT, lora_request=lora(tmp_path / "sql", 1)))
    answered(engine, request)
    new = train(tmp_path / "sql", 2)
    finish(engine, request)
    assert engine.wrong == 0
    assert entries(engine, PROMPT, adapter=old) == (0, 0)
    assert entries(engine, PROMPT, adapter=new) == (0, 0)


# ---------------------------------------------------------------------------------------------------- failed loads
@pytest.fixture
def failing(server: ServerProcess) -> Iterator[ToyEngine]:
    """A fresh engine that loads synchronously, and a cache whose sixth block of PROMPT cannot be loaded."""
    run_one(ToyEngine(server.url, ONE), "cold", PROMPT)
    engine = ToyEngine(server.url, ONE, load_async=False, chunk_tokens=7)
    spoil(server.url, engine, PROMPT, 5)
    yield engine
    assert engine.wrong == 0
    assert engine.counts["loads_failed"] >= 1
    assert entries(engine, PROMPT) == (12, 0)


def failed(engine: ToyEngine, name: str) -> Request:
    """A request that runs, and whose load has failed in the last step."""
    request = engine.add(Request(name, PROMPT))
    answered(engine, request)
    engine.step()
    assert request.state == "running"
    assert (request.external, request.computed) == (48, 20)
    return request


def test_a_request_aborted_after_its_load_failed_leaves_nothing_behind(failing: ToyEngine) -> None:
    failing.end(failed(failing, "aborted"))
    after = failing.add(Request("after", PROMPT))
    finish(failing, after)
    assert after.local == 20  # what was loaded is right, and stays


def test_a_request_preempted_after_its_load_failed_leaves_nothing_behind(failing: ToyEngine) -> None:
    request = failed(failing, "preempted")
    failing.preempt(request)
    other = failing.add(Request("other", LONGER))
    finish(failing, request, other)


def test_a_request_that_shares_a_failed_load_waits(failing: ToyEngine) -> None:
    """vLLM would let it compute on blocks that another request only computes again, seven tokens a step."""
    first, second = (failing.add(Request(name, PROMPT)) for name in ("first", "second"))
    third = failing.add(Request("third", LONGER))
    answered(failing, first, second, third)
    failing.step()
    assert first.state == "running"
    assert first.computed == 20
    finish(failing, first, second, third)


def test_a_failed_load_leaves_no_holes_in_what_is_stored_of_others(failing: ToyEngine) -> None:
    other = failing.add(Request("other", prompt(7, 60)))
    step_until(failing, lambda: other.computed == 21, "it runs")
    finish(failing, failed(failing, "fails"), other)
    assert entries(failing, other.all_token_ids) == (15, 0)


# ---------------------------------------------------------------------------------------------------- new weights
def test_new_weights_find_nothing_of_the_old(server: ServerProcess) -> None:
    engine = ToyEngine(server.url, ONE)
    run_one(engine, "old weights", PROMPT)
    waiting = engine.add(Request("asked before, run after", PROMPT))
    answered(engine, waiting)
    assert engine.reset(weights=1)
    finish(engine, waiting)
    assert waiting.external == 0
    assert entries(engine, PROMPT, epoch=1) == (0, 0)
    assert run_one(engine, "new weights", PROMPT).external == 0
    assert run_one(engine, "new weights again", PROMPT).external == 48
    assert engine.wrong == 0
    assert entries(engine, PROMPT) == entries(engine, PROMPT, epoch=1) == (12, 0)


@pytest.mark.parametrize("busy", ["running", "loading"])
def test_nothing_is_cached_after_a_reset_that_leaves_old_blocks(
    server: ServerProcess, busy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM refuses to empty its prefix cache then, and goes on hitting what the old weights computed."""
    engine = ToyEngine(server.url, ONE, chunk_tokens=9)
    run_one(engine, "cold", PROMPT)
    gate = Gate(engine.client.get_into)
    if busy == "loading":
        assert engine.forget_local()
        monkeypatch.setattr(engine.client, "get_into", gate)
    request = engine.add(Request("busy", LONGER, outputs=8))
    step_until(engine, lambda: request.state == busy, f"it is {busy}")
    assert not engine.reset(weights=1)
    gate.open()
    hit = engine.add(Request("hits the old blocks", PROMPT + prompt(5, 9)))
    finish(engine, request, hit)
    assert engine.wrong > 0  # the engine's own
    finish(engine, *(engine.add(Request(f"r{seed}", prompt(seed, 40))) for seed in (6, 7)))
    for tokens in (request.all_token_ids, hit.all_token_ids, prompt(6, 40), prompt(7, 40)):
        assert entries(engine, tokens, epoch=1) == (0, 0)
        assert entries(engine, tokens)[1] == 0
    engine.wrong = 0
    assert engine.reset(weights=1)
    assert run_one(engine, "clean", LONGER).external == 0
    assert run_one(engine, "clean again", LONGER).external == 76
    assert entries(engine, LONGER, epoch=2) == (20, 0)
    assert engine.wrong == 0


def test_a_reset_that_preempts_what_runs_is_clean(server: ServerProcess) -> None:
    engine = ToyEngine(server.url, ONE, chunk_tokens=9)
    requests = [engine.add(Request(f"r{seed}", prompt(seed, 50), outputs=20)) for seed in range(3)]
    step_until(engine, lambda: bool(engine.running), "they run")
    assert engine.reset(weights=1, preempting=True)
    finish(engine, *requests)
    assert engine.wrong == 0
    for request in requests:
        assert entries(engine, request.all_token_ids)[1] == 0
        assert entries(engine, request.all_token_ids, epoch=1) == (0, 0)
    assert run_one(engine, "after", PROMPT).external == 0
    assert run_one(engine, "again", PROMPT).external == 48
