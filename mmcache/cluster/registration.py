"""What a server says of itself in Redis or Valkey: that it is there, again and again, and that it leaves."""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any, Final

from mmcache._version import __version__
from mmcache.cluster.beats import BEAT_S, Beat, draining
from mmcache.cluster.membership import Pauses
from mmcache.cluster.redis_link import WAIT_S, RedisLink
from mmcache.cluster.urls import MembersUrl
from mmcache.errors import MMCacheError

log = logging.getLogger("mmcache.cluster")
OTHERS_EVERY: Final = 5  # beats


class Registration:
    """Says that a server is there, from a daemon thread, until `leave`.

    Redis may be out of reach, at the start too: it is tried again for as long as it takes, the server serves whom it
    knows, and whoever has a View goes on with it. Raises ConfigError for a URL or a file it names.
    """

    def __init__(self, url: MembersUrl, *, id: str, address: str, weight: float) -> None:
        self._link = RedisLink(url)
        self._beat = Beat(
            id=id, address=address, weight=weight, registration=secrets.token_hex(16), since_ms=0,
            version=__version__,
        )  # fmt: skip
        self._wake = threading.Event()
        self._leaving = False
        self._first = threading.Event()
        self._warned = ""
        self.why_not = "nothing was heard of it yet"  # why it has not joined; empty: it has
        self._thread = threading.Thread(target=self._run, name="mmcache-beat", daemon=True)

    @property
    def id(self) -> str:
        """What the server is called."""
        return self._beat.id

    def start(self, wait_s: float) -> None:
        """Begin; wait so long at most for the first heartbeat to be written."""
        self._thread.start()
        self._first.wait(wait_s)

    def _run(self) -> None:
        pauses = Pauses()
        while not self._leaving:
            try:
                self._say_on(pauses)
            except MMCacheError as error:
                self._note(str(error))
            except Exception as error:  # of a library: never the end of this thread
                self._note(repr(error))
            if not self._leaving:
                self._wake.wait(pauses.next_s())

    def _note(self, why: str) -> None:
        if not self.why_not or not self._first.is_set():
            log.error("%s is not told of this server, it is tried again: %s", self._link.what, why)
        self.why_not = why
        self._first.set()

    def _say_on(self, pauses: Pauses) -> None:
        with self._link.open() as connection:
            if not self._beat.since_ms:
                self._beat = replace(self._beat, since_ms=self._link.now_ms(connection))
            self._link.say(connection, self._beat)
            self._link.publish(connection)
            if self.why_not and self._first.is_set():
                log.warning("%s is told of this server again", self._link.what)
            self.why_not = ""
            self._first.set()
            pauses.reset()
            for number in count(1):
                self._wake.wait(BEAT_S)
                if self._leaving:
                    return
                self._link.say(connection, self._beat)
                if number % OTHERS_EVERY == 1:
                    self._look_for_others(connection)

    def _look_for_others(self, connection: Any) -> None:
        mine = [text for text in self._link.seen(connection).problems if f" id {self._beat.id} (" in text]
        for text in mine:
            if text != self._warned:
                log.error("%s", text)
                self._warned = text

    def leave(self) -> bool:
        """Say that this server is about to end, so that new views are without it; it still serves. Bounded.

        Whether it could be said: if so, clients hear of it at once, as a rule.
        """
        self._leaving = True
        self._wake.set()
        self._thread.join(2 * WAIT_S)  # what it may still be writing must not come after this
        before, self._beat = self._beat, draining(self._beat)
        return self._once(lambda connection: self._link.say(connection, self._beat, before))

    def gone(self) -> None:
        """Take back what was said: the server has ended. Bounded."""
        self._once(lambda connection: self._link.forget(connection, self._beat))

    def _once(self, act: Callable[[Any], None]) -> bool:
        """Not tried where it is known to fail: an ending must not wait for what is not there."""
        if self.why_not:
            return False
        try:
            with self._link.open() as connection:
                act(connection)
                self._link.publish(connection)
        except MMCacheError as error:
            self._note(str(error))
        return not self.why_not
