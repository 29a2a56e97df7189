"""What both clients decide alike: whether to ask at all, what a failure means, whether to try again, what to count."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Final, Generic, Protocol, TypeVar

from mmcache.client.plan import Breaker
from mmcache.client.protocol import STOPPED_WORDS
from mmcache.client.session import Session
from mmcache.config import ClientConfig
from mmcache.errors import AccessDenied, DeadlineExceeded, MMCacheError, RequestRefused, TransportError
from mmcache.transport.native import NATIVE, PYTHON
from mmcache.transport.shm import ArenaMap, Copier

log = logging.getLogger("mmcache.client")
L = TypeVar("L", bound=Session)
L_contra = TypeVar("L_contra", bound=Session, contravariant=True)
STOPPED_PAUSE_S: Final = 1.0
_RESTING: Final = "the server did not answer a moment ago; it is asked again shortly"


class PoolBusy(TransportError):
    """Every link is in use by another call: nothing is known against the server."""


class Links(Protocol[L_contra]):
    """What a borrowed link needs of its pool."""

    def give_back(self, link: L_contra) -> None:
        """Return a link that is still in step with its server."""

    def drop(self, link: L_contra | None) -> None:
        """Close a link and make room for another."""

    def forget(self, *, politely: bool = False) -> None:
        """Close the idle links."""


class Lent(Generic[L]):
    """One use of a borrowed link: after it the link goes back if it is in step with its server, and else is dropped.

    A link kept from an earlier call may have died since. Then the error is swallowed, as long as there is time: leaving
    the `with` block normally means to borrow another and try once more.
    """

    __slots__ = ("_deadline", "_link", "_pool")

    def __init__(self, pool: Links[L], link: L, deadline: float) -> None:
        self._pool, self._link, self._deadline = pool, link, deadline

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        link, pool = self._link, self._pool
        kept, link.kept = link.kept, error is None or isinstance(error, RequestRefused)
        if link.kept and link.good_until < math.inf and link.good_until < time.monotonic():
            pool.drop(link)
            return False
        if link.kept:
            pool.give_back(link)
            return False
        slow = isinstance(error, DeadlineExceeded)
        again = kept and isinstance(error, TransportError) and not slow and time.monotonic() < self._deadline
        if again:
            pool.forget()
        pool.drop(link)
        return again


class ClientCore:
    """The part of a client that waits for nothing. `counters` and `announces` are described in the clients."""

    def __init__(self, config: ClientConfig) -> None:
        self.config = config
        self.counters: Counter[str] = Counter()
        self.announces = True
        self._breaker = Breaker()
        self._stopped, self._asked_at = 0, 0.0
        self._renew_lock()
        self._native = NATIVE if config.native else PYTHON
        self._copier = Copier(config.copy_threads, self._native.copy_hashed)

    def __repr__(self) -> str:
        config = self.config
        place = f"{config.host}:{config.port}" if config.is_network else config.path
        return f"<{type(self).__name__} {config.scheme}://{place}{' closed' if self._closed else ''}>"

    @property
    def _closed(self) -> bool:
        raise NotImplementedError

    @property
    def _arena(self) -> ArenaMap | None:
        raise NotImplementedError

    @property
    def answering(self) -> bool:
        """False while a server that did not answer is left alone: calls made now would be misses."""
        return self._breaker.allows(time.monotonic())

    @property
    def maps_memory(self) -> bool:
        """Whether bytes are moved in the server's memory, which this process maps, rather than over a connection. False
        before the first call."""
        return self._arena is not None

    @property
    def mapped_nbytes(self) -> int:
        """How much of the server's memory this process maps; 0 where `maps_memory` is False."""
        arena = self._arena
        return arena.data.nbytes if arena is not None else 0

    @property
    def shared_memory(self) -> ArenaMap | None:
        """The server's memory as this process maps it, to be registered with a device, say; its `data` may only be read
        under a lease. None where it is not mapped, or not all of its pages exist yet (`serve --prefault`)."""
        arena = self._arena
        return arena if arena is not None and arena.prefaulted else None

    def _resting(self, needs: int) -> str:
        """Why the server is not asked now; empty: it is. `needs`: STOPPED_READS or STOPPED_WRITES, what must go.

        While an operator has stopped it, one call a second goes out, to hear when it may go on.
        """
        now = time.monotonic()
        if self._closed:
            return ""
        if not self.answering:
            self._count({"skipped": 1})
            return _RESTING
        if self._stopped & needs and now < self._asked_at + STOPPED_PAUSE_S:
            self._count({"stopped": 1})
            return STOPPED_WORDS[needs]
        return ""

    def _heard(self, link: Session) -> None:
        """Note what the server said is stopped, once: what a link heard before it lay idle may no longer be so."""
        mode, link.conversation.mode = link.conversation.mode, None
        if mode is not None and (mode or self._stopped):
            self._stopped, self._asked_at = mode, time.monotonic()
        if link.conversation.forks:
            forks, link.conversation.forks = link.conversation.forks, b""
            self._told(forks)

    def _told(self, forks: bytes) -> None:
        """The server said that these keys, 32 bytes each, are forks: of interest to a cluster's client only."""

    def _failed(self, error: Exception, begun_s: float) -> str:
        """Note what ended a call that began then (monotonic time); the reason for its results."""
        self._count({"failures": 1})
        if isinstance(error, (RequestRefused, PoolBusy)) and not isinstance(error, AccessDenied):  # it is there
            return str(error)
        if not isinstance(error, (MMCacheError, OSError)):
            log.error("an operation failed inside the client; it counts as a miss", exc_info=error)
        with self._counting:
            now = time.monotonic()
            first = self._breaker.failed(now, now - begun_s)
        if first and self.announces:
            log.warning("%r does not answer: everything is a miss until it does (%s)", self, error)
        return str(error)

    def _succeeded(self, failures: int) -> None:
        """Note that the server answered a call that began after so many failures."""
        if self._breaker.pause_s:
            with self._counting:
                first = self._breaker.succeeded(failures)
            if first and self.announces:
                log.warning("%r answers again", self)

    def _deadline(self) -> float:
        return time.monotonic() + self.config.deadline_s

    def _verifies(self, verify: bool | None) -> bool:
        return self.config.verify if verify is None else verify

    def _renew_lock(self) -> None:
        """Also in a forked child, where another thread may have held the old one."""
        self._counting = threading.Lock()

    def _count(self, amounts: Mapping[str, Any]) -> None:
        with self._counting:
            for name, amount in amounts.items():
                self.counters[name] += amount
