"""The parts of `make bench-peers` that decide: figures from samples, the verdict, the table, the page, the words."""

from __future__ import annotations

import json
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks.peers.__main__ import parse
from benchmarks.peers.adapters.base import Client, reused
from benchmarks.peers.adapters.mmcache import OtherKey
from benchmarks.peers.install import REQUIREMENTS, WITH_TORCH, PeerError, install
from benchmarks.peers.page import peers_page
from benchmarks.peers.plan import FULL, OPS, QUICK, Case, Plan, Row, Sample, name_of, readers_of, row_of
from benchmarks.peers.registry import CONTROLS, PEERS
from benchmarks.peers.report import Report, figure, markdown, table
from benchmarks.peers.team import Source

CASES = (Case(1 << 16, 1, 4), Case(1 << 20, 8, 1))
PLAN = Plan(3, 5, CASES)
HOST = {"cpu": "a <b>processor</b>", "cores": 2}


def row(peer: str, op: str, case: Case, clients: int, wrong: int = 0) -> Row:
    samples = [Sample(case.nbytes, 900, 1000, 2000, (500, 700), wrong, case.count) for _ in range(15)]
    return row_of(peer, PEERS[peer].verified, op, case, clients, samples)


def report(
    *peers: str, wrong: str = "", caught: tuple[str, ...] = CONTROLS, failed: dict[str, str] | None = None
) -> Report:
    rows = [
        row(peer, op, case, clients, case.count if op == "get" and peer in (wrong, *caught) else 0)
        for peer in (*peers, *CONTROLS)
        if peer not in (failed or {})
        for op in OPS
        for case in CASES
        for clients in PLAN.clients
    ]
    return Report(rows, failed or {}, PLAN, 0, 12.0)


def test_a_row_has_the_median_and_quartiles_of_the_pairs_own_ratios() -> None:
    samples = [Sample(1000, 400, 100 * k, 1000, (k * 1000,), 0, 1) for k in range(1, 6)]
    found = row_of("redis-tcp", False, "get", CASES[0], 1, samples)
    assert (found.ratio_q1, found.ratio, found.ratio_q3) == (0.2, 0.3, 0.4)
    assert (found.gbps, found.memcpy_gbps, found.memcpy_whole_gbps) == (1.0, 3.333, 2.5)
    assert (found.p50_us, found.pairs, found.compared) == (3.0, 5, 5)


@pytest.mark.parametrize("plan", [FULL, QUICK])
def test_every_case_has_a_neighbour_for_the_control_and_fits_its_client(plan: Plan) -> None:
    assert all(case.count % 2 == 0 and case.nbytes <= plan.client_nbytes for case in plan.cases)
    assert FULL.turns * FULL.pairs >= 15


@pytest.mark.parametrize("clients", [1, 2, 4])
def test_another_process_reads_unless_memory_is_its_own(clients: int) -> None:
    readers = readers_of(clients, alone=False)
    assert len(set(readers)) == clients
    assert all(reader != writer for writer, reader in enumerate(readers))
    assert readers_of(clients, alone=True) == list(range(clients))


@pytest.mark.parametrize(("ratio", "text"), [(1.234, "1.23"), (0.1, "0.10"), (0.0994, "0.099"), (0.004, "0.004")])
def test_a_slow_peer_keeps_its_digits(ratio: float, text: str) -> None:
    assert figure(ratio) == text


def test_names_are_never_used_twice_unless_a_peer_cannot_delete() -> None:
    rounds = [(turn, pair) for turn in range(2) for pair in range(3)]
    names = [name_of(case, *at, client, 0) for case in CASES for client in range(2) for at in rounds]
    assert len(set(names)) == len(names)
    assert len({reused(name) for name in names}) == 4


def test_no_two_values_of_any_rounds_are_equal(tmp_path: Path) -> None:
    case = Case(4096, 1, 4)
    source = Source(str(tmp_path / "source"), case.nbytes, 2, 0)
    seen = set()
    for _ in range(3):
        source.stamp(case, 2)
        data = (tmp_path / "source").read_bytes()
        seen |= {data[at : at + 4096] for at in range(0, len(data), 4096)}
    assert len(seen) == 3 * 8


def test_a_report_is_believed_only_with_both_controls_caught() -> None:
    assert report("redis-tcp").ok
    assert report("redis-tcp", failed={"ray": "no"}).ok
    for control in CONTROLS:
        others = tuple(name for name in CONTROLS if name != control)
        assert report("redis-tcp", caught=others).complaints() == [f"{control} was caught in 0 of 4 cases only"]
        assert report(failed={control: "no memory"}).complaints() == [f"{control} did not run: no memory"]


def test_wrong_bytes_of_a_peer_are_a_complaint_and_stand_in_the_table() -> None:
    bad = report("redis-tcp", "ray", wrong="ray")
    assert not bad.ok
    assert bad.complaints()[0] == "ray, get, 64 KiB, alone, 1 client: 60 of 60 values were wrong"
    lines = {line[0]: line for line in table(bad)[1]}
    assert lines["ray"].count("BAD DATA") == len(CASES)
    assert "BAD DATA" not in lines["redis-tcp"]
    assert "NOT as it must be" in markdown(bad, "")


def test_the_table_has_every_case_and_says_who_failed_and_why() -> None:
    found = report("mmcache-shm", "lmcache-cpu", failed={"ray": "did not become ready: no room"})
    heads, lines = table(found)
    assert heads[3:7] == ["put 64 KiB", "put 8 x 1 MiB", "get 64 KiB", "get 8 x 1 MiB"]
    assert lines[0][:4] == ["mmcache-shm", "1", "yes", "0.50 [0.50, 0.50]"]
    assert [line[0] for line in lines[:2]] == ["mmcache-shm", "lmcache-cpu (own)"]
    text = markdown(found, "shared: not permitted")
    assert "failed: did not become ready: no room" in text
    assert "network: shared: not permitted" in text


def test_the_page_needs_nothing_else_and_escapes_what_others_said() -> None:
    found = report("redis-tcp", wrong="redis-tcp", failed={"ray": "<script>alert(1)</script>"}).to_dict("", HOST)
    text = peers_page(json.loads(json.dumps(found)), "make bench-peers")
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert not re.search(r"(?:src|href)=", text)
    assert "BAD DATA" in text
    assert "NOT as it must be" in text


def test_the_page_of_a_run_in_which_nothing_could_be_measured() -> None:
    found = Report([], dict.fromkeys(PEERS, "no"), PLAN, 0, 1.0)
    assert not found.ok
    assert "could not be measured: no" in peers_page(found.to_dict("", HOST), "make bench-peers")
    assert "failed: no" in markdown(found, "")


def test_controls_are_always_among_the_peers(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(["--peers", "ray, redis-tcp,ray"]).peers == ["ray", "redis-tcp", *CONTROLS]
    assert parse([]).peers == list(PEERS)
    for words in (["--peers", "memcached"], ["--peers", ""], ["--seed", "-1"]):
        with pytest.raises(SystemExit) as caught:
            parse(words)
        assert caught.value.code == 2
    assert "no peer memcached: choose from mmcache-shm" in capsys.readouterr().err


def test_every_row_names_a_client_and_a_frozen_environment() -> None:
    for peer in PEERS.values():
        module, _, name = peer.client.partition(":")
        assert issubclass(getattr(import_module(f"benchmarks.peers.adapters.{module}"), name), Client)
    needed = {peer.environment for peer in PEERS.values() if peer.environment}
    assert {path.stem for path in REQUIREMENTS.glob("*.txt")} == needed | {"torch"}
    assert needed >= WITH_TORCH
    for path in REQUIREMENTS.glob("*.txt"):
        assert all("==" in line for line in path.read_text().splitlines()), path.name


def test_an_environment_that_cannot_be_built_has_a_reason_and_no_stamp(tmp_path: Path) -> None:
    (tmp_path / "redis").write_text("a file is in the way")
    with pytest.raises(PeerError, match=re.escape(sys.executable)):
        install(tmp_path, "redis")
    assert not list(tmp_path.rglob(".stamp*"))


def test_the_other_keys_are_the_same_keys_in_another_order() -> None:
    case = FULL.cases[0]
    names = [name_of(case, 0, 0, 0, index) for index in range(case.count)]
    client = OtherKey.__new__(OtherKey)
    asked, fetched = client.prepare(names, [])
    assert set(asked[0].digests) == set(fetched[0].digests)
    assert all(a != b for a, b in zip(asked[0].digests, fetched[0].digests, strict=True))
