"""What one run is like: sizes and times, drawn from the seed."""

from __future__ import annotations

import random
from dataclasses import dataclass

from mmcache.store.policies import POLICIES


@dataclass(frozen=True, slots=True)
class Setting:
    """A small cluster, so that everything meets everything. Times are in simulated seconds."""

    shards: int
    clients: int
    replicas: int
    policy: str
    lease_s: float
    entries: int
    room: float  # a shard's memory, over what of the steady traffic belongs to it
    once: float  # share of requests, in trouble, that come once and press on memory
    deadline_s: float = 1.0
    ramp_s: float = 20.0
    absent_s: float = 0.05

    @classmethod
    def draw(cls, random: random.Random) -> Setting:
        """One for a run."""
        return cls(
            shards=random.randint(3, 6),
            clients=random.randint(2, 5),
            replicas=random.choice((1, 2)),
            policy=random.choice(list(POLICIES)),
            lease_s=random.choice((4.0, 6.0)),
            entries=512,
            room=random.choice((1.2, 1.4, 2.0)),
            once=random.choice((0.3, 0.6, 0.9)),
        )
