"""The links an asyncio client keeps: borrowed by a call, opened on demand up to a limit, handed on in turn."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import deque

from mmcache.client.aio_link import AsyncDialer, AsyncLink
from mmcache.client.core import PoolBusy
from mmcache.errors import UsageError


class AsyncPool:
    """At most `max_links` links. Only `borrow` waits; it serves those who wait in the order they came.

    `count` links exist or are being opened. It belongs to one event loop in one process.
    """

    def __init__(self, dialer: AsyncDialer, max_links: int) -> None:
        self._dialer, self._max_links = dialer, max_links
        self._idle: list[AsyncLink] = []
        self._waiters: deque[asyncio.Future[AsyncLink | None]] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = os.getpid()
        self.count = 0
        self.closed = False

    async def borrow(self, deadline: float) -> AsyncLink:
        """An idle link, or a new one while there is room, or the next that comes back. Raises TransportError."""
        self._check()
        if self._idle:
            return self._idle.pop()
        if self.count < self._max_links:
            self.count += 1
        else:
            link = await self._wait(deadline)
            if link is not None:
                return link
        try:
            return await self._dialer.open(deadline)
        except BaseException:
            self.drop(None)
            raise

    def _check(self) -> None:
        if self.closed:
            raise UsageError("this client is closed; connect again")
        loop = asyncio.get_running_loop()
        if self._pid != os.getpid() or (self._loop not in (None, loop) and not self._loop.is_closed()):
            raise UsageError("this client belongs to another event loop or process; make one where it is used")
        self._loop = loop

    async def _wait(self, deadline: float) -> AsyncLink | None:
        """A link that came back, or None with room for a new one, now the caller's."""
        turn: asyncio.Future[AsyncLink | None] = asyncio.get_running_loop().create_future()
        self._waiters.append(turn)
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                return await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled() and not turn.exception():  # it came too late: the next one's
                link = turn.result()
                self.drop(None) if link is None else self.give_back(link)
            else:
                with contextlib.suppress(ValueError):
                    self._waiters.remove(turn)
            if isinstance(error, TimeoutError):
                raise PoolBusy(f"all {self._max_links} connections are busy; raise max_connections") from None
            raise

    def _next(self) -> asyncio.Future[AsyncLink | None] | None:
        while self._waiters:
            turn = self._waiters.popleft()
            if not turn.done():
                return turn
        return None

    def give_back(self, link: AsyncLink) -> None:
        """Return a link that is still in step with its server."""
        if self.closed:
            link.say_goodbye()
            self.drop(link)
        elif turn := self._next():
            turn.set_result(link)
        else:
            self._idle.append(link)

    def drop(self, link: AsyncLink | None) -> None:
        """Close a link that was borrowed (None: it was never opened) and make room for another."""
        if link is not None:
            link.close()
        if turn := self._next():
            turn.set_result(None)
        else:
            self.count -= 1

    def forget(self, *, politely: bool = False) -> None:
        """Close the idle links; politely: give back first what they hold."""
        while self._idle:
            link = self._idle.pop()
            if politely:
                link.say_goodbye()
            self.drop(link)

    def close(self) -> None:
        """Close every link, those in use when they come back; who waits for one hears of it."""
        self.closed = True
        self.forget(politely=True)
        while turn := self._next():
            turn.set_exception(UsageError("this client was closed"))
