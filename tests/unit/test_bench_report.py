"""The report: the fields of the JSON, the verdict, and when the figures are not what they must be."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace

import pytest
from rich.console import Console

from mmcache.bench.oracle import Tallies, Tally
from mmcache.bench.report import Injection, Latency, Report

REPORT = Report(
    workload={
        "name": "media",
        "about": "3 photos and 1 video",
        "working_set_nbytes": 59_000_000,
        "capacity_nbytes": 10**8,
        "capacity_frames": 217,
    },
    requests=27,
    got=Tallies({"embedding": Tally(20, 12, 1200, 800), "kv": Tally(100, 60, 6000, 4000)}),
    ideal=Tallies({"embedding": Tally(20, 12, 1200, 800), "kv": Tally(100, 61, 6100, 3900)}),
    lru=Tallies({"embedding": Tally(30, 12, 1200, 800), "kv": Tally(100, 50, 5000, 5000)}),
    compared=72,
    wrong=0,
    verify_failures=0,
    verify=True,
    inject=None,
    injected=0,
    outcomes={"hit": 72},
    reasons={},
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
    assert data["latency_us"]["get kv"] == {"p50": 2.0, "p90": 2.8, "p99": 3.0, "calls": 3}
    assert data["host"]["cores"] >= 1
    assert data["measured"]
    assert data["modelled"]


def printed(report: Report, width: int = 120) -> str:
    out = io.StringIO()
    report.print(Console(file=out, width=width))
    return out.getvalue()


def test_the_terminal_report_shows_the_verdict_and_what_is_modelled() -> None:
    text = printed(REPORT)
    for part in ("wrong=0", "60.0%", "61.0%", "59.0 MB", "get kv", "hits [of a real cache]", "Modelled", "27 requests"):
        assert part in text
    assert "3 photos and 1 video;" in text
    assert "72 values that came back were compared" in text
    assert "reads were verified" in text


def test_at_80_columns_nothing_is_cut_and_lists_hang() -> None:
    big = Tally(123_456, 123_456, 12_345_600_000, 12_345_600_000)
    text = printed(replace(REPORT, got=Tallies({"embedding": big, "kv": big}), modelled=("word " * 30,)), width=80)
    header = next(line for line in text.splitlines() if "lookups" in line)
    assert re.split(r" {2,}|(?<=hits) ", header.strip()) == [
        *("kind", "lookups", "hits", "hit rate", "ideal", "exact LRU", "read MB", "written MB"),
    ]
    (embedding,) = (line.split() for line in text.splitlines() if "embedding" in line)
    assert embedding == ["embedding", *["123,456"] * 2, "100.0%", "60.0%", "40.0%", *["12,345.6"] * 2]
    assert "…" not in text
    first, second, *_ = text[text.index("Modelled") :].splitlines()[1:]
    assert first.startswith(" - word")
    assert second.startswith("   word")


def test_few_frames_and_a_small_cache_are_remarked_on() -> None:
    small = {**REPORT.workload, "capacity_nbytes": 5_900_000, "capacity_frames": 12}
    assert "room for 12 entries only" in " ".join(printed(replace(REPORT, workload=small)).split())
    assert "Note" not in printed(REPORT)
    assert "Note" not in printed(replace(REPORT, workload={**small, "working_set_nbytes": 5_000_000}))


def test_every_outcome_out_of_the_ordinary_is_shown_with_its_reason() -> None:
    text = printed(
        replace(
            REPORT,
            outcomes={"hit": 72, "miss": 8, "unavailable": 5, "refused": 2},
            reasons={"unavailable": "no server at [host]", "miss": "expired"},
        )
    )
    assert "unavailable: 5 (first reason: no server at [host])" in text
    assert "refused: 2\n" in text
    assert "miss:" not in text
    assert "NOT as it must be: 5 answers never came" in text


VERDICTS = [
    (None, True, 0, 0, "as it must be: nothing wrong came back"),
    (None, True, 1, 0, "NOT as it must be: 1 wrong value came back"),
    (None, True, 0, 2, "NOT as it must be: 2 reads failed verification"),
    ("corrupt", True, 0, 3, "as it must be: every damaged read was rejected"),
    ("corrupt", True, 0, 0, "NOT as it must be: damage was planted and no read was rejected"),
    ("wrong", True, 2, 3, "NOT as it must be: 2 wrong values came back"),
    ("wrong", False, 2, 0, "as it must be: without verification the damage gets through"),
    ("wrong", False, 0, 0, "NOT as it must be: damage was planted and no value that came back differed"),
]


@pytest.mark.parametrize(("inject", "verify", "wrong", "failures", "says"), VERDICTS)
def test_the_verdict_says_whether_it_is_as_it_must_be(
    inject: Injection | None, verify: bool, wrong: int, failures: int, says: str
) -> None:
    report = replace(REPORT, inject=inject, verify=verify, wrong=wrong, verify_failures=failures, injected=3)
    lines = printed(report, width=200).splitlines()
    assert any(line.startswith(says) for line in lines)
    assert report.ok is not says.startswith("NOT")
    assert any(line.endswith(f"reads were {'verified' if verify else 'not verified'}") for line in lines)


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


def test_a_server_that_stopped_answering_is_never_ok() -> None:
    caught = replace(REPORT, inject="corrupt", verify_failures=3)
    shown = replace(REPORT, inject="wrong", verify=False, wrong=2)
    for good in (REPORT, caught, shown):
        assert good.ok
        assert not replace(good, outcomes={"hit": 72, "unavailable": 1}).ok


def test_green_is_only_what_is_as_it_must_be() -> None:
    def colour_of_wrong(report: Report) -> str:
        out = io.StringIO()
        report.print(Console(file=out, width=200, force_terminal=True, color_system="standard"))
        found = re.search(r"\x1b\[1;(\d+)mwrong=", out.getvalue())
        assert found
        return {"31": "red", "32": "green", "33": "yellow"}[found[1]]

    assert colour_of_wrong(REPORT) == "green"
    assert colour_of_wrong(replace(REPORT, wrong=1)) == "red"
    assert colour_of_wrong(replace(REPORT, outcomes={"unavailable": 1})) == "red"
    assert colour_of_wrong(replace(REPORT, inject="wrong", verify=False, wrong=2)) == "yellow"
    assert colour_of_wrong(replace(REPORT, inject="wrong", verify=False)) == "red"
