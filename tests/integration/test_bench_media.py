"""`mmcache bench media` against real caches: its hit rates are what they must be, and damage shows or is caught."""

from __future__ import annotations

import pytest

from mmcache.bench.media import MediaOptions, run
from mmcache.errors import ConfigError
from mmcache.testing.process import ServerProcess


def test_with_enough_memory_it_hits_like_an_endless_cache_and_reads_nothing_wrong() -> None:
    seen: list[tuple[int, int]] = []
    report = run(MediaOptions(scale="quick"), progress=lambda done, total: seen.append((done, total)))
    assert report.ok
    assert report.wrong == 0
    assert report.verify_failures == 0
    assert report.got == report.ideal == report.lru
    assert report.compared == report.got.kv.hits + report.got.embedding.hits > 200
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
    assert all(report.ok and report.got == report.ideal for report in reports)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"scale": "huge"}, "full, quick"),
        ({"inject": "lies"}, "wrong or corrupt"),
        ({"inject": "wrong", "connect": "mmcache://127.0.0.1:7600"}, "leave out either"),
        ({"questions": 0}, "1 to 6"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        MediaOptions(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("memory", ["0%", "-3%", "some%", "lots"])
def test_memory_that_is_no_size_is_refused(memory: str) -> None:
    with pytest.raises(ConfigError):
        run(MediaOptions(scale="quick", memory=memory))
