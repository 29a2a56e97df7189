"""`bench transfer`: a byte that is wrong where it was delivered is noticed; a row's figures follow from the times."""

from __future__ import annotations

import io
import json
import operator
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from mmcache.bench.transfer import TransferOptions
from mmcache.bench.transfer_process import cpu_ns
from mmcache.bench.transfer_report import TransferReport
from mmcache.bench.transfer_rows import MixedRow, OneRound, Round, Row, mixed_row_of, row_of
from mmcache.bench.transfer_worker import Measurer, calls_of, memcpy_gbps, raw_tcp_gbps, read
from mmcache.client.blocking import Client
from mmcache.connect import connect
from mmcache.errors import ConfigError

KiB, MiB = 1 << 10, 1 << 20
ROW = Row("shm", "get", 64 * KiB, 1, 1, 15, 0.82, 0.1, (0.09, 0.12), 80.0, 160.0, 210.5, 0.21, 0.004, True)
MIXED = MixedRow("shm", 64 * KiB, 16 * MiB, 480, 80.0, 160.0, 95.0, 2160.0, 3.5)
REPORT = TransferReport(
    rows=[ROW],
    mixed=[MIXED],
    longest_step_nbytes=256 * KiB,
    memcpy_gbps={"single": 12.0, "sliced": 7.0, "single_read": 6.0, "sliced_read": 5.0},
    raw_tcp_gbps=4.5,
    compared=100,
    wrong=0,
    failed=0,
    reason="",
    wall_s=9.0,
    workload={"transports": ["shm"], "clients": [1]},
)


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with connect("embedded://?memory=64MiB", deadline_s=10) as client:
        yield client


@pytest.fixture
def measurer(client: Client) -> Measurer:
    return Measurer(client, seed=1, most_nbytes=4 * MiB)


@pytest.mark.parametrize("op", ["get", "get+read", "put", "acquire"])
def test_a_round_delivers_what_was_stored(measurer: Measurer, op: str) -> None:
    measurer.prepare(op, 64 * KiB, batch=4, calls=3)
    for _ in range(2):
        assert measurer.copy() > 0
        measurer.reset()
        assert not any(
            (target == source).all() for target, source in zip(measurer.targets, measurer.sources, strict=True)
        )
        times, used_ns = measurer.call()
        assert len(times) == 3
        assert used_ns > 0
        measurer.check()
        for target, source in zip(measurer.targets, measurer.sources, strict=True):
            assert (target == source).all()
    assert (measurer.wrong, measurer.failed, measurer.reason) == (0, 0, "")
    measurer.finish()


@pytest.mark.parametrize("op", ["get", "acquire"])
def test_one_wrong_bit_in_a_destination_is_noticed(measurer: Measurer, op: str) -> None:
    measurer.prepare(op, 64 * KiB, batch=4, calls=3)
    measurer.reset()
    measurer.call()
    measurer.targets[7][12_345] ^= 1
    measurer.check()
    assert measurer.wrong == 1


def test_a_call_that_delivers_nothing_is_noticed(measurer: Measurer) -> None:
    measurer.prepare("get", 64 * KiB, batch=4, calls=3)
    measurer.finish()  # what should be read is gone
    measurer.reset()
    measurer.call()
    measurer.check()
    assert (measurer.wrong, measurer.failed) == (12, 12)
    assert measurer.reason.startswith("miss")


def test_a_put_that_stored_something_else_is_noticed(measurer: Measurer) -> None:
    measurer.prepare("put", 64 * KiB, batch=4, calls=1)
    measurer.reset()
    measurer.sources[2][0] ^= 1  # after its digest was taken
    measurer.call()
    measurer.check()
    assert measurer.wrong == 1


def test_values_are_all_different(measurer: Measurer) -> None:
    measurer.prepare("get", 64 * KiB, batch=16, calls=4)
    assert len({source.tobytes() for source in measurer.sources}) == 64


def test_floors_are_measured(measurer: Measurer) -> None:
    found = memcpy_gbps(measurer, rounds=2)
    assert set(found) == {"single", "sliced", "single_read", "sliced_read"}
    assert all(rate > 0 for rates in found.values() for rate in rates)
    for name in ("single", "sliced"):  # a copy and a read cannot be faster than that copy
        assert all(map(operator.lt, found[f"{name}_read"], found[name]))
    assert all(rate > 0 for rates in found.values() for rate in rates)
    assert (measurer.target == measurer.source).all()
    measurer.target.fill(0)
    assert all(rate > 0 for rate in raw_tcp_gbps(measurer, rounds=1))
    assert measurer.target.any()


def test_a_round_moves_enough_but_not_too_much() -> None:
    assert calls_of(64 * KiB, 1, 16 * MiB) == 32
    assert calls_of(MiB, 1, 16 * MiB) == 16
    assert calls_of(MiB, 64, 16 * MiB) == 1


def test_a_read_reads_every_byte(measurer: Measurer) -> None:
    measurer.target.fill(0)
    before = read([measurer.target])
    measurer.target[-1] = 1
    measurer.target[0] = 2
    assert (before, read([measurer.target])) == (0, 2 + 2**56)


def test_what_streams_moves_and_compares_values_until_it_is_stopped(measurer: Measurer) -> None:
    left = iter([False] * 9 + [True])
    begun: list[bool] = []
    found = measurer.stream(MiB, lambda: next(left), lambda: begun.append(True))
    assert (found["nbytes"], found["compared"], begun) == (18 * MiB, 4, [True])
    assert found["ns"] > 0
    assert (measurer.wrong, measurer.failed) == (0, 0)


def test_what_streams_notices_what_was_not_stored(measurer: Measurer) -> None:
    def begun() -> None:
        measurer.sources[2][0] ^= 1  # after its digest was taken

    measurer.stream(MiB, lambda: True, begun)
    assert measurer.wrong == 1


def test_cpu_time_is_that_of_the_process() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", "for _ in range(3_000_000): pass\nprint(flush=True)\ninput()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        used_ns = cpu_ns(process.pid)
        wall_ns = time.perf_counter_ns()
        time.sleep(0.2)
        assert used_ns > 1e7  # three million turns
        assert cpu_ns(process.pid) - used_ns < (time.perf_counter_ns() - wall_ns) / 2  # it only waits
        process.communicate(b"\n")
    with pytest.raises(OSError, match="Invalid argument"):
        cpu_ns(process.pid)


def test_a_rows_figures_follow_from_the_times() -> None:
    us = 1000
    fast = OneRound(copy_ns=16 * 10 * us, call_ns=[20 * us] * 16, cpu_ns=16 * 30 * us)
    slow = OneRound(copy_ns=16 * 10 * us, call_ns=[40 * us] * 16, cpu_ns=16 * 50 * us)
    rounds = [Round([fast], MiB), Round([slow], 3 * MiB), Round([fast], 2 * MiB)]
    row = row_of(("tcp", "get", MiB, 1, 1), rounds, calls=16, verified=True)
    assert row.gbps == pytest.approx(MiB / 20e3, rel=1e-3)
    assert (row.ratio_to_memcpy, row.ratio_quartiles, row.rounds) == (0.5, (0.375, 0.5), 3)
    assert (row.p50_us, row.p99_us) == (20.0, 40.0)
    assert row.client_cpu_s_per_gb == pytest.approx(30e3 / MiB, abs=1e-4)
    assert row.server_cpu_s_per_gb == 0.125  # 2 MiB ns for 16 MiB
    both = row_of(("tcp", "get", MiB, 1, 2), [Round([fast, slow], 2 * MiB)] * 3, calls=16, verified=True)
    assert both.gbps == pytest.approx(MiB / 20e3 + MiB / 40e3, rel=1e-3)
    assert both.ratio_to_memcpy == 0.375
    assert both.client_cpu_s_per_gb == pytest.approx(40e3 / MiB, abs=1e-4)
    assert both.server_cpu_s_per_gb == 0.0625


def test_a_tail_is_told_of_enough_calls_only() -> None:
    def tail(calls: int) -> float | None:
        times = [10_000] * (calls - 3) + [5_000_000] * 3
        return row_of(("shm", "get", 64 * KiB, 1, 1), [Round([OneRound(1, times, 1)], 1)], calls, True).p999_us

    assert tail(999) is None
    assert tail(1000) == 5000.0


def test_a_mixed_rows_figures_follow_from_the_times() -> None:
    idle, busy = [100_000] * 99 + [900_000], [200_000] * 90 + [3_000_000] * 10
    row = mixed_row_of(("tcp", 64 * KiB, 16 * MiB), idle, busy, (32 * MiB, 16 << 20))
    assert (row.calls, row.streamed_gbps) == (100, 2.0)
    assert (row.idle_p50_us, row.busy_p50_us, row.busy_p99_us) == (100.0, 200.0, 3000.0)
    assert 100 < row.idle_p99_us < 900


def test_the_verdict_can_fail() -> None:
    assert REPORT.ok
    assert not replace(REPORT, wrong=1).ok
    assert not replace(REPORT, failed=2, reason="miss").ok
    assert not replace(REPORT, longest_step_nbytes=256 * KiB + 1).ok
    assert replace(REPORT, failed=2, reason="miss").complaints() == [
        "2 values did not come back or were not stored (first reason: miss)"
    ]


def test_the_table_fits_80_columns_and_says_what_was_verified() -> None:
    out = io.StringIO()
    slow = replace(
        ROW,
        transport="unix",
        clients=16,
        batch=64,
        op="get+read",
        size_bytes=MiB,
        p50_us=7e5,
        p99_us=1e7,
        verified=False,
    )
    replace(REPORT, rows=[ROW, slow]).print(Console(file=out, width=80))
    lines = out.getvalue().splitlines()
    assert any(line.split() == ["shm", "get", "64", "KiB", "0.82", "0.10", "80", "160", "210", "yes"] for line in lines)
    assert any("unix x 16" in line and "10,000,000" in line and line.rstrip().endswith("no") for line in lines)
    assert any(line.split() == ["get", "64", "KiB", "0.210", "0.004"] for line in lines)
    assert any(line.split() == ["shm", "80", "160", "95", "2,160", "2.00", "3.50"] for line in lines)
    assert any("262,144 bytes without a break" in line for line in lines)
    assert "…" not in out.getvalue()
    assert "none wrong" in out.getvalue()


def test_the_json_holds_every_promised_field() -> None:
    data = json.loads(json.dumps(REPORT.to_dict()))
    assert data["rows"] == [
        {"transport": "shm", "op": "get", "size_bytes": 65536, "batch": 1, "clients": 1, "rounds": 15, "gbps": 0.82,
         "ratio_to_memcpy": 0.1, "ratio_quartiles": [0.09, 0.12], "p50_us": 80.0, "p99_us": 160.0, "p999_us": 210.5,
         "client_cpu_s_per_gb": 0.21, "server_cpu_s_per_gb": 0.004, "verified": True}
    ]  # fmt: skip
    assert data["mixed"] == [
        {"transport": "shm", "size_bytes": 65536, "stream_bytes": 16777216, "calls": 480, "idle_p50_us": 80.0,
         "idle_p99_us": 160.0, "busy_p50_us": 95.0, "busy_p99_us": 2160.0, "streamed_gbps": 3.5}
    ]  # fmt: skip
    assert data["longest_step_nbytes"] == 262144
    assert data["memcpy_gbps"] == {"single": 12.0, "sliced": 7.0, "single_read": 6.0, "sliced_read": 5.0}
    assert data["raw_tcp_gbps"] == 4.5
    assert data["ok"] is True


@pytest.mark.parametrize(
    "options",
    [{"seed": -1}, {"copy_threads": 0}, {"transports": ("shm", "rdma")}, {"transports": ()}, {"clients": (0,)},
     {"clients": (1, 17)}, {"clients": ()}],
)  # fmt: skip
def test_options_that_cannot_work_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"choose|name"):
        TransferOptions(**options)


def test_options_are_put_in_order_and_leave_the_server_room() -> None:
    options = TransferOptions(transports=("tcp", "shm", "tcp"), clients=(4, 1, 4))
    assert (options.transports, options.clients) == (("tcp", "shm"), (1, 4))
    assert TransferOptions(clients=(16,)).memory_nbytes == 3 * 16 * 64 * MiB
