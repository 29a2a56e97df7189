"""Embeddings on their way from the cache into an engine: fetched into host memory that all its workers can map.

One fetch serves every worker of the machine and every request that waits for the same item; what is promised to the
engine lies here, whole and verified, so that nothing of the cache can fail afterwards. The memory is anonymous
(memfd), so it goes with the process. Nothing of vLLM is imported.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import mmap
import os
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import torch

from mmcache.client.blocking import Client
from mmcache.errors import MMCacheError
from mmcache.transport.base import Outcome, Result
from mmcache_connectors.vllm.ec_items import Form, Named, Place

log = logging.getLogger("mmcache.vllm")
MAX_ITEMS: Final = 128  # each is two open files of the engine's process: mmap keeps one of its own


class Memory:
    """`nbytes` of host memory with a Place."""

    def __init__(self, nbytes: int) -> None:
        """Raises OSError where there is no memory, or no file, to be had."""
        fd = os.memfd_create("mmcache-embedding", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, nbytes)
            self._map = mmap.mmap(fd, nbytes)
        except BaseException:
            os.close(fd)
            raise
        self.place = Place(os.getpid(), fd, nbytes)

    def tensor(self, form: Form) -> torch.Tensor:
        """The memory as a tensor of this form, to be written."""
        return torch.frombuffer(self._map, dtype=getattr(torch, form.dtype)).view(form.shape)

    def close(self) -> None:
        """Give the memory back, once nothing maps it any more."""
        os.close(self.place.fd)
        del self._map


def mapped(place: Place, form: Form) -> torch.Tensor:
    """The tensor at a place of this or another process, for reading; it keeps the memory, and an open file of this
    process: copy it. Raises OSError."""
    fd = os.open(f"/proc/{place.pid}/fd/{place.fd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        # Private and writable, as torch warns of memory that cannot be written; nobody writes.
        memory = mmap.mmap(fd, place.nbytes, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    finally:
        os.close(fd)
    return torch.frombuffer(memory, dtype=getattr(torch, form.dtype)).view(form.shape)


class Lack(enum.Enum):
    """Why an embedding was not fetched."""

    MISS = "miss"  # or the cache did not give it in time
    NO_ROOM = "no room"  # on the shelf


@dataclass(slots=True)
class Fetched:
    """One item's embedding, there once `done` is set and `memory` is not None."""

    name: Named
    memory: Memory | None
    users: int = 1
    done: threading.Event = field(default_factory=threading.Event)


class Shelf:
    """At most `limit_nbytes` of fetched embeddings, and MAX_ITEMS; those nobody uses any more stay until their room is
    needed.

    Thread-safe. `counters` count since the start.
    """

    def __init__(self, client: Client, limit_nbytes: int) -> None:
        self._client, self._limit_nbytes = client, limit_nbytes
        self._lock = threading.Lock()
        self._items: OrderedDict[bytes, Fetched] = OrderedDict()  # by key; those used last come last
        self._nbytes = 0
        self._corrupt = False
        self.counters: Counter[str] = Counter()

    def fetch(self, names: Sequence[Named], wait_s: float) -> list[Fetched | Lack]:
        """The embeddings, each for one more user. Takes as long as the client, and `wait_s` at most for what others are
        fetching already."""
        with self._lock:
            found = [self._take(name) for name in names]
            new = [item for item, is_new in found if item is not None and is_new]
        if new:
            self._fill(new)
        until = time.monotonic() + wait_s
        kept: list[Fetched | Lack] = []
        for item, _ in found:
            if item is None:
                kept.append(Lack.NO_ROOM)
            elif item.done.wait(max(0.0, until - time.monotonic())) and item.memory is not None:
                kept.append(item)
            else:
                self.give_back([item])
                kept.append(Lack.MISS)
        return kept

    def give_back(self, items: Sequence[Fetched]) -> None:
        """One user of each less."""
        with self._lock:
            for item in items:
                item.users -= 1

    def _take(self, name: Named) -> tuple[Fetched | None, bool]:
        """(the item with one more user, whether it is new); None: there is no room. Under the lock."""
        known = self._items.get(name.key.digest)
        if known is not None and known.name.form == name.form:
            known.users += 1
            self._items.move_to_end(name.key.digest)
            return known, False
        if known is not None or not self._make_room(name.form.nbytes):
            self.counters["no_room"] += 1
            return None, False
        try:
            item = Fetched(name, Memory(name.form.nbytes))
        except (OSError, ValueError):
            self.counters["no_room"] += 1
            return None, False
        self._nbytes += name.form.nbytes
        self._items[name.key.digest] = item
        return item, True

    def _make_room(self, nbytes: int) -> bool:
        for digest in [digest for digest, item in self._items.items() if not item.users]:
            if self._has_room(nbytes):
                break
            self._drop(self._items.pop(digest))
        return self._has_room(nbytes)

    def _has_room(self, nbytes: int) -> bool:
        return len(self._items) < MAX_ITEMS and self._nbytes + nbytes <= self._limit_nbytes

    def _drop(self, item: Fetched) -> None:
        memory, item.memory = item.memory, None
        if memory is not None:
            self._nbytes -= memory.place.nbytes
            memory.close()

    def _fill(self, items: list[Fetched]) -> None:
        began_s = time.monotonic()
        results: Sequence[Result | None] = [None] * len(items)
        try:
            buffers = [item.memory.tensor(item.name.form) for item in items if item.memory is not None]
            results = self._client.get_into([item.name.key for item in items], buffers)
            del buffers
        except Exception:  # those who wait for the items must hear of it
            log.exception("mmcache: embeddings could not be fetched")
        with self._lock:
            for item, result in zip(items, results, strict=True):
                if not result and self._items.get(item.name.key.digest) is item:
                    del self._items[item.name.key.digest]
                    self._drop(item)
                item.done.set()
            nbytes = sum(item.name.form.nbytes for item in items if item.memory is not None)
            took_us = int((time.monotonic() - began_s) * 1e6)
            self.counters.update(fetch_us=took_us, fetched_nbytes=nbytes)
        self._note_outcomes(
            [(one.name, result) for one, result in zip(items, results, strict=True) if result is not None]
        )

    def _note_outcomes(self, results: Sequence[tuple[Named, Result]]) -> None:
        """Count; and drop entries of another form than the encoder's output, which would fail every time. (The client
        has the server check, and drop, those whose bytes are bad.)"""
        outcomes = Counter(str(result.outcome) for _, result in results)
        bad = [(name, result) for name, result in results if result.outcome in (Outcome.CORRUPT, Outcome.MISMATCH)]
        with self._lock:
            self.counters.update({f"fetch_{outcome}": count for outcome, count in outcomes.items()})
            self.counters["verify_failures"] += len(bad)
        if bad and not self._corrupt:
            log.warning("mmcache: a stored embedding failed its checks and was not used (%s)", bad[0][1].reason)
        self._corrupt = bool(bad)
        odd = [name.key for name, result in bad if result.outcome is Outcome.MISMATCH and name.form.measured]
        if odd:
            with contextlib.suppress(MMCacheError):
                self._client.delete(odd)

    def snapshot(self) -> dict[str, int]:
        """A copy of the counters."""
        with self._lock:
            return dict(self.counters)
