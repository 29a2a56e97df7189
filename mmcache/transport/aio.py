"""A framed stream socket, unix or TCP, that waits with asyncio: what Channel in tcp.py is to a thread, for a task.

Deadlines are the caller's: it cancels what takes too long (`asyncio.timeout`). Any failure, cancellation included,
leaves the channel out of step with its peer: drop it then. Works on any event loop that can watch a descriptor.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import ipaddress
import os
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any, Final

from mmcache.errors import DeadlineExceeded, TransportError
from mmcache.transport.base import Buffer, pieces_of
from mmcache.transport.resolve import resolve
from mmcache.transport.tcp import (
    MAX_FDS,
    MAX_VIEWS,
    READ_AHEAD_NBYTES,
    as_transport_error,
    close_fds,
    fds_in,
)

FULL_BACKLOG_REST_S: Final = 0.005


class AsyncChannel:
    """Exact sends and receives over one connected socket. Any failure raises TransportError: drop the channel then."""

    __slots__ = ("_ahead", "_end", "_pid", "_start", "sock")

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self._ahead = memoryview(bytearray(READ_AHEAD_NBYTES))
        self._start = self._end = 0
        self._pid = os.getpid()

    async def send(self, buffers: Sequence[Buffer]) -> None:
        """Send all the buffers, in order."""
        for piece in pieces_of(buffers):
            sent = 0
            while sent < len(piece):
                try:
                    sent += self.sock.send(memoryview(piece)[sent:] if sent else piece)
                except BlockingIOError:
                    await self._until_writable()
                except OSError as error:
                    raise as_transport_error(error) from error

    async def recv_into(self, views: Sequence[memoryview]) -> None:
        """Fill the views (bytes) completely and in order: from what was read ahead, the rest straight from the socket,
        in as few system calls as it allows."""
        for start in range(0, len(views), MAX_VIEWS):
            left = [view for view in views[start : start + MAX_VIEWS] if len(view)]
            while left:
                count = self._take(left[0]) if self._start < self._end else await self._recv_some(left)
                while left and count >= len(left[0]):
                    count -= len(left.pop(0))
                if count:
                    left[0] = left[0][count:]

    async def recv(self, nbytes: int) -> bytes:
        """Exactly `nbytes` bytes (bounded by the caller before it asks); may read a little ahead."""
        if nbytes > READ_AHEAD_NBYTES:
            data = bytearray(nbytes)
            await self.recv_into((memoryview(data),))
            return bytes(data)
        held, ahead = self._end - self._start, self._ahead
        if held < nbytes and self._start:
            ahead[:held] = ahead[self._start : self._end]
            self._start, self._end = 0, held
        while self._end - self._start < nbytes:
            self._end += await self._recv_some((ahead[self._end :],))
        start = self._start
        self._start = start + nbytes
        return bytes(ahead[start : start + nbytes])

    def _take(self, view: memoryview) -> int:
        """Move what was read ahead into `view`, as far as it goes."""
        count = min(len(view), self._end - self._start)
        view[:count] = self._ahead[self._start : self._start + count]
        self._start += count
        return count

    async def _recv_some(self, views: Sequence[memoryview]) -> int:
        while True:
            try:
                count = self.sock.recv_into(views[0]) if len(views) == 1 else self.sock.recvmsg_into(views)[0]
            except BlockingIOError:
                await self._until_readable()
                continue
            except OSError as error:
                raise as_transport_error(error) from error
            if count == 0:
                raise TransportError("the peer closed the connection")
            return count

    async def send_with_fds(self, data: bytes, fds: Sequence[int]) -> None:
        """Send `data` with file descriptors beside its first byte (unix sockets only)."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        while True:
            try:
                sent = self.sock.sendmsg([data], rights)
                break
            except BlockingIOError:
                await self._until_writable()
            except OSError as error:
                raise as_transport_error(error) from error
        if sent < len(data):
            await self.send([memoryview(data)[sent:]])

    async def recv_with_fds(self, nbytes: int) -> tuple[bytes, list[int]]:
        """Exactly `nbytes` bytes and the file descriptors that came beside them; the caller owns those."""
        while True:
            try:
                data, ancillary, _, _ = self.sock.recvmsg(
                    nbytes, socket.CMSG_SPACE(MAX_FDS * 4), socket.MSG_CMSG_CLOEXEC
                )
                break
            except BlockingIOError:
                await self._until_readable()
            except OSError as error:
                raise as_transport_error(error) from error
        fds = fds_in(ancillary)
        try:
            if not data:
                raise TransportError("the peer closed the connection")
            rest = await self.recv(nbytes - len(data)) if len(data) < nbytes else b""
        except BaseException:
            close_fds(fds)
            raise
        return data + rest, fds

    async def _until_readable(self) -> None:
        loop, sock = asyncio.get_running_loop(), self.sock
        future = loop.create_future()
        loop.add_reader(sock, _settle, future)
        try:
            await future
        finally:
            loop.remove_reader(sock)

    async def _until_writable(self) -> None:
        loop, sock = asyncio.get_running_loop(), self.sock
        future = loop.create_future()
        loop.add_writer(sock, _settle, future)
        try:
            await future
        finally:
            loop.remove_writer(sock)

    @property
    def is_unix(self) -> bool:
        """True for a unix socket."""
        return self.sock.family == socket.AF_UNIX

    @property
    def is_tls(self) -> bool:
        """True where what is sent is encrypted."""
        return False

    @property
    def is_loopback(self) -> bool:
        """True if the peer is on this host's loopback interface."""
        return ipaddress.ip_address(self.sock.getpeername()[0].split("%")[0]).is_loopback

    def close(self) -> None:
        """Close this end. In the process that opened it the connection ends, whatever forked copies there are."""
        with contextlib.suppress(OSError):
            if os.getpid() == self._pid:
                self.sock.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):
            self.sock.close()


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def resolve_async(host: str, port: int, deadline: float) -> list[tuple[int, tuple[Any, ...]]]:
    """As `resolve`, on a thread that is left behind if it is late, and holds up no loop that ends meanwhile."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[Any] = loop.create_future()

    def tell(found: Any) -> None:
        if not answer.done():
            answer.set_result(found)

    def ask() -> None:
        found: Any
        try:
            found = resolve(host, port, deadline)
        except Exception as error:
            found = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(tell, found)

    threading.Thread(target=ask, name="mmcache-resolve-async", daemon=True).start()
    found = await answer
    if isinstance(found, Exception):
        raise found
    addresses: list[tuple[int, tuple[Any, ...]]] = found
    return addresses


async def connect_tcp_async(
    addresses: Sequence[tuple[int, tuple[Any, ...]]], timeout_s: float, deadline: float
) -> AsyncChannel:
    """A channel to the first address that answers, each given `timeout_s` at most. Raises TransportError."""
    trouble = "no address is known for it"
    for family, address in addresses:
        left_s = min(timeout_s, deadline - time.monotonic())
        if left_s <= 0:
            raise DeadlineExceeded(f"connecting took too long ({trouble}); raise deadline_s")
        try:
            return AsyncChannel(await _connected(family, address, left_s))
        except OSError as error:
            trouble = f"no answer from {address[0]}:{address[1]}: {str(error) or 'timed out'}"
    raise TransportError(f"{trouble}; is `mmcache serve` running there?")


async def connect_unix_async(path: str, timeout_s: float, deadline: float) -> AsyncChannel:
    """A channel to a unix socket. Raises TransportError."""
    try:
        left_s = max(0.001, min(timeout_s, deadline - time.monotonic()))
        return AsyncChannel(await _connected(socket.AF_UNIX, path, left_s))
    except OSError as error:
        raise TransportError(
            f"no answer from unix socket {path}: {str(error) or 'timed out'}; is `mmcache serve` running there?"
        ) from error


async def _connected(family: int, address: Any, timeout_s: float) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        async with asyncio.timeout(timeout_s):
            if family != socket.AF_UNIX:
                await asyncio.get_running_loop().sock_connect(sock, address)
                return sock
            while True:  # a unix socket connects at once, or its server's backlog is full; no event tells when
                try:
                    sock.connect(address)
                    return sock
                except BlockingIOError:
                    await asyncio.sleep(FULL_BACKLOG_REST_S)
    except BaseException:
        sock.close()
        raise
