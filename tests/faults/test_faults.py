"""What the suite checks can fail: a wrong byte, a lease kept, a late call, a dead client are each reported.

The suite itself is run by continuous integration (`make faults`), not here.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mmcache
from mmcache.testing.process import ServerProcess, suspend
from mmcache.testing.values import eventually
from tests.faults.check.found import Happened, Run, may_yet_be_back, violations
from tests.faults.check.held import open_of, what_is_held
from tests.faults.report.page import page
from tests.faults.report.summary import summary
from tests.faults.traffic.client import PICTURES
from tests.faults.traffic.processes import Clients
from tests.faults.traffic.records import CALL, OPS, Recorder, read_calls, read_troubles
from tests.faults.traffic.values import PICTURE_NBYTES, Values, is_right, value_of

DEADLINE_S = 1.0
BUSY_S = 30.0


def a_call(began_s: float, took_s: float, waited_s: float = 0.0, *, asked: int = 0, hits: int = 0) -> Any:
    return np.array([(began_s, took_s, waited_s, OPS.index("get_into"), asked, hits, hits)], CALL)


def a_run(*calls: Any, **changes: Any) -> Run:
    """One in which all is well: of one client, that has a hit before and after, and these calls besides."""
    good = [a_call(5.0, 0.01, asked=10, hits=10), a_call(95.0, 0.01, asked=10, hits=10)]
    run = Run(
        seed=1,
        deadline_s=DEADLINE_S,
        began_s=0.0,
        trouble_s=10.0,
        healed_s=80.0,
        quiet_s=90.0,
        ended_s=100.0,
        happened=[],
        lanes=["s0", "redis", "c0"],
        populations={"c0": "r1"},
        calls={"c0-0": np.concatenate([*good, *calls])},
        troubles={"c0-0": []},
        lives=[{"stem": "c0-0", "code": 0, "killed": False, "told": {}, "said": ""}],
        naps=np.array([[50.0, 0.003, 0]]),
        left_out={},
    )
    return replace(run, **changes)


def found(run: Run) -> list[str]:
    return [one.what for one in violations(run)]


class Asked:
    """A server as the checks see it."""

    def __init__(self, server: ServerProcess) -> None:
        self.pid, self._url = server.pid, server.url

    def stat(self) -> dict[str, Any]:
        with mmcache.connect(self._url) as cache:
            return cache.stat()


@contextlib.contextmanager
def one_client(url: str, folder: Path) -> Iterator[Clients]:
    with Clients({"c0": (url, "r1")}, 1, folder) as clients:
        eventually(lambda: len(read_calls(folder / "c0-0.calls")) > 20, "the client is at work")
        yield clients


def run_of(clients: Clients, folder: Path, **changes: Any) -> Run:
    """What its one client saw. Unless that is said, none of its calls is late: a busy machine's are."""
    (life,) = clients.lives
    lived = {"stem": "c0-0", "code": life.code, "killed": life.killed, "told": life.told, "said": life.said}
    calls, troubles = read_calls(folder / "c0-0.calls"), read_troubles(folder / "c0-0.troubles")
    changes = {"deadline_s": BUSY_S} | changes
    return a_run(calls={"c0-0": calls}, troubles={"c0-0": troubles}, lives=[lived], **changes)


def quiet(run: Run) -> list[str]:
    """What was found but for hit rates: these runs have no quiet times."""
    return [what for what in found(run) if what != "not back"]


# ------------------------------------------------------------------------------------------- real processes
def test_wrong_bytes_that_reach_a_client_are_reported(tmp_path: Path) -> None:
    with ServerProcess("256MiB") as server:
        with mmcache.connect(server.url) as other:
            for number in range(PICTURES):
                keys = Values("r1").picture(number)
                value = value_of(keys.digests[0], PICTURE_NBYTES)
                value[-1] ^= 1
                assert all(other.put(keys, [value]))
        with one_client(server.url, tmp_path) as clients:
            eventually(lambda: read_troubles(tmp_path / "c0-0.troubles"), "a wrong value was read")
            clients.end()
        assert set(quiet(run_of(clients, tmp_path))) == {"wrong"}


def test_a_client_that_does_nothing_wrong_is_not_blamed(tmp_path: Path) -> None:
    with ServerProcess("256MiB") as server:
        before = open_of(server.pid)
        with one_client(server.url, tmp_path) as clients:
            eventually(lambda: len(read_calls(tmp_path / "c0-0.calls")) > 200, "calls of every kind were made")
            clients.end()
        held = {"s0": what_is_held(Asked(server), before, 10.0)}
        run = run_of(clients, tmp_path, held=held)
        assert clients.lives[0].told["counters"]["hits"] > 0
        assert quiet(run) == []
        assert {OPS[op] for op in run.calls["c0-0"]["op"]} == set(OPS)


def test_a_lease_that_is_kept_and_a_connection_that_stays_are_reported() -> None:
    with ServerProcess("64MiB") as server:
        before = open_of(server.pid)
        keys = Values("r1").picture(0)
        with mmcache.connect(server.url) as cache:
            assert all(cache.put(keys, [value_of(keys.digests[0], PICTURE_NBYTES)]))
            leased = cache.acquire(keys)
            held = what_is_held(Asked(server), before, 0.5)
            assert leased.release()
        assert set(held["counters"]) == {"leases", "held_bytes"}
        assert set(held["more"]) == {"descriptors", "threads"}
        assert found(a_run(held={"s0": held})) == ["leaked"] * 4
        held = what_is_held(Asked(server), before, 10.0)
        assert found(a_run(held={"s0": held})) == []


def test_a_client_that_dies_of_itself_is_reported(tmp_path: Path) -> None:
    with ServerProcess("256MiB") as server, one_client(server.url, tmp_path) as clients:
        os.kill(clients.pid("c0"), signal.SIGKILL)
        clients.end()
        assert quiet(run_of(clients, tmp_path)) == ["died"]


@pytest.mark.alone
def test_a_call_later_than_the_deadline_allows_is_reported(tmp_path: Path) -> None:
    with ServerProcess("256MiB") as server:
        with one_client(f"{server.url}?deadline_s=3", tmp_path) as clients:
            suspend(server.pid)
            try:
                eventually(lambda: read_calls(tmp_path / "c0-0.calls")["took_s"].max() > 1.5, "a call took long")
            finally:
                os.kill(server.pid, signal.SIGCONT)
            clients.end()
        assert "late" in quiet(run_of(clients, tmp_path, deadline_s=DEADLINE_S))


# ------------------------------------------------------------------------------------------- what was seen, judged
def test_a_run_in_which_all_is_well_has_no_violation() -> None:
    assert found(a_run(a_call(50.0, DEADLINE_S + 0.09))) == []


def test_a_call_is_late_only_by_its_own_time() -> None:
    assert found(a_run(a_call(50.0, DEADLINE_S + 0.2))) == ["late"]
    assert found(a_run(a_call(50.0, DEADLINE_S + 0.2, 0.15))) == []
    assert found(a_run(a_call(50.0, DEADLINE_S + 0.2, 0.05))) == ["late"]
    stopped = [Happened("stop client", "c0", 50.5, 55.0, 55.0)]
    assert found(a_run(a_call(50.0, 5.0), happened=stopped)) == []
    assert found(a_run(a_call(50.0, 6.0), happened=stopped)) == ["late"]
    assert found(a_run(a_call(30.0, 5.0), happened=stopped)) == ["late"]
    others = [Happened("stop client", "c1", 50.5, 55.0, 55.0), Happened("stop", "c0", 50.5, 55.0, 55.0)]
    assert found(a_run(a_call(50.0, 5.0), happened=others)) == ["late"]


def test_a_machine_that_stood_still_is_no_lateness() -> None:
    naps = np.array([[49.9, 0.003, 0], [50.0, 0.003, 0], [51.1, 0.15, 0], [51.3, 0.04, 0], [70.0, 0.3, 0]])
    assert found(a_run(a_call(50.0, DEADLINE_S + 0.24), naps=naps)) == []
    assert found(a_run(a_call(50.0, DEADLINE_S + 0.26), naps=naps)) == ["late"]
    assert found(a_run(a_call(60.0, DEADLINE_S + 0.2), naps=naps)) == ["late"]
    assert found(a_run(a_call(70.33, DEADLINE_S + 0.2), naps=naps)) == ["late"]  # hardly any of that stop was its own
    assert found(a_run(a_call(50.0, DEADLINE_S + 0.26, 0.15), naps=naps)) == ["late"]  # one wait is not taken off twice
    one_cpu = np.array([[51.1, 0.15, 1], [50.0, 0.003, 0]])
    assert found(a_run(a_call(50.0, DEADLINE_S + 0.24), naps=one_cpu)) == []
    both = np.array([[51.1, 0.15, 0], [51.1, 0.12, 1]])
    assert found(a_run(a_call(50.0, DEADLINE_S + 0.26), naps=both)) == ["late"]  # nor one stop of both CPUs


def test_lateness_by_the_clock_is_told_beside_it() -> None:
    told = summary(a_run(a_call(50.0, DEADLINE_S + 0.2, 0.15)), "command")["lateness"]
    assert (told["worst_ms"], told["worst_own_ms"]) == (200.0, 50.0)
    assert (told["past_bar"], told["past_bar_own"]) == (1, 0)
    assert told["nap_worst_ms"] == 3.0


def test_a_hit_rate_that_does_not_return_is_reported() -> None:
    assert found(a_run(a_call(94.0, 0.01, asked=1), a_call(96.0, 0.01, asked=1))) == ["not back"]
    once = a_run(a_call(82.0, 0.01, asked=10, hits=10), a_call(94.0, 0.01, asked=1), a_call(96.0, 0.01, asked=1))
    assert found(once) == []
    assert summary(once, "command")["hit_rates"]["r1"]["back_s"] == 0.0
    assert found(a_run(a_call(50.0, 0.01, asked=1000, hits=0))) == []
    assert found(a_run(calls={"c0-0": a_call(5.0, 0.01, asked=10, hits=10)})) == ["not back"]


def test_it_is_waited_for_where_the_machine_has_stood_still() -> None:
    missed = (a_call(94.0, 0.01, asked=1), a_call(96.0, 0.01, asked=1))
    for stop, waited in (([80.0, 0.6, 0], True), ([80.0, 0.4, 0], False), ([70.0, 0.6, 0], False)):
        assert may_yet_be_back(a_run(*missed, naps=np.array([stop])), 12.0) == waited
        assert not may_yet_be_back(a_run(naps=np.array([stop])), 12.0), "it is back"


def test_other_things_that_may_not_be_are_reported() -> None:
    trouble = {"at_s": 20.0, "what": "raised", "detail": "get_into: KeyError()"}
    assert found(a_run(troubles={"c0-0": [trouble]})) == ["raised"]
    assert found(a_run(happened=[Happened("kill", "s0", 20.0, 21.0, 51.0, "it never answered")])) == ["not healed"]
    assert found(a_run(servers={"s0": {"codes": [0, -11], "said": ["fine"]}})) == ["died"]
    assert found(a_run(servers={"s0": {"codes": [], "said": ["Traceback (most recent call last):\nKeyError"]}})) == [
        "raised"
    ]
    held = {"counters": {}, "more": {}, "entries": 0, "silent": True}
    assert found(a_run(held={"s0": held})) == ["silent"]
    told = {"before": {"descriptors": 9, "threads": 2}, "after": {"descriptors": 10, "threads": 2}}
    life = {"stem": "c0-0", "code": 0, "killed": False, "told": told, "said": ""}
    assert found(a_run(lives=[life])) == ["leaked"]


def test_one_flipped_bit_anywhere_is_seen() -> None:
    digest = bytes(range(32))
    value = value_of(digest, 5000)
    assert is_right(digest, value)
    for place in (0, 31, 32, 4999):
        value[place] ^= 1
        assert not is_right(digest, value)
        value[place] ^= 1
    assert not is_right(bytes(32), value)


def test_a_row_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    with Recorder(tmp_path, "c0-0") as recorder:
        for _ in range(3):
            recorder.call("put", (1.0, 2.0, 0.0), (1, 1, 1))
        recorder.trouble("wrong", "a key")
    file = tmp_path / "c0-0.calls"
    file.write_bytes(file.read_bytes()[:-1])
    assert len(read_calls(file)) == 2
    assert [one["what"] for one in read_troubles(tmp_path / "c0-0.troubles")] == ["wrong"]


def test_the_page_marks_violations_and_fetches_nothing() -> None:
    happened = [Happened("stop", "s0", 20.0, 26.0, 26.5), Happened("kill redis", "redis", 30.0, 31.0, 31.1)]
    good = summary(a_run(happened=happened), "command")
    bad = summary(a_run(a_call(50.0, 2.0), happened=happened), "command")
    assert json.loads(json.dumps(bad)) == bad
    assert "NOT as it must be: 1 late" in page(bad)
    assert page(bad).count("<g><title>late: get_into took 2.000 s") == 1
    assert "may not happen happened" in page(good)
    assert "stop s0: 20.0 to 26.5 s" in page(good)
    assert "://" not in page(good)
