"""How a cluster scales: whom the real calls of many clients ask, and where they store, on shards that never fail.

Each client is a real `Conduct`. Nothing is evicted: shards are sets of keys, which count the children of each, as an
index does, and tell of forks. They fill within FILL_S, and whoever has just heard of a fork looks twice behind it.
Clients in one group share what they have heard and counted, so that each group has seen as many calls as a client that
has run for a while; whom a client chooses among equals is its own. Evenness of reads is that of the second half of the
requests, when it is known which runs are hot.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, Final

from mmcache.client.cluster_steps import Ask, Conduct, Replies, Steps, T
from mmcache.cluster.heat import WINDOW_CALLS, Heat
from mmcache.cluster.placement import View
from mmcache.cluster.routes import RAMP_S, Replicas
from mmcache.keyset import Keys
from mmcache.store.rows import FORK_CHILDREN
from mmcache.testing.simulator.faults import view_of
from mmcache.testing.simulator.prompts import BLOCK_TOKENS, requests
from mmcache.transport.base import HIT, MISS, Outcome, Result

PLACEMENTS: Final = ("blocks", "runs", "runs, hot copied")
TOKENS_PER_SHARD: Final = 1_000_000  # 57 GB of KV at 57,344 bytes a token (Qwen2.5-VL-7B)
BLOCK_NBYTES: Final = BLOCK_TOKENS * 57_344
MOST_GROUPS: Final = 64
JOINS: Final = 4
FILL_S: Final = 600.0
STORED: Final = Result(Outcome.STORED)


@dataclass(frozen=True, slots=True)
class Curve:
    """One row. `requests`: of clients, each a lookup, a read and a put. Ratios are max/mean over shards."""

    workload: str
    placement: str
    shards: int
    clients: int
    requests: int
    blocks: int
    asks: float  # shards asked for one prefix query, second looks included
    asks_least: float  # owners of what was found, and of the first block that was not: fewer cannot know
    asks_most: int
    bytes_ratio: float
    lookups_ratio: float
    reads_ratio: float
    copied: float  # bytes beyond the first copy of each block, over those
    joined: float  # bytes whose owner changes when one joins, over what the newcomer owns
    joined_share: float  # and over all
    left: float  # the same when one leaves, over what it owned
    left_share: float


class Shard:
    """What one holds, and how many of its blocks name one as their parent."""

    def __init__(self) -> None:
        self.keys: set[bytes] = set()
        self._children: Counter[bytes] = Counter()
        self.forks: set[bytes] = set()
        self.lookups = self.reads = 0

    def store(self, digest: bytes, parent: bytes) -> None:
        """One more block."""
        if digest not in self.keys:
            self.keys.add(digest)
            self._children[parent] += 1
            if self._children[parent] == FORK_CHILDREN:
                self.forks.add(parent)


class Cold(Heat):
    """Nothing is ever hot."""

    def copies(self, home: bytes, shards: int) -> int:
        """One, always."""
        return 1


class Scale:
    """Clients and shards; `serve` is one request."""

    def __init__(self, shards: int, clients: int, groups: int, *, hot: bool) -> None:
        self.view = view_of([f"shard-{number}" for number in range(shards)])
        self.shards = {member.id: Shard() for member in self.view.members}
        draw = random.Random(shards)
        self.clients = [
            Conduct(
                self.view,
                Replicas(),
                lambda name: True,
                draw=draw.getrandbits(64),
                now=0.0,
                ramp_s=RAMP_S,
                absent_s=0.0,
            )
            for _ in range(clients)
        ]
        for number, client in enumerate(self.clients):
            leader = self.clients[number % groups]
            client.router.forks = leader.router.forks
            client.router.heat = leader.router.heat if hot else Cold()
        self.homes: dict[bytes, bytes] = {}  # of each block, the home under which it was first stored
        self.asks: list[int] = []
        self.least = 0
        self.copied = 0
        self.now = 0.0

    def serve(self, number: int, keys: Keys) -> None:
        """Ask for a prompt, read what there is, store the rest."""
        conduct = self.clients[number % len(self.clients)]
        self.asks.append(0)
        count = self._run(conduct.leading(keys, self.now, inf), keys, self._count)
        needed = set(conduct.router.forks.homes(keys, self.now)[: count + 1])
        self.least += len({conduct.router.owners(home, 1) for home in needed})
        if count:
            head = keys[:count]
            read = self._run(conduct.read(head, self.now, inf), head, self._read)
            for (_, target), picked in conduct.copies(read, [BLOCK_NBYTES] * count, 1.0).items():
                for row in picked:
                    self.copied += head.digests[row] not in self.shards[target].keys
                    self.shards[target].store(head.digests[row], head.parents[row])
        if count < len(keys):
            tail = keys[count:]
            for digest, home in zip(tail.digests, conduct.router.forks.homes(tail, self.now), strict=True):
                self.homes.setdefault(digest, home)
            self._run(conduct.store(tail, self.now, inf), tail, self._store)

    def _run(self, steps: Steps[T], rows: Keys, answer: Callable[[Shard, Keys, Sequence[int]], Any]) -> T:
        replies: Replies | None = None
        try:
            while True:
                asks = next(steps) if replies is None else steps.send(replies)
                replies = Replies(self.now, *self._round(asks, rows, answer))
        except StopIteration as end:
            result: T = end.value
            return result

    def _round(
        self, asks: Any, rows: Keys, answer: Callable[[Shard, Keys, Sequence[int]], Any]
    ) -> tuple[dict[str, Any], set[bytes]]:
        answers, told = {}, set()
        one: Ask
        for name, one in asks.items():
            shard = self.shards[name]
            answers[name] = answer(shard, rows, one.rows)
            if shard.forks:
                told |= shard.forks.intersection([rows.digests[row] for row in one.rows])
        return answers, told

    def _count(self, shard: Shard, rows: Keys, wanted: Sequence[int]) -> int:
        self.asks[-1] += 1
        shard.lookups += 1
        return next((n for n, row in enumerate(wanted) if rows.digests[row] not in shard.keys), len(wanted))

    def _read(self, shard: Shard, rows: Keys, wanted: Sequence[int]) -> list[Result]:
        results = [HIT if rows.digests[row] in shard.keys else MISS for row in wanted]
        shard.reads += results.count(HIT)
        return results

    def _store(self, shard: Shard, rows: Keys, wanted: Sequence[int]) -> list[Result]:
        for row in wanted:
            shard.store(rows.digests[row], rows.parents[row])
        return [STORED] * len(wanted)


def measure(workload: str, placement: str, shards: int, clients: int, tokens_per_shard: int, seed: int) -> Curve:
    """Serve requests until the shards hold so many tokens on average, or there are no more, and say how that went."""
    wanted = shards * tokens_per_shard // BLOCK_TOKENS
    asked: list[Keys] = []
    seen: set[bytes] = set()
    for keys in requests(workload, seed, shards):
        if placement == "blocks":
            above = keys.parents, keys.indices, keys.parent_chains
            keys = Keys(keys.digests, keys.chains, keys.chains, keys.namespaces, *above)
        asked.append(keys)
        seen.update(keys.digests)
        if len(seen) >= wanted:
            break
    groups = max(1, min(MOST_GROUPS, clients, len(asked) // WINDOW_CALLS))
    scale = Scale(shards, clients, groups, hot=placement == PLACEMENTS[-1])
    for number, keys in enumerate(asked):
        if number == len(asked) // 2:
            for shard in scale.shards.values():
                shard.lookups = shard.reads = 0
        scale.now = FILL_S * number / len(asked)
        scale.serve(number, keys)
    held = list(scale.shards.values())
    joined, left = _join(scale), _leave(scale)
    return Curve(
        workload,
        placement,
        shards,
        clients,
        len(asked),
        len(scale.homes),
        sum(scale.asks) / len(scale.asks),
        scale.least / len(scale.asks),
        max(scale.asks),
        _ratio([len(shard.keys) for shard in held]),
        _ratio([shard.lookups for shard in held]),
        _ratio([shard.reads for shard in held]),
        scale.copied / len(scale.homes),
        *joined,
        *left,
    )


def _ratio(counts: Sequence[int]) -> float:
    return max(counts) * len(counts) / max(1, sum(counts))


def _moved(weights: Counter[bytes], before: View, after: View, one: str) -> tuple[int, int]:
    """Blocks whose owner is another one now, and those that `one` owns in either."""
    moved = its = 0
    for home, blocks in weights.items():
        old = before.members[before.owners(home)[0]].id
        new = after.members[after.owners(home)[0]].id
        moved += blocks * (old != new)
        its += blocks * (one in (old, new))
    return moved, its


def _join(scale: Scale) -> tuple[float, float]:
    weights = Counter(scale.homes.values())
    names = [member.id for member in scale.view.members]
    changes = [_moved(weights, scale.view, view_of([*names, new]), new) for new in (f"new-{n}" for n in range(JOINS))]
    moved, its = (sum(column) for column in zip(*changes, strict=True))
    return moved / max(1, its), moved / JOINS / weights.total()


def _leave(scale: Scale) -> tuple[float, float]:
    weights = Counter(scale.homes.values())
    names = [member.id for member in scale.view.members]
    gone = names[:JOINS]
    changes = [_moved(weights, scale.view, view_of([name for name in names if name != one]), one) for one in gone]
    moved, its = (sum(column) for column in zip(*changes, strict=True))
    return moved / max(1, its), moved / len(gone) / weights.total()
