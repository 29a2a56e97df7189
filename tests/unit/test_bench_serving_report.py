"""The report of `mmcache bench serve`: what counts, what is missing, and what to know before a figure is believed."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from mmcache.bench.samples import Sample
from mmcache.bench.serving import ServeOptions
from mmcache.bench.serving_report import Served, ServeReport
from mmcache.errors import ConfigError

ANSWER = Sample(0.0, 0.2, 0.01, 0.02, 0.5, 1000, 8, 0, "abc")
HIT = replace(ANSWER, ttft_s=0.05, cached_tokens=960)


def report(*columns: list[Sample], **options: Any) -> ServeReport:
    urls = [f"http://{name}:1/v1" for name in "ab"[: len(columns)]]
    work = ServeOptions(urls=urls, **options).facts()
    served = [Served(url[7], url, "m", samples) for url, samples in zip(urls, columns, strict=True)]
    return ServeReport(work, [(f"images {i}, question 1", 0) for i in range(len(columns[0]))], served, 1.0)


def printed(found: ServeReport) -> str:
    console = Console(width=200, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    found.print(console)
    console.file.close()
    return console.export_text()


def test_two_servers_are_compared_request_by_request() -> None:
    found = report([ANSWER] * 100, [HIT] * 99 + [Sample(error="gone")]).to_dict()
    assert found["pairs"]["ttft_s"] == {"pairs": 99, "of_medians": 0.25, "q1": 0.25, "median": 0.25, "q3": 0.25}
    assert (found["pairs"]["same_answers"], found["pairs"]["compared_answers"]) == (99, 99)
    assert [server["cached_share"] for server in found["servers"]] == [0.0, 0.96]
    assert found["servers"][0]["ttft_s"]["p99"] == 0.2
    assert found["servers"][1]["ttft_s"]["p99"] is None
    assert found["servers"][1]["errors"] == {"gone": 1}
    assert (found["ok"], found["complaints"]) == (False, ["b: 1 request of 100 failed (gone)"])
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_what_a_server_does_not_report_is_said_with_what_to_switch_on() -> None:
    silent = report([replace(ANSWER, cached_tokens=None)] * 30)
    assert "--enable-prompt-tokens-details" in silent.notes()[0]
    assert silent.to_dict()["servers"][0]["cached_share"] is None
    assert "not reported" in printed(silent)
    mute = report([replace(ANSWER, cached_tokens=None, prompt_tokens=None)] * 30)
    assert "include_usage" in mute.notes()[0]
    assert report([ANSWER] * 30).notes() == []


def test_few_answers_and_a_late_sender_are_said() -> None:
    assert "5 answers are few" in report([ANSWER] * 5).notes()[0]
    assert "(few)" in printed(report([ANSWER] * 5))
    late = report([ANSWER] * 29 + [replace(ANSWER, late_s=0.1)]).notes()
    assert len(late) == 1
    assert "sent up to 100.0 ms late" in late[0]


def test_answers_in_one_piece_and_models_of_two_names_are_said() -> None:
    whole = replace(ANSWER, itl_s=None, longest_gap_s=None)
    assert report([whole] * 10 + [ANSWER] * 20).notes() == []
    (note,) = report([whole] * 20 + [ANSWER] * 10).notes()
    assert "20 answers of several tokens came in one piece" in note
    assert report([replace(whole, completion_tokens=1)] * 30).notes() == []
    one, other = report([ANSWER] * 30, [ANSWER] * 30).served
    assert "asked everything twice" in replace(report([ANSWER] * 30), served=[one, one]).notes()[0]
    assert "different names" in replace(report([ANSWER] * 30), served=[one, replace(other, model="n")]).notes()[0]


def test_every_reason_is_told_and_what_was_not_asked_hides_none() -> None:
    errors = [Sample(error="HTTP 500")] * 2 + [Sample(error="not asked")] * 9
    assert report(errors).complaints() == ["a: 11 requests of 11 failed (2 x HTTP 500; 9 x not asked)"]
    (said,) = report([Sample(error=f"reason {number}") for number in range(5)]).complaints()
    assert said.endswith("1 x reason 2; ...)")


def test_one_server_twice_has_two_names() -> None:
    assert ServeOptions(urls=["http://a/v1"] * 2).labels == ["a (1)", "a (2)"]
    assert ServeOptions(urls=["http://a/v1", "http://b"], names=["x", "x"]).labels == ["x (1)", "x (2)"]
    assert ServeOptions(urls=["http://a/v1", "http://b/v1"]).labels == ["a", "b"]


def test_the_table_has_every_figure_and_nothing_is_markup() -> None:
    first = [replace(ANSWER, ttft_s=0.001 * i) for i in range(1, 101)]
    text = printed(replace(report(first, [HIT] * 100), served=[
        Served("[red]plain", "http://a/v1", "m", first), Served("hot", "http://b/v1", "m", [HIT] * 100)
    ]))  # fmt: skip
    (row, *_) = [line.split() for line in text.splitlines() if line.strip().startswith("[red]plain")]
    assert row == ["[red]plain", "100", "25.8", "50.5", "75.2", "90.1", "99.0"]
    assert "time to first token, hot / [red]plain: 0.990 (medians)" in text
    assert "same answers: 100 of 100" in text
    assert "96.0%" in text


def test_nothing_answered_is_reported_too() -> None:
    found = report([Sample(error="no [/bold]")] * 3, [Sample(error="no")] * 3)
    text = printed(found)
    assert "3 requests of 3 failed (no [/bold])" in text
    assert found.to_dict()["pairs"]["ttft_s"] is None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"urls": []}, "once or twice"),
        ({"urls": ["http://a/v1"] * 3}, "once or twice"),
        ({"names": ["a", "b"]}, "as many --name"),
        ({"urls": ["ftp://a/v1"]}, "no http or https URL"),
        ({"urls": ["http:///v1"]}, "no http or https URL"),
        ({"urls": ["http://a:0/v1"]}, "no http or https URL"),
        ({"urls": ["http://a:x/v1"]}, "is no URL"),
        ({"urls": ["http://me:secret@a/v1"]}, "--api-key-file"),
        ({"urls": ["http://a/v1?key=secret"]}, "a query"),
        ({"workload": "poems"}, "captioning or chat"),
        ({"requests": 0}, "--requests 0"),
        ({"questions": 99}, "--questions 99"),
        ({"images": -1}, "--images -1"),
        ({"image_size": (0, 5)}, "--image-size 0"),
        ({"image_size": (5, 5000)}, "--image-size 5000"),
        ({"max_tokens": 0}, "--max-tokens 0"),
        ({"text_tokens": 1 << 21}, "--text-tokens"),
        ({"rate": 0.0}, "--rate"),
        ({"rate": math.nan}, "--rate"),
        ({"rate": 1.0, "concurrency": 2}, "leave out --concurrency"),
        ({"timeout_s": 0.0}, "--timeout-s"),
        ({"seed": -1}, "--seed"),
        ({"extra_body": {"stream": False}}, "may not set stream"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        ServeOptions(**{"urls": ["http://a/v1"]} | options)
    assert "secret" not in str(caught.value) or "query" in says


def test_the_api_key_is_in_no_text() -> None:
    options = ServeOptions(urls=["http://a/v1"], api_key="sk-secret")
    assert "sk-secret" not in repr(options) + json.dumps(options.facts())
