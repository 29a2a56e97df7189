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
from mmcache.transport.aio import AsyncChannel
from mmcache.transport.tcp import Channel


class EmbeddedServer:
    """A server in this process that clients of this process are joined to by socket pairs."""

    def __init__(self, config: ClientConfig, server_config: ServerConfig | None = None) -> None:
        self._server = Server(
            server_config or ServerConfig(listen="", unix_path="", memory_nbytes=config.memory_nbytes)
        )
        self._server.start()
        self._owner_pid = os.getpid()

    @property
    def shard(self) -> Shard:
        """The store."""
        return self._server.shard

    def attach(self) -> Channel:
        """A blocking channel to it. Raises TransportError in another process than its own."""
        return Channel(self._pair())

    def attach_async(self) -> AsyncChannel:
        """A channel to it for asyncio. Raises TransportError in another process than its own."""
        return AsyncChannel(self._pair())

    def _pair(self) -> socket.socket:
        if os.getpid() != self._owner_pid:
            raise TransportError(
                "an embedded server stays in the process that made it; run `mmcache serve` to share one"
            )
        ours, theirs = socket.socketpair()
        self._server.attach(theirs)
        return ours

    def stop(self) -> None:
        """Stop it and free its memory; in a forked child it is not there to stop."""
        if os.getpid() == self._owner_pid:
            self._server.stop()


class EmbeddedClient(Client):
    """A client with a server of its own; closing it frees the memory. `shard` is the store, for inspection."""

    def __init__(self, config: ClientConfig, server_config: ServerConfig | None = None) -> None:
        self._server = EmbeddedServer(config, server_config)
        super().__init__(config, self._server.attach)

    @property
    def shard(self) -> Shard:
        """The embedded store."""
        return self._server.shard

    def close(self) -> None:
        """Close the links and stop the server. Call it once no view is in use."""
        closing = not self._closed
        super().close()
        if closing:
            self._server.stop()
