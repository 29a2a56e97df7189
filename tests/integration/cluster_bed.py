"""Several servers, each a process, with ids that do not depend on their ports, and calls about prompts' blocks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmcache.client.blocking import Client
from mmcache.client.cluster import ClusterClient
from mmcache.cluster.membership import Static
from mmcache.cluster.placement import Member, View
from mmcache.cluster.settings import parse_cluster_url
from mmcache.keyset import Keys
from mmcache.testing.process import ServerProcess
from tests.integration.support import NAMESPACE, blanks, reserved_address, values_of

NBYTES = 4096
DEADLINE_S = 10.0  # where no time is measured: a machine that stands still for seconds makes no miss of a hit
SLACK_S = 3.5  # so late may such a machine be; a deadline of more is not mistaken for two


@dataclass
class Cluster:
    """Servers that one can reach, kill and add to."""

    stack: contextlib.ExitStack
    servers: list[ServerProcess] = field(default_factory=list)
    deadline_s: float = DEADLINE_S

    def add(self) -> ServerProcess:
        address = self.stack.enter_context(reserved_address())  # or a killed one's may soon be somebody else's
        self.servers.append(self.stack.enter_context(ServerProcess("128MiB", listen=address)))
        return self.servers[-1]

    def address(self, number: int) -> str:
        return self.servers[number].url.rpartition("/")[2]

    def url(self, *numbers: int, **options: Any) -> str:
        chosen = [self.address(number) for number in (numbers or range(len(self.servers)))]
        query = "&".join(f"{name}={value}" for name, value in ({"deadline_s": self.deadline_s} | options).items())
        return f"mmcache://{','.join(chosen)}?{query}"

    def view(self, *numbers: int) -> View:
        """Of ids that do not depend on ports, so that every run places alike."""
        chosen = numbers or range(len(self.servers))
        return View(tuple(Member(f"s{number}", self.servers[number].url) for number in chosen))

    def connect(self, *numbers: int, **options: Any) -> ClusterClient:
        config = parse_cluster_url(self.url(**options))
        return self.stack.enter_context(ClusterClient(config, Static(self.view(*numbers))))


@contextlib.contextmanager
def cluster(count: int, deadline_s: float = DEADLINE_S) -> Iterator[Cluster]:
    with contextlib.ExitStack() as stack:
        made = Cluster(stack, deadline_s=deadline_s)
        for _ in range(count):
            made.add()
        yield made


class Told:
    """A membership that a test tells."""

    def __init__(self, view: View) -> None:
        self.now = view

    def view(self) -> View:
        return self.now

    def close(self) -> None:
        """Nothing to end."""


def prompt(label: int, tokens: int = 10_000, shared: int = 0) -> Keys:
    return NAMESPACE.block_keys([*range(shared), *([1_000_000 + label] * (tokens - shared))])


def put(cache: Client, keys: Keys) -> list[Any]:
    return cache.put(keys, values_of(keys, NBYTES))


def hits(cache: Client, keys: Keys) -> int:
    """How many are hits, in time and with the right bytes."""
    buffers, values = blanks(len(keys), NBYTES), values_of(keys, NBYTES)
    began = time.monotonic()
    results = cache.get_into(keys, buffers)
    assert time.monotonic() - began < cache.config.deadline_s + SLACK_S
    for result, buffer, value in zip(results, buffers, values, strict=True):
        assert not result or np.array_equal(buffer, value), "a hit with another value"
    return sum(map(bool, results))


def entries(cache: Client) -> dict[str, int]:
    return {name: stat["counters"]["entries"] for name, stat in cache.stat()["shards"].items()}
