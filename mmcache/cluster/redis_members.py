"""Who is in a cluster, by Redis or Valkey, as clients follow it. What a server says there is in registration.py."""

from __future__ import annotations

import random
import threading
import time
from typing import Any, Final

from mmcache.cluster.membership import Tell
from mmcache.cluster.redis_link import RedisLink
from mmcache.cluster.seen import Roster, Seen
from mmcache.cluster.urls import MembersUrl

POLL_S: Final = 5.0  # beside being woken, as a wake-up can be lost
SPREAD_S: Final = 0.1  # not all clients ask in the same moment
WAKE_S: Final = 1.0  # how long `close` may go unnoticed
MOST_SKIPPED: Final = 4096  # wake-ups at a time


class RedisSource:
    """See Source."""

    def __init__(self, url: MembersUrl) -> None:
        self._link = RedisLink(url)
        self._roster = Roster()

    def look(self) -> Seen:
        """See Source."""
        with self._link.open() as connection:
            return self._roster.update(self._link.seen(connection), time.monotonic())

    def follow(self, tell: Tell, stopping: threading.Event) -> None:
        """See Source. Looks when woken, when somebody who is missing is to be given up, and every POLL_S."""
        self._roster.lost()
        with self._link.open() as connection, connection.pubsub(ignore_subscribe_messages=True) as channel:
            channel.subscribe(self._link.channel)
            while not stopping.is_set():
                now_s = time.monotonic()
                tell(self._roster.update(self._link.seen(connection), now_s))
                missing_s = self._roster.next_s(now_s)
                until_s = now_s + (POLL_S if missing_s is None else min(POLL_S, missing_s))
                while (left_s := until_s - time.monotonic()) > 0 and not stopping.is_set():
                    if channel.get_message(timeout=min(WAKE_S, left_s)) is not None:
                        stopping.wait(random.uniform(0, SPREAD_S))
                        _skip(channel)
                        break


def _skip(channel: Any) -> None:
    """One look answers all wake-ups that have come by now, as when many servers start at once."""
    for _ in range(MOST_SKIPPED):
        if channel.get_message(timeout=0) is None:
            return
