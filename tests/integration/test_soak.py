"""The soak in a few seconds: no byte is wrong, nothing is left behind; and its verdicts can be bad."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mmcache
from benchmarks.soak import Sample, is_flat, quarters
from benchmarks.soak_client import COUNTERS, SoakClient, keys_of, nbytes_of, value_of, working_set
from mmcache.testing import faults

ROOT = Path(__file__).resolve().parents[2]


def test_a_short_soak_is_clean() -> None:
    words = [
        "--minutes",
        "0.1",
        "--memory",
        "8MiB",
        "--clients",
        "4",
        "--kill-every",
        "2",
        "--connects",
        "320",
        "--json",
    ]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "soak.py"), *words], capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 1), done.stderr  # 1: so short a run may not be flat yet, which this test is not about
    report = json.loads(done.stdout)
    ran, ended = report["soak"], report["connects"]
    assert (ran["wrong"], ran["stale"], ran["raised"], report["server_said"]) == (0, 0, 0, ""), report
    assert ran["killed"] >= 1
    assert min(ran["compared"], ran["hits"], ran["misses"], ran["stored"]) > 0, report
    assert ended["ok"], report


def counted(client: SoakClient) -> dict[str, int]:
    return dict(zip(COUNTERS, map(int, client.counts), strict=True))


def test_a_wrong_byte_in_a_hit_or_under_a_lease_is_counted() -> None:
    keys = keys_of([0])
    with faults.embedded(1 << 20, verify=False) as (cache, shard):
        client = SoakClient("", 1, 1, np.zeros(len(COUNTERS), np.int64))
        client.put(cache)
        client.get_or_put(cache)
        assert (counted(client)["compared"], counted(client)["wrong"]) == (1, 0)
        faults.flip_bit(shard, keys.digests[0], 8 * (nbytes_of(0) + 400))
        client.get_or_put(cache)
        assert counted(client)["wrong"] == 1
        client.look(cache)
        assert counted(client)["wrong"] == 2


def test_an_entry_that_outlives_its_time_is_counted() -> None:
    with mmcache.connect("embedded://?memory=1MiB") as cache:
        client = SoakClient("", 1, 1, np.zeros(len(COUNTERS), np.int64))
        keys = keys_of([3])
        assert all(cache.put(keys, [value_of(keys.digests[0], 1000)]))  # for ever
        client.lapsing.append((0.0, keys))
        client.lapse(cache)
        assert counted(client)["stale"] == 1


@pytest.mark.parametrize(("leaked", "flat"), [(0, True), (1, False)])
def test_a_leak_is_not_flat(leaked: int, flat: bool) -> None:
    samples = [Sample(100 << 20, 20, 13) for _ in range(100)]
    samples = [
        Sample(s.rss + leaked * at * (1 << 18), s.fds + leaked * at // 20, s.threads) for at, s in enumerate(samples)
    ]
    medians = quarters(samples)
    assert len(medians) == 4
    assert is_flat("rss", medians[1].rss, medians[3].rss) is flat
    assert is_flat("fds", medians[1].fds, medians[3].fds) is flat
    assert is_flat("threads", medians[1].threads, medians[3].threads)


def test_the_working_set_is_as_large_as_it_says() -> None:
    count = working_set(10 << 20)
    assert sum(map(nbytes_of, range(count))) >= 10 << 20 > sum(map(nbytes_of, range(count - 5)))
