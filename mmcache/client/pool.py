"""The links a client keeps: borrowed by one call at a time, opened on demand up to a limit, replaced after a fork."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable

from mmcache.client.core import PoolBusy
from mmcache.client.link import Dials, Link
from mmcache.errors import UsageError


class Pool:
    """At most `max_links` links. Thread-safe; taking an idle link and giving it back needs no lock."""

    def __init__(self, dialer: Dials, max_links: int, after_fork: Callable[[], None]) -> None:
        self._dialer, self._max_links, self.after_fork = dialer, max_links, after_fork
        self._idle: deque[Link] = deque()
        self._lent: set[Link] = set()
        self.closed = False
        self.restart()
        _POOLS.add(self)

    def restart(self) -> None:
        """Begin without links. A forked child does: its parent's connections are not its to speak on, or to hold."""
        inherited = [*self._idle, *self._lent]
        self._idle, self._lent = deque(), set()
        self._links = self._waiting = 0
        self._changed = threading.Condition(threading.Lock())
        for link in inherited:
            link.close()

    def borrow(self, deadline: float) -> Link:
        """An idle link, or a new one while there is room, or the next that comes back. Raises TransportError."""
        if self.closed:
            raise UsageError("this client is closed; connect again")
        try:
            link: Link | None = self._idle.pop()
        except IndexError:
            link = self._wait(deadline)
        if link is None:
            try:
                link = self._dialer.open(deadline)
            except BaseException:
                self.drop(None)
                raise
        self._lent.add(link)
        return link

    def _wait(self, deadline: float) -> Link | None:
        """A link that came back, or None with room for a new one taken."""
        with self._changed:
            self._waiting += 1
            try:
                while not self._idle and self._links >= self._max_links:
                    left_s = deadline - time.monotonic()
                    if left_s <= 0:
                        raise PoolBusy(f"all {self._max_links} connections are busy; raise max_connections")
                    self._changed.wait(left_s)
                with contextlib.suppress(IndexError):
                    return self._idle.pop()
                self._links += 1
                return None
            finally:
                self._waiting -= 1

    def give_back(self, link: Link) -> None:
        """Return a link that is still in step with its server."""
        self._lent.discard(link)
        self._idle.append(link)
        if self.closed:
            self.forget()
        if self._waiting:  # a waiter that found nothing counted itself before it looked
            with self._changed:
                self._changed.notify()

    def drop(self, link: Link | None) -> None:
        """Close a link that was borrowed (None: it was never opened) and make room for another."""
        if link is not None:
            self._lent.discard(link)
            link.close()
        with self._changed:
            self._links -= 1
            self._changed.notify()

    def forget(self, *, politely: bool = False) -> None:
        """Close the idle links; politely: give back first what they hold."""
        with contextlib.suppress(IndexError):
            while True:
                link = self._idle.pop()
                if politely:
                    link.say_goodbye()
                self.drop(link)

    def close(self) -> None:
        """Close every link, those in use when they come back."""
        self.closed = True
        self.forget(politely=True)


_POOLS: weakref.WeakSet[Pool] = weakref.WeakSet()


def _restart_in_child() -> None:
    for pool in list(_POOLS):
        pool.restart()
        pool.after_fork()


os.register_at_fork(after_in_child=_restart_in_child)
