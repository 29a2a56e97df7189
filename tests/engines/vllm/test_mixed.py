"""Hundreds of mixed requests, while the cache is killed, stopped, damaged and too small: every answer is the plain
engine's, none is an error, every block comes back. And the comparison that says so sees wrong blocks.

`mix.py` has the requests and the troubles. What really happened is counted: `pytest -s` prints it.
"""

from __future__ import annotations

import random
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple, Self

import pytest

from mmcache.testing.values import eventually
from tests.engines.cache import Cache
from tests.engines.vllm.damage import harm
from tests.engines.vllm.encoder import sharing
from tests.engines.vllm.harness import CLOSE, VISION, Answer, Ask, Engine, Expected, Settings
from tests.engines.vllm.mix import FAULTS, LORAS, STATES, Beat, Case, beats, working_set

DEADLINE_S = 0.4
MEMORY = "6MiB"  # some 180 blocks, of a working set of over a thousand
ENGINE_BLOCKS = 44  # for five requests or so, of the 16 that may run
PATIENCE_S = 60.0
SURE = 2 * CLOSE  # two logprobs so far apart do not change places by rounding
RACE_S = 0.03  # into some steps, so that requests are looking up and loading
PLANTED = 24  # prompts for which wrong blocks are planted: mix.py begins with texts
KINDS = (
    "text", "block border", "several chunks", "decode", "adapter", "salt", "chat", "next turn", "image", "one pixel",
    "images", "video", "uuid", "forged uuid", "image and adapter",
)  # fmt: skip
OFTEN = ("preemptions", "preempted by resets", "evictions", "loads_failed", "verify_failures", "saves_refused")
ENOUGH = 10  # times that each of these happens, at least
SOUGHT = ("saves_refused", "loads_failed", "verify_failures")
CROWD = 22  # requests
CROWDS = 12  # at most, sought after the mix where chance left too little of something
MIXED: dict[str, Any] = VISION.llm | {
    "num_gpu_blocks_override": ENGINE_BLOCKS,
    "max_num_seqs": 16,
    # On CPU, vLLM 0.32 has a request without an adapter use the weights in the last slot when others in its batch have
    # one (lora_index -1 in lora/ops/torch_ops/lora_ops.py): so one slot more than there are adapters, which stays 0.
    "max_loras": len(LORAS) + 1,
}


class Run(NamedTuple):
    """How the engine loads, which mix of at least how many requests, and whether embeddings are shared, too."""

    load_mode: str
    seed: int
    requests: int
    encoder: bool = False


full = pytest.mark.full
QUICK = Run("async", 0, 700)
RUNS = [
    pytest.param(QUICK, id="async"),
    pytest.param(Run("sync", 0, 700), id="sync", marks=full),
    pytest.param(Run("async", 1, 4000), id="async, long", marks=full),
    pytest.param(Run("sync", 2, 4000), id="sync, long", marks=full),
    pytest.param(Run("async", 3, 2000, encoder=True), id="encoder cache", marks=full),
]
EXPECTED = Expected.plan(VISION, *(case.ask for case in working_set(QUICK.seed)))


class Bed:
    """One engine before one cache, which comes back empty when it is killed. Use as a context manager."""

    def __init__(self, run: Run) -> None:
        self.cache = Cache(MEMORY, pinned_share=1.0)
        url, settings = self.cache.url, Settings(VISION.model, MIXED)
        if run.encoder:  # vLLM's own encoder cache is for five pictures, then: as many embeddings as a step has tokens
            settings = sharing(settings, url, llm={"max_num_batched_tokens": 128}, deadline_s=DEADLINE_S)
        self.engine = Engine(settings, {"url": url, "load_mode": run.load_mode, "deadline_s": DEADLINE_S})

    def __enter__(self) -> Self:
        self.cache.__enter__()
        try:
            self.engine.__enter__()
        except BaseException:
            self.cache.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.engine.close()
        self.cache.__exit__()


class Mix:
    """One run of a mix: asks, troubles the cache, and compares. `counts` is what happened."""

    def __init__(self, bed: Bed, seed: int) -> None:
        self.bed, self.engine = bed, bed.engine
        self.cases = working_set(seed)
        truths = EXPECTED.of(*(case.ask for case in self.cases))
        self.truths = [_resolved(case.ask, truth) for case, truth in zip(self.cases, truths, strict=True)]
        self.chance = random.Random(seed)
        self.open: dict[str, int] = {}  # requests by name -> their case
        self.counts: Counter[str] = Counter()
        self.hits: set[int] = set()  # cases all of whose blocks were there once
        self.wrong: list[tuple[Case, Answer, Answer]] = []  # what was answered, and what should have been
        self._before = self._connector()

    # ------------------------------------------------------------------ the requests
    def run(self, plan: list[Beat]) -> None:
        """All of it, to the end of the last request."""
        began = time.monotonic()
        for beat in plan:
            self._beat(beat)
        self._drain()
        self._seek_out()
        self._stored()
        self.counts.update(self.counted())
        self.counts["seconds"] = round(time.monotonic() - began)

    def _seek_out(self) -> None:
        """What a fast machine, or a busy one, came to too seldom: requests that outgrow the engine's memory, kinds
        without a hit, blocks that are refused, loads that fail."""
        for crowd in range(CROWDS + 1):
            self.counts["preemptions"] = self.engine.call("step", what="preempted")
            grow = () if self.counts["preemptions"] >= ENOUGH else ("decode", "chat")
            missed = [kind for kind in KINDS if not self.counts[f"hits: {kind}"]]
            short = [name for name in SOUGHT if self.counted()[name] < ENOUGH]
            if crowd == CROWDS or not (grow or missed or short):
                break
            self.counts["crowds sought"] += 1
            self.engine.call("step", what="forget")
            if short:
                self._seek_failures(refused="saves_refused" in short)
            self.ask(tuple(p for p, case in enumerate(self.cases) if case.life != 0 and case.kind in (*grow, *missed)))

    def _seek_failures(self, *, refused: bool) -> None:
        """Of a crowd, have blocks refused, or loads fail."""
        if refused:
            self.bed.cache.hold()
        else:
            self.counts["entries harmed"] += harm(self.bed.cache, "flip", 0.3, self.chance.random())
        self.ask(self._some(CROWD))
        self.engine.call("flush")
        self.bed.cache.let_go()

    def ask(self, arrivals: tuple[int, ...]) -> None:
        """These cases, at once, to the end."""
        self._advance(Beat(arrivals, steps=0))
        self._drain()

    def _beat(self, beat: Beat) -> None:
        if beat.reborn:
            self._drain()
            assert self.engine.call("step", what="reborn")
        if beat.forget:
            self.counts["resets"] += 1
            self.counts["preempted by resets"] += self.engine.call("step", what="forget")
        if beat.fault:
            self.counts[beat.fault] += 1
            getattr(self, f"_{beat.fault}")(beat)
        else:
            self._advance(beat)

    def _advance(self, beat: Beat) -> None:
        self._begin(beat)
        self._finish()

    def _begin(self, beat: Beat) -> None:
        asks = {}
        for place in beat.arrivals:
            wanted, truth = self.truths[place]
            if truth.tokens or truth.error:
                self.counts["requests"] += 1
                name = f"{self.counts['requests']}"
                asks[name], self.open[name] = wanted, place
        self.engine.begin("step", what="advance", asks=asks, steps=beat.steps, aborts=beat.aborts)

    def _finish(self) -> None:
        self._compare(self.engine.finish())

    def _drain(self) -> None:
        self._compare(self.engine.call("step", what="drain"))
        assert not self.open, f"{len(self.open)} requests never ended"

    def _compare(self, ended: dict[str, dict[str, Any]]) -> None:
        for name, said in ended.items():
            place = self.open.pop(name)
            case, answer, truth = self.cases[place], Answer(**said), self.truths[place][1]
            how, _, state = answer.finish.partition(" ")
            self.counts["errors"] += how == "error"
            self.counts["refused"] += bool(answer.error)
            if how == "abort":
                self.counts[f"aborted: {state}"] += 1
                truth = _as_far(truth, answer)
            self.counts["compared"] += bool(answer.tokens)
            self.counts[f"hits: {case.kind}"] += answer.external > 0
            if answer.hit:
                self.hits.add(place)
            if not answer.same(truth):
                self.wrong.append((case, answer, truth))

    def _connector(self) -> Counter[str]:
        counters = self.engine.counters()
        encoder = {f"encoder: {name}": count for name, count in counters.get("encoder", {}).items()}
        return Counter(counters["scheduler"]) + Counter(counters["worker"]) + Counter(encoder)

    def counted(self) -> Counter[str]:
        """What the connector counted in this mix."""
        return self._connector() - self._before

    # ------------------------------------------------------------------ the troubles
    def _killed(self, beat: Beat) -> None:
        self._stored()
        self._begin(beat)
        time.sleep(self.chance.uniform(0, RACE_S))
        self.bed.cache.kill()
        self._finish()
        self.bed.cache.start()
        self._answers_again()

    def _stopped(self, beat: Beat) -> None:
        self._begin(beat)
        time.sleep(self.chance.uniform(0, RACE_S))
        self.bed.cache.suspend()
        until = time.monotonic() + 2 * DEADLINE_S
        self._finish()
        while time.monotonic() < until:
            self._advance(replace(beat, arrivals=self._some(1), aborts=()))
        self.bed.cache.resume()
        self._answers_again()

    def _flipped(self, beat: Beat) -> None:
        self._harmed("flip", 0.3, beat)

    def _reshaped(self, beat: Beat) -> None:
        self._harmed("reshape", 0.3, beat)

    def _swapped(self, beat: Beat) -> None:
        self._harmed("swap", 0.6, beat)

    def _forgotten(self, beat: Beat) -> None:
        self._harmed("forget", 0.5, beat)

    def _harmed(self, how: str, share: float, beat: Beat) -> None:
        """While requests look for what is harmed, or just before."""
        self._begin(beat)
        time.sleep(self.chance.choice([0.0, self.chance.uniform(0, RACE_S)]))
        self.counts["entries harmed"] += harm(self.bed.cache, how, share, self.chance.random())
        self._finish()

    def _refusing(self, beat: Beat) -> None:
        self.bed.cache.hold()
        self._advance(beat)
        self._advance(replace(beat, arrivals=self._some(6)))
        self.bed.cache.let_go()

    def _stored(self) -> None:
        """Note what the cache did, before it is gone."""
        self.counts["evictions"] += self.bed.cache.counters()["evictions"]

    def _answers_again(self) -> None:
        """More requests until the engine stores, or finds, blocks again."""
        until, before = time.monotonic() + PATIENCE_S, self._blocks_moved()
        while self._blocks_moved() == before:
            assert time.monotonic() < until, f"the cache is never asked again\n{self.engine.log()[-4000:]}"
            self.engine.call("step", what="forget")
            self._advance(Beat(self._some(1), steps=20))

    def _blocks_moved(self) -> int:
        counters = self._connector()
        return counters["blocks_saved"] + counters["blocks_present"] + counters["blocks_loaded"]

    def _some(self, count: int) -> tuple[int, ...]:
        anywhere = [place for place, case in enumerate(self.cases) if case.life is None]
        return tuple(self.chance.choices(anywhere, k=count))


def _resolved(wanted: Ask, truth: Answer) -> tuple[Ask, Answer]:
    """An ask as it is sent, with the plain engine's answer to it: a chat's next turn follows the plain engine's words,
    and no answer goes on to a token that rounding alone might change."""
    if "then" in wanted:
        others = {name: value for name, value in wanted.items() if name not in ("text", "then")}
        wanted = others | {"tokens": truth.prompt, "max_tokens": wanted["max_tokens"]}
        truth = replace(truth, tokens=truth.tokens[-len(truth.logprobs) :])
    if truth.error:
        return wanted, truth
    sure = truth.sure(SURE)
    return wanted | {"max_tokens": sure}, replace(truth, tokens=truth.tokens[:sure])


def _as_far(truth: Answer, answer: Answer) -> Answer:
    """The truth of an answer that was cut off."""
    prompt = truth.prompt if answer.prompt else []
    return replace(truth, tokens=truth.tokens[: len(answer.tokens)], prompt=prompt, finish=answer.finish)


def _table(run: Run, counts: Counter[str]) -> str:
    """What happened, but for what clients count as well."""
    told = [f"{name} {count}" for name, count in sorted(counts.items()) if not name.startswith(("client_", "load_"))]
    head = f"{run}: {counts['compared']} answers of {counts['requests']} requests compared"
    return "\n  ".join([head, *textwrap.wrap(", ".join(told), 110)])


@pytest.fixture(scope="module", params=RUNS)
def started(request: pytest.FixtureRequest) -> Iterator[tuple[Bed, Run]]:
    run: Run = request.param
    Expected.plan(VISION, *(case.ask for case in working_set(run.seed))).prepare()
    with Bed(run) as bed:
        yield bed, run


def test_every_answer_is_the_plain_engines_whatever_happens(started: tuple[Bed, Run]) -> None:
    bed, run = started
    mix = Mix(bed, run.seed)
    mix.run(beats(run.seed, mix.cases, run.requests))
    counts = mix.counts
    print(_table(run, counts))
    assert not mix.wrong, (len(mix.wrong), mix.wrong[:3])
    assert not counts["errors"]
    assert counts["requests"] >= run.requests
    bed.engine.reset()  # every block was given back
    assert "Traceback" not in bed.engine.log(), bed.engine.log().partition("Traceback")[2][:4000]
    for name in FAULTS:
        assert counts[name] >= 2, name
    for state in STATES:
        assert counts[f"aborted: {state}"] or (state == "loading" and run.load_mode == "sync"), state
    for kind in KINDS:
        assert counts[f"hits: {kind}"], kind
    for name in (*OFTEN, *(["encoder: items_hit"] if run.encoder else [])):
        assert counts[name] >= ENOUGH, name


@pytest.mark.parametrize("share", [0.1, 1.0], ids=["a tenth", "all blocks"])
def test_the_comparison_sees_blocks_that_changed_places(started: tuple[Bed, Run], share: float) -> None:
    """Their checksums are right, so nothing else can."""
    bed, run = started
    mix = Mix(bed, run.seed)
    harm(bed.cache, "forget", 1.0, 0)

    planted = {place for place, (_, truth) in enumerate(mix.truths[:PLANTED]) if truth.tokens and truth.reusable}
    seen: set[int] = set()

    def hits() -> int:
        """Ask, with nothing in vLLM's own cache; 0 where a load failed, as what it was for is computed."""
        before, failed = mix.counts["hits: text"], mix.counted()["loads_failed"]
        mix.hits.clear()
        mix.wrong.clear()
        bed.engine.reset()
        mix.ask(tuple(range(PLANTED)))
        bed.engine.reset()
        bed.engine.call("flush")
        return mix.counts["hits: text"] - before if mix.counted()["loads_failed"] == failed else 0

    def stored() -> bool:
        seen.update(mix.hits if hits() else ())
        assert not mix.wrong
        return seen >= planted

    # Asked again, as a cache on a machine that stands still does not answer in time.
    eventually(stored, "all blocks are stored", PATIENCE_S)
    assert harm(bed.cache, "exchange", share, 0) >= 2
    found = eventually(lambda: (count := hits()) >= PLANTED / 2 and mix.wrong and count, "it is seen", PATIENCE_S)
    assert len(mix.wrong) >= (found if share == 1 else 1)
