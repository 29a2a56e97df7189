"""AsyncChannel, encrypted: OpenSSL is asked, and where it wants the network first, asyncio waits for it."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Sequence
from typing import TypeVar

from mmcache.errors import TransportError
from mmcache.transport.aio import AsyncChannel
from mmcache.transport.base import Buffer, pieces_of
from mmcache.transport.tls import as_tls_error

T = TypeVar("T")


class AsyncTlsChannel(AsyncChannel):
    """As AsyncChannel, for a client. Takes the socket of a connected TCP channel over; `handshake` comes first."""

    __slots__ = ("_tls",)

    def __init__(self, channel: AsyncChannel, context: ssl.SSLContext, server_name: str) -> None:
        """`server_name` is whom to expect. Raises ValueError for a name that can be none."""
        tls = context.wrap_socket(channel.sock, do_handshake_on_connect=False, server_hostname=server_name)
        super().__init__(tls)
        self._tls = tls

    @property
    def is_tls(self) -> bool:
        """True."""
        return True

    async def handshake(self) -> None:
        """Agree on keys, and verify the server. Raises TransportError: nothing was sent that needed protection."""
        await self._until(self._tls.do_handshake)

    async def send(self, buffers: Sequence[Buffer]) -> None:
        """See AsyncChannel."""
        for piece in pieces_of(buffers):
            rest = memoryview(piece)
            while len(rest):
                part = rest
                rest = rest[await self._until(lambda part=part: self._tls.send(part)) :]  # type: ignore[misc]

    async def _recv_some(self, views: Sequence[memoryview]) -> int:
        count = await self._until(lambda: self._tls.recv_into(views[0]))
        if count == 0:
            raise TransportError("the peer closed the connection")
        return count

    async def _until(self, call: Callable[[], T]) -> T:
        """The answer of an OpenSSL call, asked again whenever the network is ready for it."""
        while True:
            try:
                return call()
            except ssl.SSLWantReadError:
                await self._until_readable()
            except ssl.SSLWantWriteError:
                await self._until_writable()
            except OSError as error:
                raise as_tls_error(error) from error
