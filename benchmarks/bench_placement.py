"""How evenly runs lie on shards, and how many shards a question goes to, for made-up conversations. No server runs.

    python -m benchmarks.bench_placement [--shards 4,16,64,256] [--conversations 2000]

Conversations begin with one of a few system prompts, which end anywhere, and go on turn by turn; each turn asks for the
whole prompt so far and stores what is new. Per placement: the blocks of the fullest shard over the mean, the lookups of
the one that is asked most over the mean (clients of 32 hosts), and shards asked a question. `blocks` places every block
by its own chain key; `runs` as keys v1 does; `forks` as the client does, with what shards would tell of forks; `hot`
with reads of hot runs spread besides.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Iterator, Sequence

from mmcache.cluster.homes import Forks
from mmcache.cluster.placement import Member, View
from mmcache.cluster.routes import Replicas, Router
from mmcache.keyset import Keys
from mmcache.store.rows import FORK_CHILDREN
from mmcache.testing.values import NAMESPACE

CLIENTS = 32
PLACEMENTS = ("blocks", "runs", "forks", "hot")


def questions(conversations: int, seed: int) -> Iterator[Keys]:
    """The prompts of all turns, in an order in which conversations overlap."""
    draw = random.Random(seed)
    systems = [[number] * draw.randrange(200, 6000) for number in range(8)]
    open_now: list[list[int]] = []
    for number in range(conversations):
        open_now.append(draw.choices(systems, [1 / (rank + 1) for rank in range(len(systems))])[0][:])
        for _ in range(3):
            tokens = draw.choice(open_now)
            tokens += [1000 + number + draw.randrange(1 << 40)] * draw.randrange(100, 1500)
            yield NAMESPACE.block_keys(tokens)
            if len(tokens) > 40_000 or draw.random() < 0.2:
                open_now = [other for other in open_now if other is not tokens] or [systems[0][:]]


class Children:
    """What shards count: how many blocks name one as their parent, and from which number on it is a fork."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()
        self._children: Counter[bytes] = Counter()

    def stored(self, keys: Keys) -> list[bytes]:
        """Store a prompt's blocks; those of its keys that are forks now."""
        for digest, parent in zip(keys.digests, keys.parents, strict=True):
            if digest not in self._seen:
                self._seen.add(digest)
                self._children[parent] += 1
        return [digest for digest in keys.digests if self._children[digest] >= FORK_CHILDREN]


def measure(placement: str, shards: int, asked: Sequence[Keys]) -> tuple[float, float, float]:
    """(blocks max/mean, lookups max/mean, shards a question)."""
    view = View(tuple(Member(f"shard-{number}", f"mmcache://shard-{number}:7600") for number in range(shards)))
    routers = [Router(view, Replicas(), draw, 0.0) for draw in range(CLIENTS)]
    forks, children, told = Forks(), Children(), placement in ("forks", "hot")
    blocks: dict[bytes, str] = {}
    lookups: Counter[str] = Counter()
    owners = 0
    for number, keys in enumerate(asked):
        router = routers[number % CLIENTS]
        if placement == "blocks":
            above = keys.parents, keys.indices, keys.parent_chains
            keys = Keys(keys.digests, keys.chains, keys.chains, keys.namespaces, *above)
        router.forks = forks if told else router.forks
        routes = router.routes(keys, 0.0, counts=placement == "hot")
        asks = {route.reads[0] for route in routes}
        owners += len(asks)
        lookups.update(asks)
        for chain, route in zip(keys.chains, routes, strict=True):
            blocks.setdefault(chain, route.owners[0])
        if told:
            forks.hear(keys, children.stored(keys), 0.0)
    load = Counter(blocks.values())
    evenly = [max(count.values()) * shards / sum(count.values()) for count in (load, lookups)]
    return evenly[0], evenly[1], owners / len(asked)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", default="4,16,64,256")
    parser.add_argument("--conversations", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    asked = list(questions(options.conversations, options.seed))
    print(f"{len(asked)} questions about {sum(map(len, asked)) / len(asked):.0f} blocks each on average")
    print("shards  placement  blocks max/mean  lookups max/mean  shards a question")
    for shards in map(int, options.shards.split(",")):
        for placement in PLACEMENTS:
            row = measure(placement, shards, asked)
            print(f"{shards:6}  {placement:9}  {row[0]:15.2f}  {row[1]:16.2f}  {row[2]:17.2f}", flush=True)


if __name__ == "__main__":
    main()
