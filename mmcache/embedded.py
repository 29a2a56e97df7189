"""`embedded://`: a whole server inside this process, reached over a socket pair by the same client and protocol.

For tests, notebooks and single-process programs. Nothing listens anywhere; a forked child cannot use it.
"""

from __future__ import annotations

import os
import socket

from mmcache.client.blocking import Client
from mmcache.config import ClientConfig, ServerConfig
from mmcache.errors import TransportError
from mmcache.server.serve import Server
from mmcache.store.shard import Shard
from mmcache.transport.tcp import Channel


class EmbeddedClient(Client):
    """A client with a server of its own; closing it frees the memory. `shard` is the store, for inspection."""

    def __init__(self, config: ClientConfig, server_config: ServerConfig | None = None) -> None:
        self._server = Server(
            server_config or ServerConfig(listen="", unix_path="", memory_nbytes=config.memory_nbytes)
        )
        self._server.start()
        self._owner_pid = os.getpid()
        super().__init__(config, self._dial)

    @property
    def shard(self) -> Shard:
        """The embedded store."""
        return self._server.shard

    def _dial(self) -> Channel:
        if os.getpid() != self._owner_pid:
            raise TransportError(
                "an embedded server stays in the process that made it; run `mmcache serve` to share one"
            )
        ours, theirs = socket.socketpair()
        self._server.attach(theirs)
        return Channel(ours)

    def close(self) -> None:
        """Close the links and stop the server. Call it once no view is in use."""
        closing = not self._pool.closed
        super().close()
        if closing and os.getpid() == self._owner_pid:
            self._server.stop()
