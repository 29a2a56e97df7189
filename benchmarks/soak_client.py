"""One client of the soak: a process that calls everything at random and compares each byte that comes back.

Its counts lie in a file that the soak maps too, so that they outlive a SIGKILL.
"""

from __future__ import annotations

import os
import random
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Final

import blake3
import numpy as np
from numpy.typing import NDArray

import mmcache
from mmcache.client.blocking import Client
from mmcache.errors import LeaseLost, TransportError
from mmcache.keyset import Keys
from mmcache.tensors import as_numpy
from mmcache.transport.base import Outcome

Bytes = NDArray[np.uint8]
COUNTERS: Final = (
    "ops",
    "hits",
    "misses",
    "stored",
    "refused",
    "compared",
    "compared_bytes",
    "wrong",  # bytes of a hit that are not the key's value
    "stale",  # a hit after its time to live
    "corrupt",  # the checksum said so: never a hit
    "unavailable",
    "leases_lost",
    "raised",  # a call that must not raise did
)
NAMESPACE: Final = mmcache.Namespace(kind="kv", model="soak", dtype="uint8", layout="LBHNC", block_size=16)
SIZES: Final = (200, 4096, 30_000, 65_536, 262_157)
TTL_S: Final = 0.5
TTL_GRACE_S: Final = 0.5
RECONNECT_OPS: Final = 400


def keys_of(positions: list[int]) -> Keys:
    """The keys at these places of the working set."""
    return Keys.of([mmcache.opaque_key(NAMESPACE, f"soak/{position}".encode()) for position in positions])


def nbytes_of(position: int) -> int:
    """How large the value at this place of the working set is."""
    return SIZES[position % len(SIZES)]


def value_of(digest: bytes, nbytes: int) -> Bytes:
    """The only right value of a key, computed anew from it."""
    return np.frombuffer(blake3.blake3(digest).digest(nbytes), np.uint8)


def working_set(nbytes: int) -> int:
    """How many values make up at least `nbytes`."""
    return len(SIZES) * -(-nbytes // sum(SIZES))


class Board:
    """What clients and the soak tell each other in a file: each client's counts, a row each, and whether it is over."""

    def __init__(self, file: Path, clients: int) -> None:
        cells = np.memmap(file, np.int64, "r+", shape=(clients * len(COUNTERS) + 1,))
        self.counts: NDArray[np.int64] = cells[:-1].reshape(clients, len(COUNTERS))
        self._over = cells[-1:]

    @staticmethod
    def create(file: Path, clients: int) -> None:
        """An empty one."""
        file.write_bytes(bytes(8 * (clients * len(COUNTERS) + 1)))

    def end(self) -> None:
        """Have every client stop."""
        self._over[0] = 1

    def over(self) -> bool:
        """Whether they should."""
        return bool(self._over[0])


class SoakClient:
    """Calls a cache until it is time; every value it is given is compared."""

    def __init__(self, url: str, seed: int, count: int, counts: NDArray[np.int64]) -> None:
        self.url, self.count, self.counts = url, count, counts
        self.random = random.Random(seed)
        self.prefix = f"{seed}/{time.monotonic_ns()}"
        self.lapsing: list[tuple[float, Keys]] = []
        self.turns: list[tuple[int, Callable[[Client], None]]] = [
            (50, self.get_or_put),
            (18, self.put),
            (12, self.look),
            (8, self.ask),
            (4, self.delete),
            (8, self.lapse),
        ]

    def add(self, name: str, amount: int = 1) -> None:
        self.counts[COUNTERS.index(name)] += amount

    def pick(self) -> list[int]:
        """Up to 8 places, early ones more often: a working set has favourites."""
        some = self.random.choice((1, 1, 2, 4, 8))
        return list({int(self.count * self.random.random() ** 2) for _ in range(some)})

    def run(self, over: Callable[[], bool]) -> None:
        """Call until it is over."""
        weights = [weight for weight, _ in self.turns]
        while not over():
            try:
                with mmcache.connect(self.url, lazy=True) as cache:
                    for _ in range(RECONNECT_OPS):
                        if over():
                            break
                        (_, turn), *_ = self.random.choices(self.turns, weights)
                        turn(cache)
                        self.add("ops")
            except Exception:
                self.add("raised")
                traceback.print_exc(file=sys.stderr)

    def compare(self, found: Bytes, digest: bytes) -> None:
        right = value_of(digest, found.nbytes)
        self.add("compared")
        self.add("compared_bytes", found.nbytes)
        if not np.array_equal(found, right):
            self.add("wrong")

    def store(self, cache: Client, keys: Keys, sizes: list[int], ttl_s: float | None = None) -> bool:
        values = [value_of(digest, nbytes) for digest, nbytes in zip(keys.digests, sizes, strict=True)]
        results = cache.put(keys, values, ttl_s=ttl_s)
        self.add("stored", sum(result.outcome is Outcome.STORED for result in results))
        self.add("refused", sum(result.outcome is Outcome.REFUSED for result in results))
        self.add("unavailable", sum(result.outcome is Outcome.UNAVAILABLE for result in results))
        return all(results)

    def get_or_put(self, cache: Client) -> None:
        places = self.pick()
        keys = keys_of(places)
        buffers = [np.full(nbytes_of(place), 0xA5, np.uint8) for place in places]
        results = cache.get_into(keys, buffers)
        missing = []
        for place, digest, buffer, result in zip(places, keys.digests, buffers, results, strict=True):
            if result:
                self.add("hits")
                self.compare(buffer, digest)
                continue
            self.add("misses")
            self.add("corrupt", result.outcome in (Outcome.CORRUPT, Outcome.MISMATCH))
            self.add("unavailable", result.outcome is Outcome.UNAVAILABLE)
            missing.append(place)
        if missing:
            self.store(cache, keys_of(missing), list(map(nbytes_of, missing)))

    def put(self, cache: Client) -> None:
        places = self.pick()
        self.store(cache, keys_of(places), list(map(nbytes_of, places)))

    def look(self, cache: Client) -> None:
        """Read without a copy, under a lease; what was seen counts only if the lease held."""
        keys = keys_of(self.pick())
        seen: list[tuple[Bytes, bytes]] = []
        try:
            with cache.acquire(keys) as leased:
                for frame, digest in zip(leased.frames, keys.digests, strict=True):
                    if frame is not None:
                        (tensor,) = frame.header.tensors
                        seen.append((as_numpy(tensor.spec, frame.payload(tensor)).copy(), digest))
        except LeaseLost:
            self.add("leases_lost")
            return
        for found, digest in seen:
            self.compare(found, digest)

    def ask(self, cache: Client) -> None:
        keys = keys_of(self.pick())
        cache.match_prefix(keys)
        assert len(cache.contains(keys)) == len(keys)

    def delete(self, cache: Client) -> None:
        try:
            cache.delete(keys_of(self.pick()))
        except TransportError:  # an administrative call: it may raise this
            self.add("unavailable")

    def lapse(self, cache: Client) -> None:
        """Store something of this client's own for a short time; look after what was stored so before."""
        now = time.monotonic()
        while self.lapsing and self.lapsing[0][0] < now:
            _, keys = self.lapsing.pop(0)
            self.add("stale", any(cache.get_into(keys, [np.empty(1000, np.uint8)])))
        keys = Keys.of([mmcache.opaque_key(NAMESPACE, f"{self.prefix}/{now}".encode())])
        if self.store(cache, keys, [1000], TTL_S):
            self.lapsing.append((time.monotonic() + TTL_S + TTL_GRACE_S, keys))


def run_client(url: str, seed: int, count: int, file: Path, clients: int, row: int) -> None:
    """The whole life of a client process. It ends with its parent, too."""
    board, parent = Board(file, clients), os.getppid()
    SoakClient(url, seed, count, board.counts[row]).run(lambda: board.over() or os.getppid() != parent)
