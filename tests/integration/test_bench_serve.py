"""`mmcache bench serve` before a server that is slow, breaks off, redirects or never ends.

The server here is the fault: it speaks OpenAI's API over real HTTP and misbehaves on purpose. Real engines are asked in
tests/engines/vllm/test_bench_serve.py.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Self

import pytest
from aiohttp import web

from mmcache.bench.serving import ServeOptions, run
from tests.integration.support import Ended, in_time, run_cli

QUICK = ["--requests", "4", "--images", "0", "--text-tokens", "5", "--warm-up", "0", "--json", "-"]
Answer = Callable[[web.Request, "Talk"], Awaitable[web.StreamResponse]]


class Talk:
    """A server on a thread. `answer` answers chats after the first two, which ask for its tokens' length; `details` is
    what it says of those two beside their tokens."""

    def __init__(self, answer: Answer, details: dict[str, int] | None = None) -> None:
        self.answer = answer
        self.details = details
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.moments_s: list[float] = []
        self.connections: set[object] = set()

    def __enter__(self) -> Self:
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(ready)))
        self._thread.start()
        assert ready.wait(20)
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(20)

    async def _serve(self, ready: threading.Event) -> None:
        app = web.Application(client_max_size=64 << 20)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._chat)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        ready.set()
        await self._over.wait()
        await runner.cleanup()

    async def _models(self, request: web.Request) -> web.Response:
        if request.headers.get("Authorization") == "Bearer wrong":
            return web.json_response({"error": "Unauthorized"}, status=401)
        return web.json_response({"data": [{"id": "tiny"}]})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        self.headers.append(dict(request.headers))
        self.connections.add(request.transport)
        body = await request.json()
        self.asked.append(body)
        self.moments_s.append(time.perf_counter())
        if len(self.asked) <= 2:
            characters = sum(len(message["content"]) for message in body["messages"])
            counted = {"prompt_tokens": characters // 4, "completion_tokens": 1, "prompt_tokens_details": self.details}
            return await say(request, usage=counted)
        return await self.answer(request, self)


async def stream(request: web.Request, *pieces: bytes) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for piece in pieces:
        await response.write(piece)
    return response


async def say(request: web.Request, wait_s: float = 0.0, **more: Any) -> web.StreamResponse:
    """A right answer of three tokens, the first after `wait_s`."""
    await asyncio.sleep(wait_s)
    usage = {"prompt_tokens": 100, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 96}}
    chunks: list[dict[str, Any]] = [
        {"choices": [{"delta": {"content": text}, "finish_reason": None}]} for text in "abc"
    ]
    chunks += [{"choices": [{"delta": {}, "finish_reason": "stop"}]}, {"choices": [], "usage": usage} | more]
    events = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
    return await stream(request, (events + "data: [DONE]\n\n").encode())


async def right(request: web.Request, talk: Talk) -> web.StreamResponse:
    return await say(request)


async def says_zero(request: web.Request, talk: Talk) -> web.StreamResponse:
    details = {"cached_tokens": 0, "image_tokens": 60}
    return await say(
        request, usage={"prompt_tokens": 100, "completion_tokens": 3, "prompt_tokens_details": details}
    )  # fmt: skip


async def breaks_off(request: web.Request, talk: Talk) -> web.StreamResponse:
    return await stream(request, b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n')


async def is_cut(request: web.Request, talk: Talk) -> web.StreamResponse:
    response = await breaks_off(request, talk)
    assert request.transport is not None
    request.transport.abort()
    return response


async def says_an_error(request: web.Request, talk: Talk) -> web.StreamResponse:
    return await stream(request, b'data: {"error": {"message": "out of blocks", "code": 500}}\n\n')


async def no_json(request: web.Request, talk: Talk) -> web.StreamResponse:
    return await stream(request, b"data: {'a'}\n\n")


async def fails(request: web.Request, talk: Talk) -> web.StreamResponse:
    return web.json_response({"error": {"message": "the model is on fire"}}, status=500)


async def redirects(request: web.Request, talk: Talk) -> web.StreamResponse:
    raise web.HTTPTemporaryRedirect(f"{talk.url}/elsewhere")


async def repeats_the_key(request: web.Request, talk: Talk) -> web.StreamResponse:
    return web.json_response({"error": {"message": f"no: {request.headers['Authorization']}"}}, status=401)


async def hangs(request: web.Request, talk: Talk) -> web.StreamResponse:
    return await say(request, wait_s=30)


async def long_line(request: web.Request, talk: Talk) -> web.StreamResponse:
    return await stream(request, *[b"x" * (1 << 16)] * 20)


async def long_refusal(request: web.Request, talk: Talk) -> web.StreamResponse:
    return web.Response(status=400, body=b"x" * (3 << 20))


async def packed(request: web.Request, talk: Talk) -> web.StreamResponse:
    """A body that would grow a thousandfold, were it unpacked."""
    response = web.StreamResponse(headers={"Content-Encoding": "gzip"})
    await response.prepare(request)
    await response.write(b"\x1f\x8b")
    return response


async def does_not_stream(request: web.Request, talk: Talk) -> web.StreamResponse:
    return web.json_response({"choices": [{"message": {"content": "abc"}, "finish_reason": "stop"}]})


async def never_ends(request: web.Request, talk: Talk) -> web.StreamResponse:
    """Says all, and goes on with comments."""
    response = await say(request)
    while True:
        await response.write(b": more\n\n")
        await asyncio.sleep(0.01)


FAULTS: dict[str, tuple[Answer, str]] = {
    "breaks off": (breaks_off, "the answer ended before its end"),
    "is cut": (is_cut, "ClientPayloadError"),
    "says an error": (says_an_error, "the server broke off: out of blocks"),
    "no JSON": (no_json, "no JSON object: {'a'}"),
    "fails": (fails, "HTTP 500: the model is on fire"),
    "redirects": (redirects, "HTTP 307, a redirect, which is not followed"),
    "hangs": (hangs, "no whole answer within 5 s (--timeout-s)"),
    "a long line": (long_line, "a line of the answer is longer than 1 MiB"),
    "a long refusal": (long_refusal, "it sent more than 1 MiB"),
    "packed": (packed, "no event came; does it stream?"),
    "does not stream": (does_not_stream, "no event came; does it stream?"),
}


def serve(*words: str) -> tuple[Ended, dict[str, Any]]:
    ended = run_cli("bench", "serve", *QUICK, *words)
    return ended, json.loads(ended.stdout) if ended.stdout else {}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_an_error_with_its_reason_and_the_exit_status(fault: str) -> None:
    answer, reason = FAULTS[fault]
    with Talk(answer) as talk:
        words = ("--timeout-s", "5", "--concurrency", "4") if fault == "hangs" else ("--timeout-s", "20")
        ended, found = serve("--url", talk.url, *words)
    assert ended.returncode == 1
    (server,) = found["servers"]
    assert server["answered"] == 0
    assert list(server["errors"].values()) == [4]
    assert reason in next(iter(server["errors"]))
    assert "NOT as it must be" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert len(talk.asked) == 2 + 4  # two probes; a redirect was not followed


def test_an_answer_that_goes_on_after_its_end_is_left() -> None:
    def most_s() -> float:
        with Talk(never_ends) as talk:
            ended, found = serve("--url", talk.url, "--requests", "2")
        assert (ended.returncode, found["servers"][0]["answered"]) == (0, 2)
        assert found["wall_s"] > 1.0
        return float(found["servers"][0]["total_s"]["most"])

    in_time(most_s, 1.0)


def test_the_warm_up_says_at_once_what_does_not_work() -> None:
    with Talk(fails) as talk:
        ended = run_cli("bench", "serve", "--url", talk.url, "--images", "0", "--requests", "4")
    assert ended.returncode == 1
    assert "the model is on fire; if it is too much for the model, lower --text-tokens" in ended.stderr
    assert len(talk.asked) == 3


def test_a_server_that_only_fails_is_not_asked_for_ever() -> None:
    with Talk(fails) as talk:
        found = run(ServeOptions(urls=[talk.url], requests=30, images=0, text_tokens=5, warm_up=0)).to_dict()
    assert found["servers"][0]["errors"] == {
        "HTTP 500: the model is on fire": 10,
        "not asked: 10 requests in a row had failed": 20,
    }
    assert len(talk.asked) == 2 + 10


def test_no_server_ends_with_1_and_the_remedy() -> None:
    ended = run_cli("bench", "serve", "--url", "http://127.0.0.1:1/v1")
    assert ended.returncode == 1
    assert "is an OpenAI-compatible server there?" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_key_that_is_wanted_is_asked_for() -> None:
    with Talk(right) as talk:
        words = ["--url", talk.url, "--api-key-env", "KEY"]
        ended = run_cli("bench", "serve", *words, environment={"KEY": "wrong"})
    assert ended.returncode == 1
    assert "HTTP 401: Unauthorized; give its key: --api-key-env NAME" in ended.stderr


def test_two_servers_take_turns_at_the_same_requests(tmp_path: Path) -> None:
    page = tmp_path / "serve.html"

    async def slow(request: web.Request, talk: Talk) -> web.StreamResponse:
        return await say(request, wait_s=0.25)

    with Talk(slow) as one, Talk(right) as other:
        words = ["--url", one.url, "--url", other.url, "--name", "slow", "--name", "fast", "--html", str(page)]
        ended, found = serve(*words, "--requests", "8", "--extra-body", '{"top_k": 1}')
    assert ended.returncode == 0
    assert [server["model"] for server in found["servers"]] == ["tiny", "tiny"]
    assert one.asked == other.asked
    assert (len(one.connections), len(other.connections)) == (1, 1)  # no time to connect is in the figures
    assert all((body["top_k"], body["temperature"], body["stream"]) == (1, 0, True) for body in one.asked)
    order = [first < second for first, second in zip(one.moments_s[2:], other.moments_s[2:], strict=True)]
    assert order == [True, False] * 4
    assert found["servers"][0]["ttft_s"]["median"] > 0.25 > found["servers"][1]["ttft_s"]["median"]
    assert found["pairs"]["ttft_s"]["of_medians"] < 1
    assert (found["pairs"]["same_answers"], found["servers"][0]["cached_share"]) == (8, 0.96)
    assert found["workload"]["characters_per_token"] == pytest.approx(4, rel=0.05)
    assert page.read_text().count('<svg class="plot"') >= 7


@pytest.mark.parametrize(("details", "share"), [(None, None), ({"cached_tokens": 0}, 0.0)])
def test_no_cached_tokens_are_believed_of_a_server_that_says_so_of_text_too(
    details: dict[str, int] | None, share: float | None
) -> None:
    """SGLang without --enable-cache-report says 0 where there are pictures, and nothing where there are none."""
    with Talk(says_zero, details) as talk, Talk(right) as other:
        found = serve("--url", other.url, "--url", talk.url)[1]
    assert [server["cached_share"] for server in found["servers"]] == [0.96, share]
    assert [note for note in found["notes"] if "does not report cached tokens" in note] == found["notes"][
        : share is None
    ]


def test_an_open_loop_counts_from_when_a_request_was_due() -> None:
    """A server that stops for a second, one request at a time: those that arrive meanwhile waited, too. When that is
    may be off where the machine stops as well, but not each time."""
    assert any(waits_count_from_when_requests_were_due() for _ in range(4))


def waits_count_from_when_requests_were_due() -> bool:
    one_at_a_time = asyncio.Lock()

    async def stops(request: web.Request, talk: Talk) -> web.StreamResponse:
        async with one_at_a_time:
            return await say(request, wait_s=1.0 if len(talk.asked) == 3 else 0.0)

    with Talk(stops) as talk:
        options = ServeOptions(urls=[talk.url], requests=40, images=0, text_tokens=5, warm_up=0, rate=40.0)
        found = run(options).to_dict()
    waits_s = [request["samples"][0]["ttft_s"] for request in found["requests"]]
    assert found["ok"]
    waited = sum(wait_s > 0.3 for wait_s in waits_s) >= 10
    late_s: float = found["servers"][0]["late_s"]["median"]
    return waited and waits_s[0] > waits_s[5] > waits_s[10] and late_s < 0.1


def test_askers_each_have_one_request_under_way() -> None:
    under_way = most = 0
    all_there = asyncio.Event()

    async def counts(request: web.Request, talk: Talk) -> web.StreamResponse:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        if under_way == 3:
            all_there.set()
        await asyncio.wait_for(all_there.wait(), 10)
        answer = await say(request, wait_s=0.05)
        under_way -= 1
        return answer

    with Talk(counts) as talk:
        ended, found = serve("--url", talk.url, "--requests", "12", "--concurrency", "3")
    assert (ended.returncode, found["servers"][0]["answered"], most) == (0, 12, 3)


def test_the_api_key_comes_from_a_variable_or_a_closed_file_and_is_written_nowhere(tmp_path: Path) -> None:
    file, page = tmp_path / "key", tmp_path / "serve.html"
    file.write_text("sk-secret\n")
    file.chmod(0o600)
    with Talk(right) as talk:
        ended, _ = serve("--url", talk.url, "--api-key-file", str(file), "--html", str(page))
        assert ended.returncode == 0
        talk.answer = repeats_the_key
        talk.asked.clear()
        repeated, _ = serve("--url", talk.url, "--api-key-file", str(file), "--html", str(page))
        talk.answer = right
        again = run_cli(
            "bench", "serve", *QUICK, "--url", talk.url, "--api-key-env", "KEY", environment={"KEY": "sk-2"}
        )
        assert again.returncode == 0
        file.chmod(0o644)
        refused, _ = serve("--url", talk.url, "--api-key-file", str(file))
        empty, _ = serve("--url", talk.url, "--api-key-env", "NO_SUCH_VARIABLE")
    assert {headers["Authorization"] for headers in talk.headers} == {"Bearer sk-secret", "Bearer sk-2"}
    assert "HTTP 401: no: Bearer (the API key)" in repeated.stdout
    assert "sk-secret" not in "".join((ended.stdout, ended.stderr, repeated.stdout, repeated.stderr, page.read_text()))
    assert (refused.returncode, empty.returncode) == (2, 2)
    assert "chmod 600" in refused.stderr
    assert "NO_SUCH_VARIABLE holds no API key" in empty.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--extra-body", "[]"], "no JSON object"),
        (["--extra-body", "{"], "no JSON:"),
        (["--image-size", "448"], "give such as 448x336"),
        (["--url", "localhost:8000"], "no http or https URL"),
    ],
)
def test_bad_options_end_with_2(words: list[str], says: str) -> None:
    ended = run_cli("bench", "serve", "--url", "http://127.0.0.1:1/v1", *words)
    assert ended.returncode == 2
    assert says in ended.stderr
    assert "Traceback" not in ended.stderr
