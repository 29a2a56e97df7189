"""`mmcache bench chat`, `diffusion` and `transfer` against real caches: what must hit does, damage is seen."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmcache.bench import chat, diffusion
from mmcache.bench.report import Report
from mmcache.bench.run import Options
from mmcache.errors import ConfigError
from mmcache.testing.process import ServerProcess
from tests.integration.nixl_bed import OVER_TCP, WITHOUT, needs_nixl
from tests.integration.support import run_cli

RUNS: dict[str, Callable[..., Report]] = {"chat": chat.run, "diffusion": diffusion.run}
ROW_FIELDS = {
    "transport", "op", "size_bytes", "batch", "clients", "rounds", "gbps", "ratio_to_memcpy", "ratio_quartiles",
    "p50_us", "p99_us", "p999_us", "client_cpu_s_per_gb", "server_cpu_s_per_gb", "verified",
}  # fmt: skip


def check_html(file: Path, command: str) -> None:
    text = file.read_text()
    assert text.startswith("<!DOCTYPE html>")
    assert text.count('<svg class="plot"') > 3
    assert f"<code>mmcache {command}" in text


@pytest.mark.parametrize("name", RUNS)
def test_with_enough_memory_it_hits_like_an_endless_cache(name: str, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    ended = run_cli("bench", name, "--scale", "quick", "--json", "-", "--html", str(file))
    assert ended.returncode == 0
    found = json.loads(ended.stdout)
    assert abs(found["hit_rate"] - found["ideal_hit_rate"]) < 0.01
    assert (found["ok"], found["wrong"], found["verify_failures"]) == (True, 0, 0)
    assert found["compared"] == sum(kind["hits"] for kind in found["by_kind"].values()) > 50
    assert all(0 < kind["hit_rate"] == kind["ideal_hit_rate"] < 1 for kind in found["by_kind"].values())
    assert set(found["outcomes"]) == {"hit", "miss", "stored"}
    check_html(file, f"bench {name} --scale quick")


@pytest.mark.parametrize("name", RUNS)
def test_it_equals_the_replay_at_every_request(name: str) -> None:
    with ServerProcess(memory="200MiB") as server:
        seen: list[tuple[int, int]] = []
        report = RUNS[name](
            Options(connect=f"{server.url}?transport=tcp", scale="quick"),
            lambda done, total: seen.append((done, total)),
        )
    assert report.ok
    assert report.got == report.ideal == report.lru  # the history too
    assert len(report.got.history) == report.requests == len(seen)


def test_in_less_memory_it_hits_about_like_an_exact_lru_and_reads_nothing_wrong() -> None:
    report = diffusion.run(Options(scale="quick", memory="50%"))
    assert report.ok
    assert report.got.hit_rate < report.ideal.hit_rate
    assert abs(report.got.hit_rate - report.lru.hit_rate) < 0.05
    assert report.compared > 50


@pytest.mark.parametrize("name", RUNS)
def test_damage_shows_when_reads_are_not_verified(name: str) -> None:
    report = RUNS[name](Options(scale="quick", inject="wrong", verify=False))
    assert report.injected > 0
    assert report.wrong > 0
    assert report.ok


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("inject", ["wrong", "corrupt"])
def test_damage_is_caught_by_verified_reads(name: str, inject: Any, caplog: pytest.LogCaptureFixture) -> None:
    report = RUNS[name](Options(scale="quick", inject=inject))
    assert report.verify_failures > 0
    assert report.wrong == 0
    assert report.ok
    assert "internal error" not in caplog.text  # damage to the bytes, not to the server


def test_options_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match="full, quick"):
        Options(scale="huge")
    ended = run_cli("bench", "chat", "--html", "/no/such/folder/report.html")
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert "give --html a file that can be written" in ended.stderr


def test_transfer_measures_every_row_and_checks_what_arrived(tmp_path: Path) -> None:
    # A machine that stands still spoils figures, but not each time.
    assert any(figures_make_sense(transfer_of_every_row(tmp_path)) for _ in range(3))


def figures_make_sense(found: dict[str, Any]) -> bool:
    server_s = {
        row["transport"]: row["server_cpu_s_per_gb"]
        for row in found["rows"]
        if (row["op"], row["clients"], row["batch"]) == ("get", 1, 4)
    }
    rates = [row["streamed_gbps"] for row in found["mixed"]] + list(found["memcpy_gbps"].values())
    return bool(server_s["shm"] < server_s["tcp"] and min(rates) > 0.05)  # in shared memory it moves nothing


def transfer_of_every_row(tmp_path: Path) -> dict[str, Any]:
    file = tmp_path / "report.html"
    ended = run_cli("bench", "transfer", "--quick", "--json", "-", "--html", str(file))
    assert ended.returncode == 0
    found = json.loads(ended.stdout)
    rows = found["rows"]
    assert {frozenset(row) for row in rows} == {frozenset(ROW_FIELDS)}
    assert {row["transport"] for row in rows} == {"shm", "unix", "tcp"}
    verified = {"get": True, "get+read": True, "put": True, "acquire": False}
    assert {row["op"]: row["verified"] for row in rows} == verified
    assert {row["clients"] for row in rows} == {1, 2}
    assert len(rows) == 42
    for row in rows:
        assert row["gbps"] > 0
        assert 0 < row["ratio_quartiles"][0] <= row["ratio_to_memcpy"] <= row["ratio_quartiles"][1]
        assert 0 < row["p50_us"] <= row["p99_us"]
        assert row["client_cpu_s_per_gb"] > 0
        assert row["server_cpu_s_per_gb"] > 0
    assert [row["transport"] for row in found["mixed"]] == ["shm", "unix", "tcp"]
    for row in found["mixed"]:
        assert row["calls"] == 128
        assert 0 < row["idle_p50_us"] <= row["idle_p99_us"]
        assert 0 < row["busy_p50_us"] <= row["busy_p99_us"]
        assert row["streamed_gbps"] > 0
    assert found["longest_step_nbytes"] == 256 << 10
    assert set(found["memcpy_gbps"]) == {"single", "sliced", "single_read", "sliced_read"}
    assert (found["ok"], found["wrong"], found["failed"]) == (True, 0, 0)
    assert found["compared"] > 1000
    check_html(file, "")
    return dict(found)


def test_transfer_measures_only_what_was_asked_for() -> None:
    words = ("--quick", "--transport", "tcp", "--clients", "3", "--no-verify", "--json", "-")
    ended = run_cli("bench", "transfer", *words)
    assert ended.returncode == 0
    found = json.loads(ended.stdout)
    assert {(row["transport"], row["clients"]) for row in found["rows"]} == {("tcp", 3)}
    assert {row["op"] for row in found["rows"] if row["verified"]} == {"put"}
    assert [row["transport"] for row in found["mixed"]] == ["tcp"]
    assert (found["workload"]["transports"], found["workload"]["clients"]) == (["tcp"], [3])
    ended = run_cli("bench", "transfer", "--transport", "rdma")
    assert (ended.returncode, ended.stderr) == (
        2,
        "mmcache: transport 'rdma' is unknown; choose shm, unix, tcp, nixl\n",
    )


@needs_nixl
def test_transfer_by_nixl_counts_the_agents_time_too() -> None:
    def shares() -> float:
        """The server's CPU time for what is read by NIXL, over that for what is read by TCP."""
        server_s = server_s_by_nixl_and_tcp()
        return server_s["nixl"] / server_s["tcp"]

    assert any(shares() > 0.6 for _ in range(3))  # it is the agent that sends all of it


def server_s_by_nixl_and_tcp() -> dict[str, float]:
    words = ("--quick", "--transport", "tcp", "--transport", "nixl", "--clients", "1", "--json", "-")
    ended = run_cli("bench", "transfer", *words, environment=OVER_TCP)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert [row["transport"] for row in found["rows"]] == ["tcp"] * 7 + ["nixl"] * 7
    assert [row["transport"] for row in found["mixed"]] == ["tcp", "nixl"]
    assert (found["ok"], found["wrong"], found["failed"]) == (True, 0, 0)
    assert any("one-sided reads" in note for note in found["notes"])
    return {
        row["transport"]: row["server_cpu_s_per_gb"] for row in found["rows"] if (row["op"], row["batch"]) == ("get", 4)
    }


@pytest.mark.skipif(not WITHOUT, reason="NIXL is installed")
def test_transfer_by_nixl_says_what_to_install() -> None:
    ended = run_cli("bench", "transfer", "--quick", "--transport", "nixl")
    assert ended.returncode == 1
    assert "pip install 'mmcache[nixl]'" in ended.stderr
