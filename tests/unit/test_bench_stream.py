"""What an OpenAI-compatible server streams: events wherever the bytes are cut, tokens, usage, and what is no answer."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mmcache.bench import stream
from mmcache.bench.stream import Events, Reading, Usage, first_model, usage_of, words_of
from mmcache.errors import ProtocolError

STREAM = b'data: {"a": "\xc3\xa9"}\n\n: a comment\r\nevent: x\ndata:1\ndata: 2\r\n\r\nid: 7\n\ndata: [DONE]\n\n'
EVENTS = ['{"a": "é"}', "1\n2", "[DONE]"]


def chunk(content: str | None = None, finish: str | None = None, **more: Any) -> str:
    delta = {} if content is None else {"content": content}
    choice = {"index": 0, "delta": delta | more.pop("delta", {}), "finish_reason": finish}
    return json.dumps({"choices": [choice], **more})


@pytest.mark.parametrize("size", range(1, len(STREAM) + 1))
def test_events_are_the_same_however_the_bytes_are_cut(size: int) -> None:
    events = Events()
    pieces = [STREAM[at : at + size] for at in range(0, len(STREAM), size)]
    assert [data for piece in pieces for data in events.feed(piece)] == EVENTS


def test_an_event_without_its_end_is_none() -> None:
    assert list(Events().feed(b"data: 1\n")) == []


def feed(piece: bytes, times: int) -> None:
    events = Events()
    for _ in range(times):
        list(events.feed(piece))


def test_what_is_too_long_or_no_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ProtocolError, match="a line of the answer is longer than 1 MiB"):
        feed(b"x" * (1 << 15), 40)
    with pytest.raises(ProtocolError, match="not UTF-8"):
        list(Events().feed(b"data: \xff\n"))
    monkeypatch.setattr(stream, "MAX_ANSWER_NBYTES", 1 << 20)
    with pytest.raises(ProtocolError, match="longer than 1 MiB"):
        feed(b": a comment\n" * 100, 1000)


def test_the_first_token_is_the_first_text_and_not_the_role() -> None:
    reading = Reading()
    reading.take(chunk("", delta={"role": "assistant"}), 1.0)
    assert reading.chunks == 0
    reading.take(chunk("a"), 2.0)
    reading.take(chunk("b"), 2.5)
    reading.take(chunk("", "stop"), 2.6)
    reading.take(json.dumps({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 3}}), 2.7)
    reading.take("[DONE]", 2.8)
    assert (reading.first_s, reading.last_s, reading.ended_s, reading.longest_gap_s) == (2.0, 2.5, 2.8, 0.5)
    assert (reading.text, reading.finished, reading.done) == ("ab", True, True)
    assert reading.usage == Usage(9, 3, None)
    assert reading.itl_s() == 0.25


def test_tokens_that_come_at_one_moment_have_no_time_between_them() -> None:
    reading = Reading()
    for text in "abc":
        reading.take(chunk(text), 2.0)
    assert (reading.chunks, reading.itl_s(), reading.longest_gap_s) == (3, None, 0.0)


def test_half_a_character_held_back_is_a_token() -> None:
    reading = Reading()
    reading.take(chunk("", delta={"role": "assistant"}), 1.0)
    reading.take(chunk(""), 2.0)
    reading.take(chunk("é"), 3.0)
    assert (reading.first_s, reading.chunks, reading.itl_s()) == (2.0, 2, 1.0)


@pytest.mark.parametrize("delta", [{"reasoning_content": "so"}, {"reasoning": "so"}, {"tool_calls": [{"index": 0}]}])
def test_reasoning_and_tool_calls_are_tokens(delta: dict[str, Any]) -> None:
    reading = Reading()
    reading.take(chunk(None, delta=delta), 4.0)
    assert reading.first_s == 4.0


def test_an_empty_answer_ends_when_its_reason_comes() -> None:
    reading = Reading()
    reading.take(chunk("", delta={"role": "assistant"}), 1.0)
    reading.take(chunk("", "stop"), 2.0)
    assert (reading.first_s, reading.finished, reading.itl_s(), reading.text) == (2.0, True, None, "")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ('{"error": {"message": "out of \\u001b[31mmemory", "code": 500}}', "the server broke off: out of  [31mmemory"),
        ("not json", "no JSON object: not json"),
        ("[" * 100_000, "no JSON object"),
        ("[]", "no JSON object"),
        ('{"choices": 7}', "choices are no objects"),
        ('{"choices": [7]}', "choices are no objects"),
        ('{"choices": [{"delta": [1]}]}', "delta is no object"),
        ('{"usage": 7}', "usage is no object"),
        ('{"usage": {"prompt_tokens": -1}}', "usage counts no tokens"),
    ],
)
def test_what_is_no_chunk_is_refused(data: str, says: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        Reading().take(data, 1.0)
    assert says in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("found", "cached"),
    [
        ({}, None),
        ({"prompt_tokens_details": None}, None),
        ({"prompt_tokens_details": {"cached_tokens": None}}, None),
        ({"prompt_tokens_details": {"cached_tokens": 0}}, 0),
        ({"prompt_tokens_details": {"cached_tokens": 96}}, 96),
    ],
)
def test_cached_tokens_may_be_missing(found: dict[str, Any], cached: int | None) -> None:
    assert usage_of({"prompt_tokens": 100, "completion_tokens": 4, **found}) == Usage(100, 4, cached)


@pytest.mark.parametrize("details", [[96], {"cached_tokens": "96"}, {"cached_tokens": True}, {"cached_tokens": 1.5}])
def test_cached_tokens_that_are_no_number_are_refused(details: object) -> None:
    with pytest.raises(ProtocolError):
        usage_of({"prompt_tokens": 100, "completion_tokens": 4, "prompt_tokens_details": details})


def test_the_first_model_is_named() -> None:
    assert first_model(b'{"data": [{"id": "m"}, {"id": "n"}]}') == "m"
    for body in (b"", b"\xff", b"{}", b'{"data": []}', b'{"data": [{}]}', b'{"data": {"id": "m"}}'):
        with pytest.raises(ProtocolError):
            first_model(body)


def test_the_words_of_an_error_are_short_and_harmless() -> None:
    assert words_of('{"error": {"message": "too long"}}') == "too long"
    assert words_of('{"message": "too long"}') == "too long"
    assert words_of('{"error": "no"}') == "no"
    assert words_of('{"error": {"code": 3}}') == '{"code": 3}'
    assert words_of("<html>\x1b[2J") == "<html> [2J"
    assert len(words_of("x" * 10_000)) < 310
