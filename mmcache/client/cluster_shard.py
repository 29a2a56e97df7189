"""One shard as a cluster's client sees it: a client whose calls take their deadline, and the set of them by member."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final, TypeVar

from mmcache.client import calls
from mmcache.client.blocking import Client
from mmcache.client.calls import Get, Put
from mmcache.client.lease import Taken, take_lease
from mmcache.client.link import Link
from mmcache.client.pin import count_prefix, pin_prefix
from mmcache.client.protocol import KEY_NBYTES, MAX_FORKS_NBYTES, STOPPED_READS, STOPPED_WRITES, Flow
from mmcache.cluster.placement import Member, View
from mmcache.config import ClientConfig, parse_url
from mmcache.errors import ConfigError, MMCacheError, RequestRefused, TransportError, UsageError

T = TypeVar("T")
log = logging.getLogger("mmcache.cluster")
UNUSABLE_S: Final = 2.0
AGAIN_S: Final = 0.02  # for which a call waits for shards that may be back; an eighth of its deadline at most


class Shard(Client):
    """A client of one shard. What the public calls answer with misses when the shard does not answer is None here."""

    def __init__(self, member: Member, config: ClientConfig, tally: Callable[[Mapping[str, Any]], None]) -> None:
        super().__init__(config)
        self.member, self._tally = member, tally
        self._breaker.draw = random.random
        self._asking: threading.Thread | None = None
        self._forks: deque[bytes] = deque(maxlen=MAX_FORKS_NBYTES // KEY_NBYTES)

    def _count(self, amounts: Mapping[str, Any]) -> None:
        self._tally(amounts)

    def _renew_lock(self) -> None:
        super()._renew_lock()
        self._asking = None

    @property
    def answering(self) -> bool:
        """False from when it did not answer until `ask_again` has found that it does: no call waits for that."""
        return not self._breaker.pause_s

    def ask_again(self) -> threading.Thread | None:
        """Once its pause is over, begin to ask whether it is back. The thread that does, if it begins now."""
        with self._counting:
            if self._asking is not None or self.answering or not self._breaker.allows(time.monotonic()):
                return None
            self._asking = thread = threading.Thread(target=self._ask_again, name="mmcache-again", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # no thread can be had: another time
                self._asking = None
                return None
            return thread

    def _ask_again(self) -> None:
        failures, begun_s = self._breaker.failures, time.monotonic()
        try:
            self._demand(partial(calls.contains, digests=[bytes(KEY_NBYTES)]))
        except RequestRefused:  # it is there
            self._succeeded(failures)
        except Exception as error:
            if not self._closed:
                self._failed(error, begun_s)
        else:
            self._succeeded(failures)
        finally:
            self._asking = None

    def _attempt(
        self,
        ask: Callable[[Link], Flow[T]],
        fail: Callable[[str], T],
        deadline: float | None = None,
        needs: int = STOPPED_READS,
    ) -> T:
        try:
            return super()._attempt(ask, fail, deadline, needs)
        except UsageError as error:
            if not self._closed:
                raise
            return fail(str(error))  # its member left during the call

    def _told(self, forks: bytes) -> None:
        self._forks.extend(forks[at : at + KEY_NBYTES] for at in range(0, len(forks), KEY_NBYTES))

    def forks(self) -> set[bytes]:
        """The stored keys that it called forks since this was last asked."""
        told: set[bytes] = set()
        with contextlib.suppress(IndexError):
            while True:
                told.add(self._forks.popleft())
        return told

    def count(self, digests: Sequence[bytes], deadline: float) -> int | None:
        """How many leading keys are stored."""
        return self._attempt(partial(count_prefix, digests=digests), lambda reason: None, deadline)

    def flags(self, digests: Sequence[bytes], deadline: float) -> list[bool] | None:
        """Per key, whether it is stored."""
        return self._attempt(partial(calls.contains, digests=digests), lambda reason: None, deadline)

    def pin(self, digests: Sequence[bytes], deadline: float) -> tuple[int, list[int]] | None:
        """How many leading keys are stored, and the leases under which they are pinned as far as the shard allows."""
        return self._attempt(partial(pin_prefix, digests=digests), lambda reason: None, deadline)

    def take(self, digests: Sequence[bytes], deadline: float) -> Taken | None:
        """The frames of these keys, and the leases under which they are."""
        return self._attempt(partial(take_lease, digests=digests), lambda reason: None, deadline)

    def give_back(self, lease_ids: Sequence[int], deadline: float) -> bool:
        """Release leases; True if all were held until now."""
        return self._attempt(partial(calls.give_back, lease_ids=lease_ids), lambda reason: False, deadline, needs=0)

    def fetch(self, get: Get, deadline: float) -> None:
        """Fill destinations; what reads as corrupt is reported to the shard."""
        self._carry(get, deadline, STOPPED_READS, streams=1 if self.maps_memory else self.config.streams)
        if corrupt := get.corrupt():
            with contextlib.suppress(MMCacheError, OSError):
                self._demand(partial(calls.recheck, digests=corrupt), deadline)

    def store(self, put: Put, deadline: float) -> None:
        """Store values."""
        self._carry(put, deadline, STOPPED_WRITES, streams=self.config.streams)

    def remove(self, digests: Sequence[bytes], deadline: float) -> list[bool]:
        """Forget keys. Raises TransportError."""
        return self._demand(partial(calls.delete, digests=digests), deadline)


class Shards:
    """A Shard for each member that was asked for, made on demand and closed once its member has left. Thread-safe.

    `settings` are the client's, by name; what an address says itself goes before them. `tally` counts for all.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        tally: Callable[[Mapping[str, Any]], None],
        after_fork: Callable[[], None],
    ) -> None:
        self._settings, self._tally, self.after_fork = dict(settings), tally, after_fork
        self._members: dict[str, Member] = {}
        self._made: dict[str, Shard] = {}
        self._unusable: dict[str, tuple[float, str]] = {}  # until when it is not tried to make one again, and why
        self.announces, self.closed = True, False
        self.renew_lock()
        _ALL.add(self)

    def renew_lock(self) -> None:
        """Also in a forked child, where another thread may have held the old one."""
        self._lock = threading.Lock()

    def take(self, view: View) -> None:
        """These are the members now."""
        with self._lock:
            members = {member.id: member for member in view.members}
            gone = [
                self._made.pop(name)
                for name in list(self._made)
                if name not in members or members[name].address != self._members[name].address
            ]
            self._members = members
            self._unusable.clear()
        for shard in gone:
            shard.close()

    def get(self, name: str) -> Shard | None:
        """The shard of a member. None: it is not a member any more, or cannot be used now: its address, or a file that
        says who we are, is of no use. That is tried again after a while."""
        shard = self._made.get(name)
        if shard is None and time.monotonic() >= self._unusable.get(name, (0.0, ""))[0]:
            with self._lock:
                if name not in self._made and name in self._members and not self.closed:
                    self._make(self._members[name])
                shard = self._made.get(name)
        return shard

    def _make(self, member: Member) -> None:
        if not member.address:  # nobody is in
            return
        try:
            shard = Shard(member, shard_config(member.address, self._settings), self._tally)
        except (MMCacheError, OSError) as error:
            if member.id not in self._unusable:
                log.warning("shard %s cannot be used, its keys are misses until it can: %s", member.id, error)
            self._unusable[member.id] = time.monotonic() + UNUSABLE_S, str(error)
            return
        self._unusable.pop(member.id, None)
        shard.announces = self.announces
        self._made[member.id] = shard

    def announce(self, value: bool) -> None:
        """Whether the log says which shards do not answer."""
        self.announces = value
        for shard in self.opened():
            shard.announces = value

    def opened(self) -> list[Shard]:
        """Those that were made."""
        return list(self._made.values())

    def every(self) -> dict[str, Shard | MMCacheError]:
        """The shard of every member, or why it cannot be used."""
        found: dict[str, Shard | MMCacheError] = {}
        for name, member in list(self._members.items()):
            shard = self.get(name)
            if shard is not None:
                found[name] = shard
            elif member.address:  # else nobody is in
                found[name] = TransportError(self._unusable.get(name, (0.0, "it has just left"))[1])
        return found

    def open_to(self, name: str) -> bool:
        """Whether it may be asked now."""
        shard = self.get(name)
        return shard is not None and shard.answering

    def ask_again(self, patience_s: float = AGAIN_S) -> None:
        """Begin to ask those that did not answer whether they are back, and wait as long for what they say at most."""
        begun = [shard.ask_again() for shard in self.opened() if not shard.answering]
        until = time.monotonic() + patience_s
        for thread in filter(None, begun):
            thread.join(max(0.0, until - time.monotonic()))

    def close(self) -> None:
        """Close them all."""
        with self._lock:
            self.closed = True
            gone, self._made = self.opened(), {}
        for shard in gone:
            shard.close()


def shard_config(address: str, settings: Mapping[str, Any]) -> ClientConfig:
    """How to reach a member, a client URL or HOST:PORT. Raises ConfigError."""
    url = address if "://" in address else f"mmcache://{address}"
    config = parse_url(url)
    if config.scheme == "embedded":
        raise ConfigError(f"{address!r} is a member's address; a server inside another process cannot be reached")
    said = {name for name in settings if f"{name}=" in url.partition("?")[2]}
    return replace(config, **{name: value for name, value in settings.items() if name not in said})


_ALL: weakref.WeakSet[Shards] = weakref.WeakSet()


def _restart_in_child() -> None:
    for shards in list(_ALL):
        shards.renew_lock()
        shards.after_fork()


os.register_at_fork(after_in_child=_restart_in_child)
