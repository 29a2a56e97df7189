"""The vLLM connector's two sides under anything at once: no mix of requests, faults and resets gives a wrong byte."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import mmcache
from mmcache.testing.process import ServerProcess
from mmcache_connectors.vllm.groups import Group
from tests.integration.toy_blocks import Request
from tests.integration.toy_cases import CONFIGURATIONS, finish, lora, prompt, step_until, train
from tests.integration.toy_engine import ToyEngine, close_all
from tests.integration.toy_memory import keys_of, stored

pytestmark = pytest.mark.alone

STEMS = [prompt(stem, 60) for stem in range(3)]
REQUESTS = 80  # at least, and until what is to be tested has happened
WANTED = {"local_tokens": 400, "external_tokens": 400, "loads_failed": 3, "preemptions": 10}
NUM_BLOCKS = 40  # for a few requests at a time


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    close_all()


class Chaos:
    """Prompts that share beginnings, salts, adapters; memory for a few requests, a cache too small, bad and vanishing
    entries, aborts, preemption, resets. With `stale`, also what an engine's own prefix cache takes no notice of:
    adapters retrained under their names, and new weights while requests run."""

    def __init__(self, engine: ToyEngine, cache: mmcache.Client, folder: Path, seed: int, *, stale: bool) -> None:
        self.engine, self.cache, self.folder, self.stale = engine, cache, folder, stale
        self.chance = random.Random(seed)
        self.versions = {name: [train(folder / name, number)] for number, name in enumerate(("sql", "poems"))}
        self.loras = {name: lora(folder / name, number + 1, name) for number, name in enumerate(self.versions)}
        self.asked: list[Request] = []

    def run(self) -> None:
        for number in range(4 * REQUESTS):
            more = number >= REQUESTS  # what the mix has not come to by then is sought out
            if more and all(self.engine.counts[name] >= times for name, times in WANTED.items()):
                break
            request = self._request(number)
            if more:
                finish(self.engine, *list(self.engine.requests.values()))
                self.engine.forget_local()
            if more or self.chance.random() < 0.6:
                self._damage(request)
            self.asked.append(self.engine.add(request))
            if more:
                self._begin(request)
            for _ in range(self.chance.randrange(6)):
                self.engine.step()
            self._disturb(number)
        finish(self.engine, *list(self.engine.requests.values()))

    def _begin(self, request: Request) -> None:
        """Step until it runs, however long a question takes: only what runs can be preempted."""
        step_until(self.engine, lambda: request in self.engine.running or request.state == "ended", "it begins")

    def _request(self, number: int) -> Request:
        chance = self.chance
        tokens = STEMS[chance.randrange(len(STEMS))][: chance.randrange(3, 60)]
        return Request(
            f"r{number}",
            tokens + prompt(1000 + number, chance.randrange(9)),
            outputs=chance.randrange(1, 12),
            cache_salt=chance.choice([None, None, None, "a"]),
            lora_request=chance.choice([None, None, None, *self.loras.values()]),
            skip_reading_prefix_cache=chance.random() < 0.05,
        )

    def _versions(self, request: Request) -> list[tuple[str, bytes]]:
        return self.versions[request.lora_request.lora_name] if request.lora_request else [("", b"")]

    def _damage(self, request: Request) -> None:
        """An entry that it would hit vanishes, or holds something of another form."""
        facts, adapter = self.engine.facts_of(self.engine.epoch), self._versions(request)[-1][0]
        keys = keys_of(facts, request.all_token_ids, request.cache_salt or "", adapter)
        there = [key for part in self.engine.parts.of_group[-1] for key in keys.for_part(part)]
        there = [key for key, flag in zip(there, self.cache.contains(there), strict=True) if flag]
        if there:
            key = self.chance.choice(there)
            if self.cache.delete(key) == [True] and self.chance.random() < 0.8:
                self.cache.put(key, [b"another shape"])

    def _forget_local(self) -> None:
        """A reset of the engine's own prefix cache alone."""
        for request in reversed(list(self.engine.running)):
            self.engine.preempt(request)
        self.engine.forget_local()

    def _disturb(self, number: int) -> None:
        engine, chance = self.engine, self.chance
        busy = [one for one in engine.requests.values() if one.state in ("running", "loading")]
        if busy and chance.random() < 0.15:
            engine.end(chance.choice(busy))
        if engine.running and chance.random() < 0.15:
            engine.preempt(chance.choice(engine.running))
        if chance.random() < 0.4:
            self._forget_local()
        if not engine.known and chance.random() < 0.3:  # after a reset that was not clean nothing is cached
            finish(engine, *list(engine.requests.values()))
        if chance.random() < 0.04 or (not engine.known and not engine.requests):
            engine.reset(weights=chance.randrange(3) if self.stale else 0, preempting=chance.random() < 0.5)
        if self.stale and chance.random() < 0.05:
            name = chance.choice(list(self.loras))
            self.versions[name].append(train(self.folder / name, 10 + number))
            self.loras[name] = replace(self.loras[name], lora_int_id=100 + number)

    def wrong_entries(self) -> tuple[int, int]:
        """(entries stored at the end under any name a request could have had, those that hold anything wrong)."""
        found = wrong = 0
        for request in self.asked:
            for digest, weights in self._versions(request):
                for epoch, model in self.engine.epoch_weights.items():
                    told, facts = (request.cache_salt or "", weights, model), self.engine.facts_of(epoch)
                    more = stored(self.cache, self.engine.parts, facts, request.all_token_ids, told, digest)
                    found, wrong = found + more[0], wrong + more[1]
        return found, wrong


@pytest.mark.parametrize(("seed", "stale"), [(0, False), (1, False), (2, True)])
@pytest.mark.parametrize(("groups", "tp", "load_async"), CONFIGURATIONS)
def test_no_mix_of_requests_faults_and_preemption_gives_a_wrong_byte(
    groups: list[Group], tp: int, load_async: bool, seed: int, stale: bool, tmp_path: Path
) -> None:
    """In no engine, and in no entry stored; but for what an engine reads of its own stale blocks."""
    with ServerProcess("256KiB") as server, mmcache.connect(server.url) as cache:
        engine = ToyEngine(
            server.url,
            groups,
            tp=tp,
            load_async=load_async,
            num_blocks=NUM_BLOCKS,
            chunk_tokens=9,
            save_buffer_mib=64,
            audit_share=0.1,
        )
        chaos = Chaos(engine, cache, tmp_path, seed, stale=stale)
        chaos.run()
        found, wrong = chaos.wrong_entries()
        assert wrong == 0
        assert stale or engine.wrong == 0
        assert engine.forget_local()
        assert [pool.free_count() for pool in engine.pools] == [NUM_BLOCKS - 1] * len(groups)  # no block was lost
        assert all(engine.counts[name] >= times for name, times in WANTED.items()), engine.counts
        assert found > 100
