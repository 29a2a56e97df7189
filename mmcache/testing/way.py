"""A way to a shard, as the contract sees it: how to serve, where that is, which URL leads there; values to try it."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np

import mmcache
from mmcache.client.blocking import Client
from mmcache.errors import TransportError
from mmcache.keyset import Keys
from mmcache.testing.between import Between
from mmcache.testing.process import ServerProcess
from mmcache.testing.values import Bytes, blanks, eventually, keys_of, values_of

MEMORY: Final = 64 << 20
NBYTES: Final = 1 << 20
DEADLINE_S: Final = 1.0
LEASE_S: Final = 4 * DEADLINE_S  # whoever is cut off from the answer that leased has nothing to give back
SLACK_S: Final = 1.5  # a machine that runs other tests too may be that late


@dataclass(frozen=True)
class Way:
    """One transport. An address is HOST:PORT, or the path of a unix socket.

    `name` is what `stat` calls it; `arguments` gives the words of `mmcache serve` that make it listen at an address,
    "" for any free one; `address` says where a server listens; `url` makes an address one that goes this way.
    `environment` has MMCACHE_ settings of the server.
    """

    name: str
    arguments: Callable[[str], tuple[str, ...]]
    address: Callable[[ServerProcess], str]
    url: Callable[[str], str]
    environment: Mapping[str, str] = field(default_factory=dict)

    def server(self, memory_nbytes: int, address: str = "") -> ServerProcess:
        """A server, to be started, that can be reached this way. Its leases last LEASE_S."""
        settings = {"MMCACHE_LEASE_S": str(LEASE_S), **self.environment}
        return ServerProcess(str(memory_nbytes), *self.arguments(address), environment=settings)

    def connect(self, address: str, deadline_s: float, *, lazy: bool = False) -> Client:
        """A client of whoever listens there; who is slow to answer is asked again."""

        def connected() -> Client | None:
            with contextlib.suppress(TransportError):
                return mmcache.connect(self.url(address), deadline_s=deadline_s, lazy=lazy)
            return None

        client: Client = eventually(connected, f"{address} answers")
        return client


class LateError(AssertionError):
    """A call took longer than its deadline and SLACK_S."""


class Stored:
    """Some values, and calls about them that are timed."""

    def __init__(self, label: str, count: int = 2, nbytes: int = NBYTES) -> None:
        self.keys: Keys = keys_of(count, f"trouble/{label}")
        self.values: list[Bytes] = values_of(self.keys, nbytes)
        self._nbytes = nbytes

    def put(self, cache: Client) -> bool:
        """Store them all."""
        return all(cache.put(self.keys, self.values))

    def get(self, cache: Client) -> int:
        """How many are hits. A hit that is not the value is an AssertionError; a late call is a LateError."""
        buffers = blanks(len(self.keys), self._nbytes)
        began = time.monotonic()
        results = cache.get_into(self.keys, buffers)
        took_s = time.monotonic() - began
        for result, buffer, value in zip(results, buffers, self.values, strict=True):
            assert not result or np.array_equal(buffer, value), "a hit with another value"
        if took_s > cache.config.deadline_s + SLACK_S:
            raise LateError(f"a call took {took_s:.1f} s, its deadline is {cache.config.deadline_s:g} s")
        return sum(map(bool, results))

    def reads(self, cache: Client) -> bool:
        """Whether all are hits."""
        return self.get(cache) == len(self.keys)


@contextlib.contextmanager
def led(way: Way, server: ServerProcess) -> Iterator[Between]:
    """A network between, that leads to this server."""
    target = way.address(server)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        path = f"{folder}/between.sock" if target.startswith("/") else ""
        yield stack.enter_context(Between(target, path))


def holds_nothing(way: Way, server: ServerProcess) -> None:
    """No lease, no reservation and no byte in flight is left at the server once its clients are gone and leases end."""
    with way.connect(way.address(server), 5.0) as observer:

        def free() -> bool:
            now = observer.stat()["counters"]
            return not any(now[name] for name in ("leases", "held_bytes", "reservations", "inflight_bytes"))

        eventually(free, "the server holds nothing for anybody")
