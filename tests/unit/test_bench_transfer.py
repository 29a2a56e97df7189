"""`bench transfer`: a byte that is wrong where it was delivered is noticed; a row's figures follow from the times."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
from rich.console import Console

from mmcache.bench.transfer import OneRound, Row, TransferOptions, TransferReport, row_of
from mmcache.bench.transfer_worker import Measurer, calls_of, memcpy_gbps, raw_tcp_gbps
from mmcache.client.blocking import Client
from mmcache.connect import connect
from mmcache.errors import ConfigError

KiB, MiB = 1 << 10, 1 << 20
ROW = Row("shm", "get", 64 * KiB, 1, 1, 0.82, 0.1, 80.0, 160.0, True)
REPORT = TransferReport([ROW], {"single": 12.0, "sliced": 7.0}, 4.5, 100, 0, 0, "", TransferOptions(), 9.0)


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with connect("embedded://?memory=64MiB") as client:
        yield client


@pytest.fixture
def measurer(client: Client) -> Measurer:
    return Measurer(client, seed=1, most_nbytes=4 * MiB)


@pytest.mark.parametrize("op", ["get", "put", "acquire"])
def test_a_round_delivers_what_was_stored(measurer: Measurer, op: str) -> None:
    measurer.prepare(op, 64 * KiB, batch=4, calls=3)
    for _ in range(2):
        assert measurer.copy() > 0
        measurer.reset()
        assert not any(
            (target == source).all() for target, source in zip(measurer.targets, measurer.sources, strict=True)
        )
        assert len(measurer.call()) == 3
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
    assert set(found) == {"single", "sliced"}
    assert all(rate > 0 for rates in found.values() for rate in rates)
    assert (measurer.target == measurer.source).all()
    measurer.target.fill(0)
    assert all(rate > 0 for rate in raw_tcp_gbps(measurer, rounds=1))
    assert measurer.target.any()


def test_a_round_moves_enough_but_not_too_much() -> None:
    assert calls_of(64 * KiB, 1, 16 * MiB) == 32
    assert calls_of(MiB, 1, 16 * MiB) == 16
    assert calls_of(MiB, 64, 16 * MiB) == 1


def test_a_rows_figures_follow_from_the_times() -> None:
    us = 1000
    fast = OneRound(copy_ns=16 * 10 * us, call_ns=[20 * us] * 16)
    slow = OneRound(copy_ns=16 * 10 * us, call_ns=[40 * us] * 16)
    row = row_of(("tcp", "get", MiB, 1, 1), [[fast], [slow], [fast]], calls=16, verified=True)
    assert row.gbps == pytest.approx(MiB / 20e3, rel=1e-3)
    assert row.ratio_to_memcpy == 0.5
    assert (row.p50_us, row.p99_us) == (20.0, 40.0)
    both = row_of(("tcp", "get", MiB, 1, 2), [[fast, slow]] * 3, calls=16, verified=True)
    assert both.gbps == pytest.approx(MiB / 20e3 + MiB / 40e3, rel=1e-3)
    assert both.ratio_to_memcpy == 0.375


def test_the_verdict_can_fail() -> None:
    assert REPORT.ok
    assert not replace(REPORT, wrong=1).ok
    assert not replace(REPORT, failed=2, reason="miss").ok
    assert replace(REPORT, failed=2, reason="miss").complaints() == [
        "2 values did not come back or were not stored (first reason: miss)"
    ]


def test_the_table_fits_80_columns_and_says_what_was_verified() -> None:
    out = io.StringIO()
    slow = replace(ROW, transport="unix", clients=2, batch=64, op="acquire", p50_us=1e6, p99_us=1e7, verified=False)
    replace(REPORT, rows=[ROW, slow]).print(Console(file=out, width=80))
    lines = out.getvalue().splitlines()
    assert any(
        line.split() == ["shm", "get", "1", "x", "64", "KiB", "0.82", "0.10", "80", "160", "yes"] for line in lines
    )
    assert any("unix x 2" in line and "10,000,000" in line and line.rstrip().endswith("no") for line in lines)
    assert "…" not in out.getvalue()
    assert "none wrong" in out.getvalue()


def test_the_json_holds_every_promised_field() -> None:
    data = json.loads(json.dumps(REPORT.to_dict()))
    assert data["rows"] == [
        {"transport": "shm", "op": "get", "size_bytes": 65536, "batch": 1, "clients": 1, "gbps": 0.82,
         "ratio_to_memcpy": 0.1, "p50_us": 80.0, "p99_us": 160.0, "verified": True}
    ]  # fmt: skip
    assert data["memcpy_gbps"] == {"single": 12.0, "sliced": 7.0}
    assert data["raw_tcp_gbps"] == 4.5
    assert data["ok"] is True


@pytest.mark.parametrize("options", [{"seed": -1}, {"copy_threads": 0}])
def test_options_that_cannot_work_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        TransferOptions(**options)  # type: ignore[arg-type]
