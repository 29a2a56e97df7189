"""A made-up trace: sessions of several turns, shared system prompts, popular documents whose popularity drifts,
one-offs.

It exists so that an eviction policy is not judged by one recording alone. The shape is what production traces are known
for (many blocks seen once, a few shared by all, reuse after a think time); the numbers are round and belong to no
recording. Everything follows from the seed.
"""

from __future__ import annotations

import heapq
import itertools
import random
from dataclasses import dataclass
from typing import Final

from mmcache.bench.trace import Request, Trace

BLOCK_TOKENS: Final = 16
MAX_PROMPT_BLOCKS: Final = 400


@dataclass(frozen=True, slots=True)
class Shape:
    """What the requests are like. Popularity is Zipf's: the n-th most popular is asked for 1 / n**`skew` as often."""

    requests: int = 12_000
    one_off_share: float = 0.4  # of new conversations: a prompt that nobody continues or repeats
    document_share: float = 0.5  # of sessions: they begin with an image or a document
    system_prompts: int = 20
    documents: int = 2_000
    skew: float = 1.0
    drift_requests: int = 6_000  # after so many the most popular half of the documents has been replaced
    mean_turns: float = 4.0
    new_share: float = 0.35  # of requests: the rest are later turns, as long as any session waits
    think_requests: float = 400.0  # median of the requests by others between two turns; log-normal, sigma 1
    prompt_blocks: float = 12.0  # median of what a turn adds (question and answer); log-normal, sigma 0.8


class _Zipf:
    """Draws ranks 0..count-1."""

    def __init__(self, count: int, skew: float) -> None:
        self._sums = list(itertools.accumulate((rank + 1) ** -skew for rank in range(count)))

    def draw(self, rng: random.Random) -> int:
        return rng.choices(range(len(self._sums)), cum_weights=self._sums)[0]


class _Names:
    """Numbers for new blocks, and for those of shared texts under what stands before them."""

    def __init__(self) -> None:
        self._next = itertools.count()
        self._shared: dict[tuple[str, int, int], Request] = {}

    def fresh(self, count: int) -> Request:
        return tuple(itertools.islice(self._next, count))

    def shared(self, kind: str, which: int, above: int, count: int) -> Request:
        name = kind, which, above
        if name not in self._shared:
            self._shared[name] = self.fresh(count)
        return self._shared[name]


def generate(seed: int, shape: Shape = Shape()) -> Trace:
    """`shape.requests` prompts in the order of their arrival, blocks numbered from 0."""
    rng, names = random.Random(seed), _Names()
    systems, documents = _Zipf(shape.system_prompts, shape.skew), _Zipf(shape.documents, shape.skew)
    waiting: list[tuple[float, int, Request]] = []  # (when, tie, the prompt so far)
    requests: list[Request] = []

    def some_blocks(median: float, sigma: float) -> int:
        return min(MAX_PROMPT_BLOCKS, max(1, round(median * rng.lognormvariate(0, sigma))))

    for turn in range(shape.requests):
        if waiting and waiting[0][0] <= turn and rng.random() >= shape.new_share:
            prompt = heapq.heappop(waiting)[2]
            goes_on = True
        else:
            system = systems.draw(rng)
            prompt = names.shared("system", system, 0, 1 + system % 6)
            goes_on = rng.random() >= shape.one_off_share
            if goes_on and rng.random() < shape.document_share:
                # A document's number moves with time: what is popular now was unknown a while ago.
                document = documents.draw(rng) + turn * shape.documents // (2 * shape.drift_requests)
                prompt += names.shared("document", document, system, 4 + document * 7919 % 40)
        prompt = (prompt + names.fresh(some_blocks(shape.prompt_blocks, 0.8)))[:MAX_PROMPT_BLOCKS]
        requests.append(prompt)
        if goes_on and len(prompt) < MAX_PROMPT_BLOCKS and rng.random() >= 1 / shape.mean_turns:
            when = turn + shape.think_requests * rng.lognormvariate(0, 1)
            heapq.heappush(waiting, (when, turn, prompt))
    return Trace(requests, BLOCK_TOKENS)
