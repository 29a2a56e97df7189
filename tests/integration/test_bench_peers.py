"""`make bench-peers` with real servers: controls are caught, a peer that does not start stops nothing, no way out."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.peers.install import python_of
from benchmarks.peers.plan import VIEW, Case, Plan
from benchmarks.peers.registry import CONTROLS
from benchmarks.peers.report import Report, markdown
from benchmarks.peers.run import measure
from tests.integration.nixl_bed import WITHOUT

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENTS = ROOT / ".peers"
CASES = (Case(4096, 1, 4), Case(65536, 2, 1))


def measured(names: list[str], plan: Plan, environments: Path) -> tuple[Report, list[str]]:
    told: list[str] = []
    return measure([*names, *CONTROLS], {}, plan, environments, 0, told.append), told


def assert_controls_are_caught(report: Report) -> None:
    for control in CONTROLS:
        gets = [row for row in report.rows if row.peer == control and row.op == "get"]
        assert [row.wrong for row in gets] == [row.compared for row in gets], "each value must differ"
        assert len(gets) == len(CASES) * len(report.plan.clients)
    views = [row for row in report.rows if row.peer == "control-other-key" and row.op == VIEW]
    assert [row.wrong for row in views] == [row.compared for row in views]
    assert len(views) == len(report.plan.clients), "one case has batches"


def test_controls_are_caught_and_what_does_not_start_is_in_the_table(tmp_path: Path) -> None:
    names = ["vineyard", "mmcache-shm", "mmcache-nixl", "mmcache-grpc", "grpc-floor"]
    report, told = measured(names, Plan(2, 1, CASES, clients=(2,)), tmp_path)
    assert_controls_are_caught(report)
    assert report.ok, report.complaints()
    reasons = {"vineyard": "the wheel of vineyard-bdist has no vineyardd"}
    if WITHOUT:
        reasons["mmcache-nixl"] = f"`mmcache serve` did not become ready: mmcache: --nixl lo: {WITHOUT}"
    assert report.failed == reasons
    assert told.count("turn 1 of 2: vineyard") == 1
    assert "turn 2 of 2: vineyard" not in told
    rows = [row for row in report.rows if row.peer not in CONTROLS]
    assert {row.peer for row in rows} == {"mmcache-shm", "mmcache-nixl", "mmcache-grpc", "grpc-floor"} - set(reasons)
    assert all(row.pairs == 2 and row.ratio > 0 and row.wrong == 0 for row in rows)
    assert [(row.compared, row.verified) for row in rows if row.op == VIEW] == [(2 * 2 * 2, False)]
    text = markdown(report, "")
    assert "mmcache-shm: " in text
    assert text.count("BAD DATA") == len(CONTROLS) * len(CASES) + 1 + 1  # a view, and the note that explains it


def test_redis_delivers_what_was_put_and_the_controls_beside_it_are_caught() -> None:
    if not shutil.which("redis-server"):
        pytest.skip("no redis-server on PATH")
    if not python_of(ENVIRONMENTS, "redis").exists():
        pytest.skip("no redis-py: `make bench-peers ARGS='--peers redis-tcp'` installs it into .peers")
    report, _ = measured(["redis-tcp", "redis-unix"], Plan(1, 2, CASES, clients=(1, 2)), ENVIRONMENTS)
    assert_controls_are_caught(report)
    assert report.ok, report.complaints()
    assert not report.failed
    assert sum(row.compared for row in report.rows if row.peer == "redis-unix") == 2 * (4 + 2) * (1 + 2)


def test_in_a_namespace_of_its_own_a_process_has_loopback_alone() -> None:
    code = (
        "import socket; from benchmarks.peers.isolate import isolate; refused = isolate(); print(refused)\n"
        "if not refused:\n"
        "    server = socket.create_server(('127.0.0.1', 0)); socket.create_connection(server.getsockname()).close()\n"
        "    print([name for _, name in socket.if_nameindex()])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    refused, *names = done.stdout.splitlines()
    if refused:
        pytest.skip(f"no network namespace here: {refused}")
    assert names == ["['lo']"]
