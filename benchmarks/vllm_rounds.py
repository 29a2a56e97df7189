"""What bench_vllm.py measures: engines that take turns at the same work, so that a busy machine slows all of them."""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

import mmcache
from mmcache.testing.process import ServerProcess
from tests.engines.vllm.harness import Answer, Ask, Engine, Settings, ask

LENGTHS: Final = (2048, 4096)  # tokens that a hit saves
MORE: Final = 2  # tokens of the prompt, since an engine must compute one; of one more, ExampleConnector finds nothing
CROWD: Final = 16  # requests at once
TAIL: Final = 8  # tokens of each that the others do not have
CROWD_LENGTH: Final = 2048
MISSES: Final = {2048: 3, 4096: 3}  # further prompts that are only computed, by length, each round
DECODERS: Final = 8  # requests that decode together
DECODE_PROMPT: Final = 60  # tokens; the first block is full, and stored, after four steps, the second after 36
DECODE_STEPS: Final = 64
DECODE_TURNS: Final = 4  # of ABBA, each round
MODEL: Final[dict[str, Any]] = {
    "load_format": "dummy",
    "max_model_len": 8192,
    "max_num_batched_tokens": 8192,
    "max_num_seqs": CROWD,
    "num_gpu_blocks_override": 640,  # soon all written once: the first touch of a page can cost more than what it holds
    "enable_prefix_caching": True,
}
ENVIRONMENT: Final = {"OMP_NUM_THREADS": str(os.cpu_count())}
OURS: Final = ("async", "sync")
Prompt = list[int]


@dataclass
class Times:
    """Everything measured, in seconds. Lists of one row are in the order of the rounds, so that rows can be paired."""

    hit: dict[tuple[str, int], list[float]] = field(default_factory=lambda: defaultdict(list))
    miss: dict[tuple[str, int], list[float]] = field(default_factory=lambda: defaultdict(list))
    crowd: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    decode: dict[str, list[dict[str, float]]] = field(default_factory=lambda: defaultdict(list))
    calls: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))


def measure(rounds: int, hits_each: int, dtype: str) -> Times:
    """Run all rounds after one that warms up and is left out.

    In a round every engine computes each new prompt once, then they take turns at answering it `hits_each` times.
    """
    times = Times()
    random = np.random.default_rng(0)
    with ServerProcess("3GiB", "--prefault") as server, contextlib.ExitStack() as stack:
        running = _engines(stack, server.url, dtype)
        for number in range(rounds + 1):
            found = times if number else Times()
            for length in LENGTHS:
                _hits(running, _prompt(random, length + MORE), length, hits_each, server.url, found)
            _misses(running, random, server.url, found)
            _crowds(running, random, hits_each, server.url, found)
            _decodes(running, random, found)
            for name in OURS:
                found.calls[name] += running[name].call("scheduler_calls")
            _say(f"round {number} of {rounds}", found)
    return times


def _prompt(random: np.random.Generator, count: int) -> Prompt:
    tokens: Prompt = random.integers(0, 256, count).tolist()
    return tokens


def _engines(stack: contextlib.ExitStack, url: str, dtype: str) -> dict[str, Engine]:
    """Four engines by name, alive until the stack is left."""
    folder = stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm", prefix="mmcache-bench-"))
    example = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": folder},
    }
    model = MODEL | {"dtype": dtype}
    files = Settings("timing", model | {"kv_transfer_config": example, "disable_hybrid_kv_cache_manager": True})
    plain = Settings("timing", model)
    wanted: dict[str, tuple[Settings, dict[str, Any] | None]] = {"plain": (plain, None), "example": (files, None)}
    # Apart, so that one mode does not find what the other stored.
    wanted |= {mode: (plain, {"url": url, "load_mode": mode, "extra_facts": {"bench": mode}}) for mode in OURS}
    return {
        name: stack.enter_context(Engine(settings, cache, ENVIRONMENT, "benchmarks.vllm_worker"))
        for name, (settings, cache) in wanted.items()
    }


def _in_turns(running: dict[str, Engine], number: int) -> Iterator[tuple[str, Engine]]:
    """Every engine, another one first each time."""
    names = list(running)
    for place in range(len(names)):
        name = names[(number + place) % len(names)]
        yield name, running[name]


def _hits(running: dict[str, Engine], prompt: Prompt, length: int, hits_each: int, url: str, found: Times) -> None:
    wanted = ask(tokens=prompt, max_tokens=1)
    misses = {}
    for name, engine in _in_turns(running, sum(prompt)):
        misses[name] = _first(engine, [wanted], fresh=True)[0]
        stored_everything(url)
    hits: dict[str, list[Answer]] = {name: [] for name in running}
    for number in range(hits_each):
        for name, engine in _in_turns(running, number):
            hits[name] += _first(engine, [wanted], fresh=name != "plain")
    for name, miss in misses.items():
        assert miss.cached == 0, f"{name}: {miss.cached} tokens of a new prompt were known"
        assert all(one.hit for one in hits[name]), f"{name}: {[one.cached for one in hits[name]]} of {length}"
        truth = misses["plain"].tokens
        assert all(one.tokens == truth for one in (miss, *hits[name])), f"{name}: not {truth}"
        found.miss[name, length].append(miss.seconds)
        found.hit[name, length] += [one.seconds for one in hits[name]]


def _misses(running: dict[str, Engine], random: np.random.Generator, url: str, found: Times) -> None:
    """New prompts, computed by engines with and without mmcache in turns."""
    some = {name: engine for name, engine in running.items() if name != "example"}
    for number, length in enumerate(length for length, count in MISSES.items() for _ in range(count)):
        wanted = ask(tokens=_prompt(random, length + MORE), max_tokens=1)
        for name, engine in _in_turns(some, number):
            (answer,) = _first(engine, [wanted], fresh=True)
            assert answer.cached == 0, f"{name}: {answer.cached} tokens of a new prompt were known"
            found.miss[name, length].append(answer.seconds)
            stored_everything(url)


def _crowds(running: dict[str, Engine], random: np.random.Generator, crowds_each: int, url: str, found: Times) -> None:
    """Requests that share all but their last tokens, all at once: seconds until the last has its first token."""
    shared = _prompt(random, CROWD_LENGTH)
    names = [name for name in running if name != "example"]
    for name in names:
        _first(running[name], [ask(tokens=[*shared, 0, 0], max_tokens=1)], fresh=True)
        stored_everything(url)
    for number in range(crowds_each):
        crowd = [ask(tokens=shared + _prompt(random, TAIL), max_tokens=1) for _ in range(CROWD)]
        answers = {}
        for name, engine in _in_turns({name: running[name] for name in names}, number):
            answers[name] = _first(engine, crowd, fresh=name != "plain")
            found.crowd[name].append(answers[name][0].seconds)
            assert all(one.cached >= CROWD_LENGTH for one in answers[name]), [one.cached for one in answers[name]]
        for name in OURS:
            assert [one.tokens for one in answers[name]] == [one.tokens for one in answers["plain"]], name
        stored_everything(url)


def _decodes(running: dict[str, Engine], random: np.random.Generator, found: Times) -> None:
    """Decode steps of one engine with and without its connector, in turns, ABBA, and with clocks on its calls."""
    engine = running["async"]
    for how in ("clocked", *(("async", "bypassed", "bypassed", "async") * DECODE_TURNS)):
        engine.reset()
        prompts = [_prompt(random, DECODE_PROMPT) for _ in range(DECODERS)]
        found.decode[how].append(engine.call("decode", prompts=prompts, steps=DECODE_STEPS, how=how))


def _first(engine: Engine, wanted: Sequence[Ask], *, fresh: bool) -> list[Answer]:
    return (engine.fresh if fresh else engine.generate)(*wanted, together=len(wanted) > 1)


def stored_everything(url: str, patience_s: float = 30.0) -> None:
    """Wait until the server has stored nothing more for a while."""
    with mmcache.connect(url) as client:
        last, since = -1, time.monotonic()
        give_up_s = since + patience_s
        while time.monotonic() < min(since + 0.3, give_up_s):
            now = client.stat()["counters"]["stored"]
            if now != last:
                last, since = now, time.monotonic()
            time.sleep(0.02)


def _say(title: str, found: Times) -> None:
    parts = [
        f"{name} {length}: {statistics.median(seconds) * 1e3:.0f}" for (name, length), seconds in found.hit.items()
    ]
    print(f"{title}: hits, ms: {', '.join(parts)}", file=sys.stderr, flush=True)
