"""Prompts by the ten thousand: columns of keys made from labels, as no token of them matters. From one seed.

Two kinds of traffic. Conversations: a system prompt that many share, then a text of one's own that grows turn by turn;
the numbers are about those of the conversation trace that Mooncake published (FAST'25): 24 blocks of 512 tokens a
request on average, half of the requests shorter than 14, three in five new. Branches: documents, each asked about by
many, who go on for long. Or a trace itself, JSON lines with `hash_ids` for blocks of 512 tokens, from a file.
"""

from __future__ import annotations

import gzip
import itertools
import json
import random
from collections.abc import Callable, Iterator
from typing import Final

from blake3 import blake3

from mmcache.chain import run_bounds
from mmcache.errors import UsageError
from mmcache.keyset import NO_PARENT, Keys
from mmcache.testing.simulator.traffic import NAMESPACE

BLOCK_TOKENS: Final = 512
MOST_BLOCKS: Final = 256
SYSTEMS: Final = 8
SYSTEM_BLOCKS: Final = (1, 1, 2, 3, 5, 7, 9, 12)
NEW_SHARE: Final = 0.6
OPEN_NOW: Final = 400  # conversations that may go on at any time
DOCUMENTS_PER_SHARD: Final = 2
DOCUMENT_BLOCKS: Final = (3, 30)


class Prompt:
    """A prompt that grows; `keys` are those of all its blocks."""

    def __init__(self) -> None:
        self._chains: list[bytes] = []
        self._homes: list[bytes] = []

    def fork(self) -> Prompt:
        """Another one that begins alike."""
        other = Prompt()
        other._chains, other._homes = self._chains[:], self._homes[:]
        return other

    def grow(self, blocks: int, label: int) -> None:
        """So many blocks more, that only this label has."""
        seed = label.to_bytes(8, "little")
        for _ in range(blocks):
            token = len(self._chains) * BLOCK_TOKENS
            chain = blake3((self._chains[-1] if self._chains else NO_PARENT) + seed).digest()
            self._homes.append(chain if run_bounds(token)[0] == token else self._homes[-1])
            self._chains.append(chain)

    def __len__(self) -> int:
        return len(self._chains)

    def keys(self) -> Keys:
        """Of one part: stored keys are chain keys."""
        chains = self._chains[:]
        parents = [NO_PARENT, *chains[:-1]]
        return Keys(chains, chains, self._homes[:], [NAMESPACE.id] * len(chains), parents, range(len(chains)), parents)


def _zipf(count: int) -> list[float]:
    return list(itertools.accumulate(1 / (rank + 1) for rank in range(count)))


def conversations(draw: random.Random, _shards: int) -> Iterator[Keys]:
    """Requests without end."""
    labels = itertools.count(1)
    systems = []
    for blocks in SYSTEM_BLOCKS:
        systems.append(Prompt())
        systems[-1].grow(blocks, next(labels))
    weights = _zipf(SYSTEMS)
    going_on: list[Prompt] = []
    while True:
        if going_on and draw.random() >= NEW_SHARE:
            prompt = draw.choice(going_on)
            prompt.grow(1 + round(4 * draw.lognormvariate(0, 1.0)), next(labels))
        else:
            prompt = draw.choices(systems, cum_weights=weights)[0].fork()
            prompt.grow(1 + round(7 * draw.lognormvariate(0, 1.2)), next(labels))
            going_on.append(prompt)
        if len(prompt) >= MOST_BLOCKS or len(going_on) > OPEN_NOW:
            going_on.remove(prompt if len(prompt) >= MOST_BLOCKS else draw.choice(going_on))
        yield prompt.keys()


def branches(draw: random.Random, shards: int) -> Iterator[Keys]:
    """Requests without end."""
    labels = itertools.count(1)
    documents = []
    for _ in range(max(8, DOCUMENTS_PER_SHARD * shards)):
        documents.append(Prompt())
        documents[-1].grow(draw.randint(*DOCUMENT_BLOCKS), next(labels))
    weights = _zipf(len(documents))
    while True:
        prompt = draw.choices(documents, cum_weights=weights)[0].fork()
        prompt.grow(1 + round(6 * draw.lognormvariate(0, 0.8)), next(labels))
        yield prompt.keys()


def recorded(path: str) -> Iterator[Keys]:
    """The requests of a trace in a file, in order. Raises UsageError for what is none."""
    try:
        with gzip.open(path, "rt") if path.endswith(".gz") else open(path) as lines:
            for line in lines:
                prompt = Prompt()
                for block in json.loads(line)["hash_ids"]:
                    prompt.grow(1, int(block))
                yield prompt.keys()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path!r} is none of {', '.join(WORKLOADS)}, and no trace in a file: {error!r}") from None


def requests(workload: str, seed: int, shards: int) -> Iterator[Keys]:
    """Of a workload by name, or of the trace in a file."""
    make = WORKLOADS.get(workload)
    return recorded(workload) if make is None else make(random.Random(seed), shards)


WORKLOADS: Final[dict[str, Callable[[random.Random, int], Iterator[Keys]]]] = {
    "conversations": conversations,
    "branches": branches,
}
