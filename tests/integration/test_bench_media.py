"""`mmcache bench media` against real caches: its hit rates are what they must be, and damage shows or is caught."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import mmcache
from mmcache.bench import workload
from mmcache.bench.media import MediaOptions, run
from mmcache.errors import ConfigError
from mmcache.testing.process import ServerProcess
from tests.integration.support import run_cli


def test_with_enough_memory_it_hits_like_an_endless_cache_and_reads_nothing_wrong() -> None:
    seen: list[tuple[int, int]] = []
    report = run(MediaOptions(scale="quick"), progress=lambda done, total: seen.append((done, total)))
    assert report.ok
    assert report.wrong == 0
    assert report.verify_failures == 0
    assert report.got == report.ideal == report.lru
    assert report.compared == report.got["kv"].hits + report.got["embedding"].hits > 200
    assert set(report.outcomes) == {"hit", "miss", "stored"}
    assert seen == [(done, report.requests) for done in range(1, report.requests + 1)]


def test_in_a_tenth_of_the_memory_it_hits_like_an_exact_lru() -> None:
    report = run(MediaOptions(memory="10%"))
    assert report.ok
    assert report.workload["capacity_nbytes"] <= report.workload["working_set_nbytes"] / 10
    assert report.lru.hit_rate < report.ideal.hit_rate - 0.05
    assert abs(report.got.hit_rate - report.lru.hit_rate) <= 0.01
    assert "refused" not in report.outcomes


@pytest.mark.parametrize("inject", ["wrong", "corrupt"])
def test_damage_is_caught_by_verified_reads(inject: str) -> None:
    report = run(MediaOptions(scale="quick", inject=inject))  # type: ignore[arg-type]
    assert report.injected > 0
    assert report.verify_failures > 0
    assert report.wrong == 0
    assert report.ok


@pytest.mark.parametrize("inject", ["wrong", "corrupt"])
def test_damage_shows_when_reads_are_not_verified(inject: str) -> None:
    report = run(MediaOptions(scale="quick", inject=inject, verify=False))  # type: ignore[arg-type]
    assert report.verify_failures == 0
    assert report.wrong > 0
    assert report.ok


@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_it_starts_cold_on_a_server_it_only_connects_to(transport: str) -> None:
    with ServerProcess(memory="200MiB") as server:
        url = f"{server.url}?transport={transport}"
        reports = [run(MediaOptions(connect=url, scale="quick", questions=1)) for _ in range(2)]
        with mmcache.connect(server.url) as cache:
            told = cache.stat()["counters"]
    assert all(report.ok and report.got == report.ideal for report in reports)
    found = sum(report.got["embedding"].hits for report in reports)
    assert (told["hits_image"], told["hits_image_pixels"]) == (found, found * 224 * 224), (
        "the server knows what it saved"
    )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"scale": "huge"}, "full, quick"),
        ({"inject": "lies"}, "wrong or corrupt"),
        ({"inject": "wrong", "connect": "mmcache://127.0.0.1:7600"}, "leave out either"),
        ({"questions": 0}, "1 to 6"),
        ({"seed": -1}, "0 or more"),
        ({"memory": "1GiB", "connect": "mmcache://127.0.0.1:7600"}, "leave out either"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        MediaOptions(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("memory", ["0%", "-3%", "some%", "lots"])
def test_memory_that_is_no_size_is_refused(memory: str) -> None:
    with pytest.raises(ConfigError):
        run(MediaOptions(scale="quick", memory=memory))


def test_a_server_killed_midway_is_not_ok() -> None:
    def kill_once(done: int, total: int) -> None:
        if done == total // 2:
            server.stop(signal.SIGKILL)

    with ServerProcess(memory="200MiB") as server:
        report = run(MediaOptions(connect=f"{server.url}?deadline_s=2", scale="quick"), progress=kill_once)
    assert report.outcomes["unavailable"] > 0
    assert report.reasons["unavailable"]
    assert report.wrong == 0
    assert not report.ok


@pytest.mark.parametrize("module", ["av", "PIL", "skimage"])
def test_without_the_extra_it_says_what_to_install_and_nothing_else_breaks(module: str) -> None:
    block = f"import sys; sys.modules[{module!r}] = None; from mmcache.cli import main; main()"
    ended = subprocess.run(
        [sys.executable, "-c", block, "bench", "media"], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 2
    assert "needs the bench extra: pip install 'mmcache[bench]' (in a clone: make demo)" in ended.stderr
    assert "Traceback" not in ended.stderr
    ended = subprocess.run(
        [sys.executable, "-c", block, "bench", "media", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0


def test_the_command_writes_json_and_nothing_to_a_stderr_that_is_no_terminal(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    ended = run_cli("bench", "media", "--scale", "quick", "--questions", "1", "--json", str(file))
    assert (ended.returncode, ended.stderr) == (0, "")
    assert json.loads(file.read_text())["ok"] is True
    assert "as it must be: nothing wrong came back" in ended.stdout


def test_json_on_stdout_leaves_the_tables_to_stderr() -> None:
    ended = run_cli("bench", "media", "--scale", "quick", "--inject", "wrong", "--no-verify", "--json", "-")
    assert ended.returncode == 0
    assert json.loads(ended.stdout)["ok"] is True
    assert "without verification the damage gets through" in ended.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--seed", "-1"], "0 or more"),
        (["--json", "/no/such/folder/report.json"], "can be written"),
        (["--json", "/"], "can be written"),
        (["--memory", "1GiB", "--connect", "mmcache://127.0.0.1:1"], "leave out either"),
        (["--questions", "7"], "1 to 6"),
    ],
)
def test_what_cannot_work_ends_with_2_before_anything_runs(words: list[str], says: str) -> None:
    ended = run_cli("bench", "media", *words)
    assert ended.returncode == 2
    assert says in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert ended.stdout == ""


def test_the_help_tells_the_range_of_questions() -> None:
    scales = f"default: full {workload.FULL.questions}, quick {workload.QUICK.questions}"
    assert f"1 to {len(workload.QUESTIONS)}; {scales}" in run_cli("bench", "media", "--help").stdout
