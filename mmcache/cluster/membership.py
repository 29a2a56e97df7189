"""Membership: who is in the cluster now, as a View that never blocks and outlives what it was learnt from.

`Static` is told once. `Watched` is told by a source (Redis, Kubernetes) on a thread of its own; while the source is
silent, the last View goes on. Deciding who is in is not done here: see beats.py, slices.py and seen.py.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import threading
from collections.abc import Callable
from typing import Final, Protocol

from mmcache.cluster.placement import Member, View
from mmcache.cluster.routes import MAX_REPLICAS
from mmcache.cluster.seen import Seen
from mmcache.errors import ConfigError, TransportError

log = logging.getLogger("mmcache.cluster")
FIRST_PAUSE_S: Final = 0.1
LONGEST_PAUSE_S: Final = 2.0  # well below a heartbeat's life: a server is back before anybody thinks that it left
# Nobody is in: as many members as may be asked for, of whom none can be reached.
NOBODY: Final = View(tuple(Member(f"nobody {number}", "") for number in range(MAX_REPLICAS)))


class Membership(Protocol):
    """What a client needs of it."""

    def view(self) -> View:
        """The last View known. Never blocks, never raises; the same object until it changes."""
        ...

    def close(self) -> None:
        """Stop to follow; `view` goes on to answer. Does not block."""
        ...


class Static:
    """One View for ever."""

    def __init__(self, view: View) -> None:
        self._view = view

    def view(self) -> View:
        """See Membership."""
        return self._view

    @property
    def seen(self) -> Seen:
        """The View's members."""
        return Seen(self._view.members)

    def close(self) -> None:
        """See Membership."""


Tell = Callable[[Seen], None]


class Source(Protocol):
    """A real system that knows who is there. It holds no connection between calls, so that it survives a fork."""

    def look(self) -> Seen:
        """Ask once, within a few seconds. Raises TransportError with what to do, ConfigError for a bad file."""
        ...

    def follow(self, tell: Tell, stopping: threading.Event) -> None:
        """Tell what is seen now and after each change, until `stopping`. Raises TransportError when the source is lost.

        What is seen just after a start is told too: whoever is called decides what a return from trouble means.
        """
        ...


class Watched:
    """The View of a source, kept up to date by a daemon thread; in a forked child by a new one.

    At the start the source is asked once: raises TransportError if it does not answer or nobody has joined, unless
    there is a `fallback`, which then is the View until the source says better. From then on a source that is lost is
    tried again after pauses that grow to LONGEST_PAUSE_S, with jitter, and logged once; the last View goes on.
    """

    def __init__(self, source: Source, what: str, fallback: View | None = None) -> None:
        self._source, self._what = source, what
        self._warned: frozenset[str] = frozenset()
        self.counters = {"view_changes": 0, "source_losses": 0, "left_out": 0, "problems": 0}
        self.seen = Seen()
        view: View | None = None
        try:
            self.seen = source.look()
            view = _view(self.seen)
            if view is None:
                raise TransportError(
                    f"no server has joined {what}; start one with `mmcache serve --join`, or give fallback=HOST:PORT"
                )
        except TransportError as error:
            if fallback is None:
                raise
            until = "everything is a miss" if fallback is NOBODY else "going on with the fallback"
            log.warning("%s; %s until that changes", error, until)
        first = view if view is not None else fallback
        assert first is not None
        self._view = first
        self._note(self.seen)
        self._closed = False
        self._followers: dict[int, threading.Event] = {}  # by process: what stops its thread
        self._begin()

    def _begin(self) -> None:
        """One thread a process, whoever comes first; where none can be had now, the next call tries again."""
        pid, stopping = os.getpid(), threading.Event()
        if self._followers.setdefault(pid, stopping) is stopping:
            try:
                threading.Thread(target=self._run, args=(stopping,), name="mmcache-members", daemon=True).start()
            except RuntimeError as error:
                log.warning("%s is not followed yet: %s", self._what, error)
                del self._followers[pid]

    def view(self) -> View:
        """See Membership."""
        if os.getpid() not in self._followers and not self._closed:
            self._begin()
        return self._view

    def close(self) -> None:
        """See Membership."""
        self._closed = True
        if (stopping := self._followers.get(os.getpid())) is not None:
            stopping.set()

    def _take(self, seen: Seen) -> None:
        self.seen = seen
        view = _view(seen)
        self._note(seen)
        if view is not None and view.version != self._view.version:
            self._view = view
            self.counters["view_changes"] += 1

    def _note(self, seen: Seen) -> None:
        """Count and log what is wrong, each once for as long as it is so."""
        now = {f"{one.id} ({one.address}) is left out: {one.why}" for one in seen.left_out}
        self.counters["left_out"] += len(now - self._warned)
        self.counters["problems"] += len(set(seen.problems) - self._warned)
        now.update(seen.problems)
        for text in sorted(now - self._warned):
            log.warning("%s: %s", self._what, text)
        self._warned = frozenset(now)

    def _run(self, stopping: threading.Event) -> None:
        pauses = Pauses()
        lost = ""

        def take(seen: Seen) -> None:
            nonlocal lost
            if lost:
                log.warning("%s is back", self._what)
            lost = ""
            pauses.reset()
            self._take(seen)

        while not stopping.is_set():
            why = "it ended the conversation"
            try:
                self._source.follow(take, stopping)
            except (TransportError, ConfigError) as error:
                why = str(error)
            except Exception as error:  # of a library: never the end of this thread
                log.exception("%s could not be followed", self._what)
                why = repr(error)
            if stopping.is_set():
                return
            if not lost:
                self.counters["source_losses"] += 1
                log.warning("%s is lost, the last view goes on: %s", self._what, why)
            lost = why
            stopping.wait(pauses.next_s())


class Pauses:
    """How long to wait before each try: twice as long each time up to LONGEST_PAUSE_S, and half of it by chance."""

    def __init__(self) -> None:
        self._longest_s = FIRST_PAUSE_S

    def reset(self) -> None:
        """The next pause is a first one."""
        self._longest_s = FIRST_PAUSE_S

    def next_s(self) -> float:
        """Seconds."""
        longest_s, self._longest_s = self._longest_s, min(LONGEST_PAUSE_S, self._longest_s * 2)
        return longest_s * random.uniform(0.5, 1.0)


def _view(seen: Seen) -> View | None:
    """None: nobody is there, or not as could be."""
    with contextlib.suppress(ConfigError):
        return View(seen.members) if seen.members else None
    return None
