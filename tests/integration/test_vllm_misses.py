"""What a vLLM response says of the cache: tokens loaded, and the real reason why the rest was not there."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mmcache
from mmcache.errors import ConfigError
from mmcache.explain import Recorded, parse
from mmcache.testing.process import ServerProcess
from mmcache_connectors.vllm import misses
from mmcache_connectors.vllm.groups import Group
from tests.integration.support import eventually, suspend
from tests.integration.toy_blocks import Request
from tests.integration.toy_cases import (
    CONFIGURATIONS,
    ONE,
    Gate,
    answered,
    finish,
    prompt,
    run_one,
    spoil,
    step_until,
)
from tests.integration.toy_engine import ToyEngine, close_all
from tests.integration.toy_memory import BLOCK, FACTS, keys_of

TOKENS = prompt(1, 50)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    close_all()


@pytest.fixture
def server() -> Iterator[ServerProcess]:
    with ServerProcess("16MiB") as process:
        yield process


def told(engine: ToyEngine, name: str, tokens: list[int], **more: Any) -> dict[str, Any]:
    """What is said of a request that ends after everything about it is known."""
    assert engine.forget_local()
    assert engine.scheduler._misses.flush(10)  # or what earlier requests ask leaves no room for its question
    request = engine.add(Request(name, tokens, **more))
    answered(engine, request)
    assert engine.scheduler._misses.flush(10)
    finish(engine, request)
    assert set(request.told) == {"mmcache"}
    said: dict[str, Any] = request.told["mmcache"]
    if "missed" in said:
        said["missed"].pop("ago_s", None)
    return said


def missed(tokens: int, reason: str, cached: int = 0) -> dict[str, Any]:
    return {"cached_tokens": cached, "missed": {"tokens": tokens, "reason": reason}}


NEVER = "never stored, or so long ago that it is forgotten"


@pytest.mark.parametrize(("groups", "tp", "load_async"), CONFIGURATIONS)
def test_hits_and_what_is_new(server: ServerProcess, groups: list[Group], tp: int, load_async: bool) -> None:
    engine = ToyEngine(server.url, groups, tp=tp, load_async=load_async)
    assert told(engine, "cold", TOKENS) == missed(48, NEVER)
    assert told(engine, "warm", TOKENS) == {"cached_tokens": 48}
    assert told(engine, "longer", TOKENS[:30] + prompt(2, 23)) == missed(24, NEVER, 28)
    assert told(engine, "one block less", TOKENS[:49], outputs=20) == {"cached_tokens": 48}
    counters = engine.scheduler.counters
    assert counters["hit_tokens_shared_memory"] + counters["hit_tokens_network"] == 48 + 28 + 48
    again = engine.add(Request("held by the engine", TOKENS))
    finish(engine, again)
    assert again.told == {"mmcache": {"cached_tokens": 0}}


def test_what_the_server_remembers(server: ServerProcess) -> None:
    engine = ToyEngine(server.url, ONE)
    run_one(engine, "cold", TOKENS)
    with mmcache.connect(server.url) as cache:
        cache.delete(keys_of(FACTS, TOKENS)[3])
    request = engine.add(Request("deleted", TOKENS))
    assert engine.forget_local()
    answered(engine, request)
    assert engine.scheduler._misses.flush(10)
    finish(engine, request)
    reason = request.told["mmcache"]["missed"]
    assert 0 <= reason.pop("ago_s") < 60
    assert request.told["mmcache"] == missed(36, "deleted by a client", 12)


def test_what_was_evicted() -> None:
    with ServerProcess("1MiB") as small, mmcache.connect(small.url) as cache:
        engine = ToyEngine(small.url, ONE)
        run_one(engine, "cold", TOKENS)
        fillers = iter(range(10, 200))
        while all(cache.contains(keys_of(FACTS, TOKENS))):
            run_one(engine, "filler", prompt(next(fillers), 50))
        assert told(engine, "warm", TOKENS)["missed"]["reason"] == "evicted to make room"


def test_reasons_that_no_server_is_asked_for(server: ServerProcess) -> None:
    engine = ToyEngine(server.url, ONE, audit_share=1.0)
    engine.known = False
    assert told(engine, "early", TOKENS) == missed(48, misses.UNIDENTIFIED)
    engine.known = True
    run_one(engine, "cold", TOKENS)
    assert told(engine, "audit", TOKENS) == missed(48, misses.AUDIT)
    assert told(engine, "unread", TOKENS, skip_reading_prefix_cache=True) == missed(48, misses.NOT_WANTED)


def test_what_is_not_asked(server: ServerProcess) -> None:
    engine = ToyEngine(server.url, ONE, explain_misses=False)
    assert told(engine, "cold", TOKENS) == missed(48, misses.NOT_ASKED)
    assert told(engine, "warm", TOKENS) == {"cached_tokens": 48}


@pytest.mark.parametrize("load_async", [True, False])
def test_a_load_that_failed(server: ServerProcess, load_async: bool) -> None:
    engine = ToyEngine(server.url, ONE, load_async=load_async)
    run_one(engine, "cold", TOKENS)
    spoil(server.url, engine, TOKENS, 5)
    assert told(engine, "fails", TOKENS) == missed(48, misses.LOAD_FAILED)


def test_a_cache_that_is_gone_or_stopped(server: ServerProcess) -> None:
    engine = ToyEngine(server.url, ONE, deadline_s=0.4)
    run_one(engine, "cold", TOKENS)
    suspend(server.pid)
    slow = engine.add(Request("slow", TOKENS))
    assert engine.forget_local()
    engine.run(slow)
    assert slow.told["mmcache"] in (missed(48, misses.TOO_SLOW), missed(48, misses.NO_ANSWER))
    os.kill(server.pid, signal.SIGCONT)
    server.stop(signal.SIGKILL)
    eventually(lambda: told(engine, "gone", TOKENS) == missed(48, misses.NO_ANSWER), "it is known to be gone")


def test_the_reason_stays_that_of_the_first_run(server: ServerProcess) -> None:
    """What a request finds after a preemption, mostly its own blocks, says nothing of why it missed."""
    engine = ToyEngine(server.url, ONE)
    request = engine.add(Request("preempted", TOKENS, outputs=8))
    answered(engine, request)
    assert engine.scheduler._misses.flush(10)
    step_until(engine, lambda: request.computed >= 50, "it runs")
    engine.preempt(request)
    assert engine.workers[0].flush(10)
    assert engine.forget_local()
    finish(engine, request)
    assert request.external == 48
    assert request.told == {"mmcache": missed(48, NEVER)}


def test_the_reason_is_that_of_a_block_the_engine_lacks_as_well(server: ServerProcess) -> None:
    """Of two, the one that is gone from the cache but not from the engine is no reason, unless the other is stored."""
    engine, other = ToyEngine(server.url, ONE), ToyEngine(server.url, ONE)
    run_one(engine, "cold", TOKENS)
    run_one(other, "five blocks", TOKENS[:21])
    for one, tokens, reason in (
        (engine, TOKENS[:48] + prompt(2, 10), NEVER),
        (other, TOKENS, "deleted by a client"),
    ):
        with mmcache.connect(server.url) as cache:
            cache.delete(keys_of(FACTS, TOKENS)[3])
        request = one.add(Request("more", tokens))
        local = len(one._local_hit(request)[0]) * BLOCK
        eventually(lambda: one.scheduler.matched(request, local)[0] is not None, "it is looked up")  # noqa: B023
        one.scheduler.take_loads()
        assert one.scheduler._misses.flush(10)
        finish(one, request)
        assert request.local == local > 12
        assert request.told["mmcache"]["missed"]["reason"] == reason


def test_what_is_stored_meanwhile_and_what_a_reset_kept_from_the_cache(
    server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ToyEngine(server.url, ONE)
    gate = Gate(engine.lookup_client.ask)
    monkeypatch.setattr(engine.lookup_client, "ask", gate)
    early = engine.add(Request("early", TOKENS))
    answered(engine, early)
    run_one(ToyEngine(server.url, ONE), "another engine's", TOKENS)
    gate.open()
    assert engine.scheduler._misses.flush(10)
    finish(engine, early)
    assert early.told == {"mmcache": missed(48, misses.STORED_SINCE)}
    waiting = engine.add(Request("waiting", TOKENS))
    answered(engine, waiting)
    assert engine.reset()
    finish(engine, waiting)
    assert waiting.told == {"mmcache": missed(48, misses.RESET)}


def test_a_hit_that_the_engine_did_not_take(server: ServerProcess) -> None:
    """As under vLLM's MultiConnector, where another connector's tokens may come first."""
    engine = ToyEngine(server.url, ONE)
    run_one(engine, "cold", TOKENS)
    request = engine.add(Request("warm", TOKENS))
    assert engine.forget_local()
    answered(engine, request)
    engine.scheduler.allocated(request, [list(range(1, 14))], 0)
    engine.end(request)
    assert request.told == {"mmcache": missed(48, misses.NOT_TAKEN)}


def test_nobody_waits_for_a_reason(server: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do more questions wait than a few."""
    engine = ToyEngine(server.url, ONE, num_blocks=600)
    gate = Gate(engine.lookup_client.ask)
    monkeypatch.setattr(engine.lookup_client, "ask", gate)
    requests = [engine.add(Request(f"r{seed}", prompt(seed, 50))) for seed in range(20)]
    answered(engine, *requests)
    finish(engine, *requests)
    gate.open()
    reasons = [request.told["mmcache"]["missed"]["reason"] for request in requests]
    assert set(reasons) == {misses.NOT_KNOWN_YET, misses.NOT_ASKED}
    assert reasons.count(misses.NOT_KNOWN_YET) in (misses.MAX_WAITING, misses.MAX_WAITING + 1)


def test_a_request_that_never_ran_says_nothing(server: ServerProcess) -> None:
    engine = ToyEngine(server.url, ONE)
    request = engine.add(Request("aborted", TOKENS))
    engine.end(request)
    assert request.told is None


# ---------------------------------------------------------------------------------------------------- written down
def test_requests_that_missed_can_be_explained_later(server: ServerProcess, tmp_path: Path) -> None:
    folder = tmp_path / "misses"
    engine = ToyEngine(server.url, ONE, record_misses=str(folder), explain_misses=False)
    run_one(engine, "a/../b", TOKENS, cache_salt="a")
    run_one(engine, "warm", TOKENS, cache_salt="a")
    other = TOKENS[:30] + prompt(2, 20)
    run_one(engine, "other", other, cache_salt="a")
    assert engine.scheduler._misses.flush(10)
    cold, later = sorted(folder.iterdir())
    assert (cold.name[-12:], later.name[-11:]) == ("-a_.._b.json", "-other.json")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(one.stat().st_mode) for one in (cold, later)} == {0o600}
    record = parse(later.read_text())
    assert record.token_ids == other
    assert list(record.keys().digests) == list(keys_of(FACTS, other, "a").digests)
    command = [sys.executable, "-m", "mmcache", "explain", "--connect", server.url, "--request", str(later)]
    said = subprocess.run([*command, "--against", str(cold)], check=False, capture_output=True, text=True)
    assert "first differing block: 7, at token 30" in said.stdout, said


def test_the_folder_keeps_the_last_requests_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(misses, "MAX_RECORDS", 3)
    monkeypatch.setattr(misses, "MAX_RECORD_TOKENS", 100)
    other = tmp_path / "not-ours.json"
    other.write_text("")
    namespace = mmcache.Namespace(kind="kv", layout="L", block_size=4, **FACTS)
    for start in (0, 4):  # a second engine takes over what the first one left
        recorder = misses.Recorder(str(tmp_path))
        for number in range(start, start + 4):
            recorder.write(f"r{number}", Recorded(namespace, list(range(number))))
        recorder.write("long", Recorded(namespace, list(range(101))))
    assert [one.name.rsplit("-", 1)[1] for one in sorted(tmp_path.iterdir()) if one != other] == [
        f"r{number}.json" for number in (5, 6, 7)
    ]
    assert other.exists()


def test_a_folder_that_cannot_be_written_costs_one_line(
    server: ServerProcess, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "misses"
    engine = ToyEngine(server.url, ONE, record_misses=str(folder))
    folder.rmdir()
    for seed in range(3):
        assert told(engine, f"r{seed}", prompt(seed, 50)) == missed(48, NEVER)
    assert sum("not written down" in line for line in caplog.messages) == 1
    with pytest.raises(ConfigError, match="no folder to write to"):
        misses.Recorder(__file__)
