"""A way to a shard, as the contract sees it: how to serve, where that is, and which URL leads there by this way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import mmcache
from mmcache.client.blocking import Client
from mmcache.testing.process import ServerProcess


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

    def server(self, memory_nbytes: int, address: str = "", **environment: str) -> ServerProcess:
        """A server, to be started, that can be reached this way."""
        settings = {**self.environment, **environment}
        return ServerProcess(str(memory_nbytes), *self.arguments(address), environment=settings)

    def connect(self, address: str, deadline_s: float, *, lazy: bool = False) -> Client:
        """A client of whoever listens there."""
        return mmcache.connect(self.url(address), deadline_s=deadline_s, lazy=lazy)
