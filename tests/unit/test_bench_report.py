"""The report: the fields of the JSON, the verdict, and when the figures are not what they must be."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from mmcache.bench.oracle import Tallies, Tally
from mmcache.bench.report import Injection, Latency, Report

REPORT = Report(
    workload={"name": "media", "photos": 3, "videos": 1, "working_set_nbytes": 59_000_000, "capacity_nbytes": 10**8},
    requests=27,
    got=Tallies(Tally(100, 60, 6000, 4000), Tally(20, 12, 1200, 800)),
    ideal=Tallies(Tally(100, 61, 6100, 3900), Tally(20, 12, 1200, 800)),
    lru=Tallies(Tally(100, 50, 5000, 5000), Tally(30, 12, 1200, 800)),
    compared=72,
    wrong=0,
    verify_failures=0,
    verify=True,
    inject=None,
    injected=0,
    outcomes={"hit": 72},
    latency_us={"get kv": Latency.of([1000, 2000, 3000])},
    wall_s=1.25,
    measured=("hits [of a real cache]",),
    modelled=("KV values",),
)


def test_the_json_holds_every_promised_field() -> None:
    data = json.loads(json.dumps(REPORT.to_dict()))
    assert data["workload"]["name"] == "media"
    assert (data["requests"], data["wrong"], data["verify_failures"]) == (27, 0, 0)
    assert (data["hit_rate"], data["ideal_hit_rate"], data["lru_hit_rate"]) == (0.6, 0.60833, 0.47692)
    assert data["by_kind"]["kv"] == {
        "lookups": 100,
        "hits": 60,
        "hit_rate": 0.6,
        "ideal_hit_rate": 0.61,
        "lru_hit_rate": 0.5,
        "bytes_read": 6000,
        "bytes_written": 4000,
    }
    assert data["by_kind"]["embedding"]["hits"] == 12
    assert data["latency_us"]["get kv"] == {"p50": 2.0, "p99": 3.0, "calls": 3}
    assert data["host"]["cores"] >= 1
    assert data["measured"]
    assert data["modelled"]


def test_the_terminal_report_shows_the_verdict_and_what_is_modelled() -> None:
    out = io.StringIO()
    REPORT.print(Console(file=out, width=120))
    text = out.getvalue()
    for part in ("wrong=0", "60.0%", "61.0%", "59.0 MB", "get kv", "hits [of a real cache]", "Modelled", "27 requests"):
        assert part in text


@pytest.mark.parametrize(
    ("inject", "verify", "wrong", "failures", "ok"),
    [
        (None, True, 0, 0, True),
        (None, True, 1, 0, False),
        (None, True, 0, 1, False),
        (None, False, 1, 0, False),
        ("corrupt", True, 0, 3, True),
        ("corrupt", True, 0, 0, False),
        ("wrong", True, 1, 3, False),
        ("wrong", False, 2, 0, True),
        ("wrong", False, 0, 0, False),
    ],
)
def test_the_figure_can_fail(inject: Injection | None, verify: bool, wrong: int, failures: int, ok: bool) -> None:
    assert replace(REPORT, inject=inject, verify=verify, wrong=wrong, verify_failures=failures).ok is ok
