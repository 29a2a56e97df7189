"""`mmcache bench serve`: ask running OpenAI-compatible servers, measure when their answers come.

Two servers are asked the same requests, in turns: which comes first alternates, so that a busy machine slows both.
Requests arrive when they arrive (an open loop, `rate`), or as askers become free (a closed one, `concurrency`).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from mmcache.bench import extras, prompts
from mmcache.bench.openai_client import OpenAIServer, base_url
from mmcache.bench.prompts import Prompt, Shape
from mmcache.bench.run import Progress
from mmcache.bench.samples import Sample, arrivals_s, characters_per_token
from mmcache.bench.serving_report import Served, ServeReport
from mmcache.bench.stream import Usage
from mmcache.errors import ConfigError, TransportError

MAX_SERVERS: Final = 2
MAX_REQUESTS: Final = 10_000
GIVE_UP: Final = 10  # errors in a row after which a server is not asked any more
PROBES: Final = (200, 400)  # characters; the server's count of their tokens says how long its tokens are
OURS: Final = {"messages", "model", "stream", "stream_options", "max_tokens"}  # not for --extra-body


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """What to ask, and how fast.

    Attributes:
        urls, names: one or two servers, and what the report calls them.
        text_tokens: about how many tokens of made-up text each medium's, or conversation's, first message has.
        rate: requests a second, at random moments; infinite: `concurrency` askers, each with one request at a time.
        warm_up: requests of another seed that each server answers first.
        extra_body: more fields of each request's body, such as {"ignore_eos": true}.
        proxy: take proxies from the environment.
    """

    urls: Sequence[str]
    names: Sequence[str] = ()
    workload: str = "captioning"
    requests: int = 60
    questions: int = 4
    images: int = 2
    image_size: tuple[int, int] = (448, 336)
    text_tokens: int = 256
    max_tokens: int = 32
    rate: float = math.inf
    concurrency: int = 1
    warm_up: int = 2
    timeout_s: float = 120.0
    model: str | None = None
    api_key: str = field(default="", repr=False)
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    proxy: bool = False

    def __post_init__(self) -> None:
        if not 1 <= len(self.urls) <= MAX_SERVERS:
            raise ConfigError(f"{len(self.urls)} servers to ask: give --url once or twice")
        if len(self.names) not in (0, len(self.urls)):
            raise ConfigError("give as many --name as --url, or none")
        for url in self.urls:
            base_url(url)
        if self.workload not in prompts.WORKLOADS:
            raise ConfigError(f"workload {self.workload!r} is unknown: choose {' or '.join(prompts.WORKLOADS)}")
        for name, number, most in (
            ("requests", self.requests, MAX_REQUESTS),
            ("questions", self.questions, len(prompts.ASKED)),
            ("max-tokens", self.max_tokens, 1 << 20),
            ("concurrency", self.concurrency, 1024),
            ("image-size", min(self.image_size), 4096),
            ("image-size", max(self.image_size), 4096),
        ):
            if not 1 <= number <= most:
                raise ConfigError(f"--{name} {number} is out of range: choose 1 to {most:,}")
        for name, number, most in (
            ("images", self.images, 64),
            ("text-tokens", self.text_tokens, 1 << 20),
            ("warm-up", self.warm_up, 100),
        ):
            if not 0 <= number <= most:
                raise ConfigError(f"--{name} {number} is out of range: choose 0 to {most:,}")
        if not self.rate > 0 or not 0 < self.timeout_s < math.inf or self.seed < 0:
            raise ConfigError("--rate and --timeout-s are above 0, and --seed is not below 0")
        if self.rate < math.inf and self.concurrency > 1:
            raise ConfigError("--rate sends requests when they arrive, whatever is under way: leave out --concurrency")
        if taken := OURS & self.extra_body.keys():
            raise ConfigError(f"--extra-body may not set {', '.join(sorted(taken))}; there are options for them")

    @property
    def labels(self) -> list[str]:
        """What the report calls the servers: by number, too, where they would be called the same."""
        found = list(self.names) or [base_url(url).split("://", 1)[1].removesuffix("/v1") for url in self.urls]
        same = len(set(found)) < len(found)
        return [f"{name} ({number})" for number, name in enumerate(found, 1)] if same else found

    def facts(self) -> dict[str, Any]:
        """What the report says of the workload."""
        told = {
            "requests": self.requests,
            "questions": self.questions,
            "images": self.images,
            "image_size": list(self.image_size) if self.images else None,
            "text_tokens": self.text_tokens,
            "max_tokens": self.max_tokens,
            "rate": None if self.rate == math.inf else self.rate,
            "concurrency": self.concurrency if self.rate == math.inf else None,
            "warm_up": self.warm_up,
            "timeout_s": self.timeout_s,
            "extra_body": dict(self.extra_body),
            "seed": self.seed,
        }
        return {"name": self.workload, **told}


def run(options: ServeOptions, progress: Progress | None = None) -> ServeReport:
    """Ask and report. `progress` is called with (answers, answers in all).

    Raises:
        ConfigError: options that cannot work, or libraries that are not installed.
        TransportError: a server that lists no model, or that answers no request of the warm-up.
    """
    extras.load("aiohttp", "serve")
    if options.images:
        extras.check("serve")
    return asyncio.run(_run(options, progress or (lambda done, total: None)))


async def _run(options: ServeOptions, progress: Progress) -> ServeReport:
    async with contextlib.AsyncExitStack() as stack:
        servers = [
            await stack.enter_async_context(
                OpenAIServer(url, api_key=options.api_key, timeout_s=options.timeout_s, proxy=options.proxy)
            )
            for url in options.urls
        ]
        models = [options.model or await server.first_model() for server in servers]
        askers = [_Asker(server, model, options) for server, model in zip(servers, models, strict=True)]
        characters, *_ = [await _probe(asker) for asker in askers]
        shape = Shape(
            workload=options.workload,
            requests=options.requests,
            questions=options.questions,
            images=options.images,
            size=options.image_size,
            characters=round(options.text_tokens * characters),
            seed=str(options.seed),
        )
        asked = await asyncio.to_thread(prompts.prompts, shape)
        await _warm_up(askers, shape, options.warm_up)
        started = time.perf_counter()
        run = _Run(askers, asked, progress)
        await (run.closed(options.concurrency) if options.rate == math.inf else run.open(options))
        wall_s = time.perf_counter() - started
    served = [
        Served(label, server.url, model, samples)
        for label, server, model, samples in zip(options.labels, servers, models, run.samples(), strict=True)
    ]
    return ServeReport(
        workload={**options.facts(), "characters_per_token": round(characters, 2)},
        requests=[(prompt.name, prompt.place) for prompt in asked],
        served=served,
        wall_s=wall_s,
    )


class _Asker:
    """One server with its model, and how many errors in a row it gave."""

    def __init__(self, server: OpenAIServer, model: str, options: ServeOptions) -> None:
        self.server, self._model, self._options = server, model, options
        self._failed = 0
        self.tells_of_text = False  # whether a prompt of text is said to have so many cached tokens, 0 included

    async def body(self, messages: Sequence[prompts.Message], max_tokens: int | None = None) -> bytes:
        """The request as it is sent, made on another thread: pictures make it large."""
        wanted = {
            "model": self._model,
            "messages": messages,
            "max_tokens": max_tokens or self._options.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0,
            **self._options.extra_body,
        }
        return (await asyncio.to_thread(json.dumps, wanted)).encode()

    async def sample(self, body: bytes, due_s: float | None = None) -> Sample:
        """Ask, now or at `due_s` of `time.perf_counter`, from which times count."""
        if self._failed >= GIVE_UP:
            return Sample(error=f"not asked: {GIVE_UP} requests in a row had failed")
        if due_s is not None:
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
        sent_s = time.perf_counter()
        since_s = sent_s if due_s is None else due_s
        reading, error = await self.server.ask(body)
        self._failed = self._failed + 1 if error else 0
        if error or reading.first_s is None:
            return Sample(late_s=sent_s - since_s, error=error or "an answer without a token")
        usage = reading.usage
        return Sample(
            late_s=sent_s - since_s,
            ttft_s=reading.first_s - since_s,
            itl_s=reading.itl_s(),
            longest_gap_s=reading.longest_gap_s or None,
            total_s=reading.ended_s - since_s,
            prompt_tokens=usage.prompt if usage else None,
            completion_tokens=usage.completion if usage else None,
            cached_tokens=self._cached_tokens(usage),
            answer=hashlib.sha256(reading.text.encode(errors="surrogatepass")).hexdigest()[:16],
        )

    def _cached_tokens(self, usage: Usage | None) -> int | None:
        """A 0 only from a server that says it of text too: SGLang 0.5.23 without --enable-cache-report says it of each
        prompt with images, cached or not (its entrypoints/openai/usage_processor.py)."""
        return usage.cached if usage and (usage.cached or self.tells_of_text) else None


class _Run:
    """The requests, and what each server made of them."""

    def __init__(self, askers: Sequence[_Asker], asked: Sequence[Prompt], progress: Progress) -> None:
        self._askers, self._asked, self._progress = askers, asked, progress
        self._samples: list[dict[int, Sample]] = [{} for _ in askers]

    def samples(self) -> list[list[Sample]]:
        """By server, in order of the requests."""
        return [[found[index] for index in range(len(self._asked))] for found in self._samples]

    async def closed(self, concurrency: int) -> None:
        """`concurrency` askers; each takes the next request and asks one server, then the other."""
        waiting = iter(range(len(self._asked)))

        async def work(indices: Iterator[int]) -> None:
            for index in indices:
                for place in self._order(index):
                    await self._ask(place, index, await self._body(place, index))

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(work(waiting))

    async def open(self, options: ServeOptions) -> None:
        """Each request at its moment, at every server."""
        due_s = arrivals_s(len(self._asked), options.rate, options.seed)
        start_s = time.perf_counter() + 0.1
        async with asyncio.TaskGroup() as group:
            for index, after_s in enumerate(due_s):
                bodies = [(place, await self._body(place, index)) for place in self._order(index)]
                await asyncio.sleep(max(0.0, start_s + after_s - time.perf_counter() - 0.05))
                for place, body in bodies:
                    group.create_task(self._ask(place, index, body, start_s + after_s))

    def _order(self, index: int) -> list[int]:
        places = list(range(len(self._askers)))
        return places[::-1] if index % 2 else places

    async def _body(self, place: int, index: int) -> bytes:
        return await self._askers[place].body(self._asked[index].messages)

    async def _ask(self, place: int, index: int, body: bytes, due_s: float | None = None) -> None:
        self._samples[place][index] = await self._askers[place].sample(body, due_s)
        self._progress(sum(map(len, self._samples)), len(self._askers) * len(self._asked))


async def _probe(asker: _Asker) -> float:
    """Characters per token, from the server's count of two texts' tokens; 4, as of English, where it counts none. Notes
    whether it counts cached ones."""
    counted = []
    for characters in PROBES:
        text = prompts.made_up(random.Random(f"probe {characters}"), characters)
        reading, error = await asker.server.ask(await asker.body([{"role": "user", "content": text}], 1))
        if error:
            raise TransportError(f"{asker.server.url} does not answer a chat of {characters} characters: {error}")
        if reading.usage is None:
            return 4.0
        asker.tells_of_text = reading.usage.cached is not None
        counted.append((characters, reading.usage.prompt))
    return characters_per_token(*counted)


async def _warm_up(askers: Sequence[_Asker], shape: Shape, requests: int) -> None:
    """Requests like those that count, of another seed. Raises TransportError where one fails."""
    if not requests:
        return
    other = replace(shape, requests=requests, seed=f"{shape.seed}/warm-up")
    for prompt in await asyncio.to_thread(prompts.prompts, other):
        for asker in askers:
            sample = await asker.sample(await asker.body(prompt.messages))
            if sample.error:
                raise TransportError(
                    f"{asker.server.url} does not answer a request of this workload: {sample.error}; if it is too much "
                    "for the model, lower --text-tokens, --images, --image-size or --questions"
                )
