"""From a URL to a client: `connect` to a blocking one, `AsyncClient` is the asyncio one."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, Self

from mmcache.client.aio import LoopClient
from mmcache.client.blocking import Client
from mmcache.client.cluster import ClusterClient
from mmcache.cluster.membership import Membership, Static
from mmcache.cluster.settings import ClusterConfig, is_cluster, parse_any_url
from mmcache.cluster.urls import open_membership
from mmcache.config import ClientConfig, ServerConfig, parse_url
from mmcache.errors import ConfigError

if TYPE_CHECKING:
    from mmcache.embedded import EmbeddedServer

GATHER_S: Final = 5.0  # servers say that they are there every 2 s, and try Redis again after 2 s


def connect(
    url: str,
    *,
    verify: bool | None = None,
    deadline_s: float | None = None,
    lazy: bool = False,
    token: str | None = None,
) -> Client:
    """A client for `mmcache://HOST:PORT`, `mmcaches://HOST:PORT` (TLS), `mmcache+unix:///path` or
    `embedded://?memory=1GiB` (server in this process), or for a cluster: `mmcache://HOST:PORT,HOST:PORT`
    (docs/cluster.md).

    On the same host the bytes travel through shared memory unless the URL says `transport=tcp`; with `transport=grpc`
    the port is that of `serve --grpc`. `deadline_s` bounds every call; `verify=False` turns off checksums of reads;
    `token` says who asks, where the server has an access file.
    The server is asked once, and TransportError raised if it does not answer; with `lazy` it is not asked, and calls
    answer misses until it is there, as they do until a cluster has members. Raises ConfigError; for more replicas than
    a cluster has members that are told by Redis or Kubernetes only after seconds in which more may be heard of.
    """
    config = parse_any_url(url, verify=verify, deadline_s=deadline_s, token=token)
    client: Client
    if isinstance(config, ClusterConfig):
        membership = open_membership(config.members, lazy=lazy)
        try:
            _gather(membership, config.replicas.most)
            client = ClusterClient(config, membership)
        except BaseException:
            membership.close()
            raise
    elif config.scheme == "embedded":
        from mmcache.embedded import EmbeddedClient

        return EmbeddedClient(config)
    else:
        client = Client(config)
    if not lazy:
        try:
            client.stat()
        except BaseException:
            client.close()
            raise
    return client


def _gather(membership: Membership, count: int) -> None:
    """Wait for so many members, within limits, where they are told: a cluster, or its Redis, that has just been started
    knows of them one after another."""
    give_up_s = time.monotonic() + GATHER_S
    while not isinstance(membership, Static) and len(membership.view().members) < count:
        if time.monotonic() > give_up_s:
            return
        time.sleep(0.05)


class AsyncClient(LoopClient):
    """A cache client for asyncio: the calls of `Client`, awaited, and `get_many` and `put_many` besides.

    `async with mmcache.AsyncClient(url) as cache:` asks the server once, and raises TransportError if it does not
    answer; with `lazy` it is not asked, and calls answer misses until it is there. URLs and keywords are those of
    `connect`; settings may stand in place of a URL, and `server_config` may be given for an embedded server. Raises
    ConfigError. Without `async with`, await `open`, and `close` at the end.

    A client belongs to the event loop that first uses it; any number of its tasks may share it. `counters` counts as
    `Client.counters` does.
    """

    def __init__(
        self,
        url: str | ClientConfig,
        *,
        verify: bool | None = None,
        deadline_s: float | None = None,
        lazy: bool = False,
        token: str | None = None,
        server_config: ServerConfig | None = None,
    ) -> None:
        if isinstance(url, str) and is_cluster(url):
            raise ConfigError(f"{url!r} names a cluster: an AsyncClient has one server; use mmcache.connect")
        keywords = (("verify", verify), ("deadline_s", deadline_s), ("token", token))
        given: dict[str, Any] = {name: value for name, value in keywords if value is not None}
        config = replace(url, **given) if isinstance(url, ClientConfig) else parse_url(url, **given)
        self._lazy = lazy
        self._embedded: EmbeddedServer | None = None
        if config.scheme == "embedded":
            from mmcache.embedded import EmbeddedServer

            self._embedded = EmbeddedServer(config, server_config)
        super().__init__(config, self._embedded.attach_async if self._embedded is not None else None)

    async def __aenter__(self) -> Self:
        return self if self._lazy else await self.open()

    async def open(self) -> Self:
        """Ask the server once. If it does not answer, raises TransportError, and the client is closed."""
        try:
            await self.stat()
        except BaseException:
            await self.close()
            raise
        return self

    async def close(self) -> None:
        """Close every link; those in use are closed when their call ends. Ends an embedded server, frees its memory."""
        await super().close()
        server, self._embedded = self._embedded, None
        if server is not None:
            await asyncio.get_running_loop().run_in_executor(None, server.stop)
