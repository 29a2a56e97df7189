"""The process of `mmcache bench transfer` that measures: one client, and memcpy beside it in the same memory.

It obeys lines of JSON on stdin and answers each with one on stdout, so that two of them can be made to start together.
Sources are unique random bytes. A destination is poisoned before each round and its digest compared after it, outside
the timed part; the source is not read again for that, which would warm it for the memcpy of the next round.
"""

from __future__ import annotations

import json
import select
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from mmcache.bench.raw_peer import RawPeer
from mmcache.client.blocking import Client
from mmcache.connect import connect
from mmcache.keys import Namespace, opaque_key
from mmcache.keyset import Keys
from mmcache.transport.base import SLICE_NBYTES, Result

MiB = 1 << 20
MOST_NBYTES = 64 * MiB  # of one round
MOST_CALLS = 32
POISON = 0xA5
DEADLINE_S = 30.0

Bytes = npt.NDArray[np.uint8]


def calls_of(size_bytes: int, batch: int, round_nbytes: int) -> int:
    """How many calls a round makes to move about `round_nbytes`: each has values and destinations of its own."""
    return max(1, min(MOST_CALLS, round_nbytes // (size_bytes * batch)))


class Measurer:
    """Times rounds of one operation, and of memcpy of the same bytes.

    `prepare`, then rounds of `copy`, `reset`, `call` and `check`, then `finish`.

    After `check`, `wrong` counts the values that differed, `failed` the calls' keys that were no hit or not stored,
    and `reason` says why the first of them was not.
    """

    def __init__(self, client: Client, seed: int, most_nbytes: int = MOST_NBYTES) -> None:
        self.client = client
        rng = np.random.default_rng(seed)
        self.source: Bytes = rng.integers(0, 2**64, most_nbytes // 8, dtype=np.uint64).view(np.uint8)
        self.target: Bytes = np.full(most_nbytes, POISON, dtype=np.uint8)
        self._salt = rng.bytes(16)
        self._turn = 0
        self._namespace = Namespace(kind="kv", model="benchmark/none", dtype="uint8", layout="flat", block_size=16)
        self.wrong = self.failed = 0
        self.reason = ""

    def prepare(self, op: str, size_bytes: int, batch: int, calls: int) -> None:
        """Choose what the following rounds do, `calls` calls of `batch` values each.

        `op`: "get", "put", "acquire", or "get+read", a get and then a read of all that it delivered.
        """
        count, self._op, self._batch = batch * calls, op, batch
        self._turn += 1
        label = self._salt + self._turn.to_bytes(4, "little")
        keys = [opaque_key(self._namespace, label + place.to_bytes(4, "little")) for place in range(count)]
        self._runs = [Keys.of(keys[at : at + batch]) for at in range(0, count, batch)]
        self._keys = Keys.of(keys)
        self.sources = [self.source[at * size_bytes : (at + 1) * size_bytes] for at in range(count)]
        self.targets = [self.target[at * size_bytes : (at + 1) * size_bytes] for at in range(count)]
        self._digests = [_digest(source) for source in self.sources]
        if op != "put":
            self._note(self.client.put(self._keys, self.sources))

    def finish(self) -> None:
        """Forget what was stored for these rounds."""
        self.client.delete(self._keys)

    def copy(self) -> int:
        """Nanoseconds that memcpy takes for the same values, a copy each; with the same read after it as the calls."""
        started_ns = time.perf_counter_ns()
        for source, target in zip(self.sources, self.targets, strict=True):
            np.copyto(target, source)
        if self._op == "get+read":
            read(self.targets)
        return time.perf_counter_ns() - started_ns

    def reset(self) -> None:
        """Before a round: poison the destinations, and forget what a put has stored."""
        for target in self.targets:
            target.fill(POISON)
        if self._op == "put":
            self.client.delete(self._keys)

    def call(self) -> tuple[list[int], int]:
        """Nanoseconds of each call of a round, and of CPU time that this process used in all of them."""
        calls: dict[str, Callable[[Keys, Sequence[Bytes], Sequence[Bytes]], int]] = {
            "get": self._get,
            "get+read": self._get,
            "put": self._put,
            "acquire": self._acquire,
        }
        each, batch, call = [], self._batch, calls[self._op]
        self._cpu_ns = 0
        for at, keys in enumerate(self._runs):
            part = slice(at * batch, (at + 1) * batch)
            each.append(call(keys, self.sources[part], self.targets[part]))
        return each, self._cpu_ns

    def check(self) -> None:
        """Compare what a round delivered. A put is read back for it."""
        if self._op == "put":
            self._note(self.client.get_into(self._keys, self.targets, verify=False))
        self.wrong += sum(_digest(target) != digest for target, digest in zip(self.targets, self._digests, strict=True))

    def _get(self, keys: Keys, sources: Sequence[Bytes], targets: Sequence[Bytes]) -> int:
        self._begin()
        results = self.client.get_into(keys, targets)
        if self._op == "get+read":
            read(targets)
        taken_ns = self._taken_ns()
        self._note(results)
        return taken_ns

    def _put(self, keys: Keys, sources: Sequence[Bytes], targets: Sequence[Bytes]) -> int:
        self._begin()
        results = self.client.put(keys, sources)
        taken_ns = self._taken_ns()
        self._note(results)
        return taken_ns

    def _acquire(self, keys: Keys, sources: Sequence[Bytes], targets: Sequence[Bytes]) -> int:
        """Time to the views and from giving them back; in between, untimed, what they show is copied to be compared."""
        self._begin()
        leased = self.client.acquire(keys)
        taken_ns = self._taken_ns()
        for frame, target in zip(leased.frames, targets, strict=True):
            if frame is None:
                self.failed += 1
                self.reason = self.reason or "acquire found it missing"
            else:
                np.copyto(target, np.frombuffer(frame.payload(frame.header.tensors[0]), np.uint8))
            frame = None  # no view outlives the lease
        self._begin()
        held = leased.release()
        taken_ns += self._taken_ns()
        if not held:
            self.failed += len(keys)
            self.reason = self.reason or "the lease expired"
        return taken_ns

    def _begin(self) -> None:
        self._cpu_from_ns = time.process_time_ns()
        self._from_ns = time.perf_counter_ns()

    def _taken_ns(self) -> int:
        taken_ns = time.perf_counter_ns() - self._from_ns
        self._cpu_ns += time.process_time_ns() - self._cpu_from_ns
        return taken_ns

    def stream(self, size_bytes: int, stopped: Callable[[], bool], begun: Callable[[], None]) -> dict[str, int]:
        """Put and get values of `size_bytes`, one after the other, until `stopped()`; `begun` hears of the first.

        Returns the bytes moved, how many nanoseconds it took, and how many values were compared at the end.
        """
        self.prepare("put", size_bytes, 1, self.source.nbytes // size_bytes)
        turns, started_ns = 0, time.perf_counter_ns()
        while not stopped() or turns < len(self._runs):
            at = turns % len(self._runs)
            self.client.delete(self._runs[at])
            self._note(self.client.put(self._runs[at], self.sources[at : at + 1]))
            self._note(self.client.get_into(self._runs[at], self.targets[at : at + 1]))
            turns += 1
            if turns == 1:
                begun()
        taken_ns = time.perf_counter_ns() - started_ns
        for target in self.targets:
            target.fill(POISON)
        self.check()
        self.finish()
        return {"nbytes": 2 * turns * size_bytes, "ns": taken_ns, "compared": len(self.targets)}

    def _note(self, results: Sequence[Result]) -> None:
        for result in results:
            if not result:
                self.failed += 1
                self.reason = self.reason or f"{result.outcome}: {result.reason}"


def memcpy_gbps(measurer: Measurer, rounds: int) -> dict[str, list[float]]:
    """GB/s of one copy of the whole source, and of the same bytes in slices, in turns; and with a read after each."""
    source, target = measurer.source, measurer.target
    found: dict[str, list[float]] = {"single": [], "sliced": [], "single_read": [], "sliced_read": []}
    for _ in range(rounds):
        for name, step in (("single", source.nbytes), ("sliced", SLICE_NBYTES)):
            started_ns = time.perf_counter_ns()
            for at in range(0, source.nbytes, step):
                np.copyto(target[at : at + step], source[at : at + step])
            copied_ns = time.perf_counter_ns()
            read([target])
            found[name].append(source.nbytes / (copied_ns - started_ns))
            found[f"{name}_read"].append(source.nbytes / (time.perf_counter_ns() - started_ns))
    return found


def raw_tcp_gbps(measurer: Measurer, rounds: int) -> list[float]:
    """GB/s of as many bytes as the target holds over a bare TCP socket from another process."""
    with RawPeer(measurer.target) as peer:
        return [peer.gbps() for _ in range(rounds + 1)][1:]  # the first only warms up


def read(targets: Sequence[Bytes]) -> int:
    """Read every byte once, in words of eight: their sum. What a copy has left to be done later is paid for here."""
    return sum(int(np.add.reduce(target.view(np.uint64))) for target in targets)


def _digest(data: Bytes) -> bytes:
    """Not what the cache checks itself by (xxh3-128)."""
    return xxhash.xxh3_64_digest(data.data, seed=1)


def main() -> None:
    """Obey until stdin ends. The first order is to open a client; another such order closes that one first."""
    orders = (json.loads(line) for line in sys.stdin)
    order = next(orders, None)
    measurer: Measurer | None = None
    while order is not None:
        with connect(order["url"], verify=order["verify"], deadline_s=DEADLINE_S) as client:
            measurer = measurer or Measurer(client, order["seed"])
            measurer.client = client
            said = client.stat()
            _answer(transport=said["transport"], why=said["transport_why"])
            order = _obey(measurer, orders)


def _obey(measurer: Measurer, orders: Iterator[dict[str, Any]]) -> dict[str, Any] | None:
    """Answer every order up to the next to open a client, which is returned; None at the end."""
    work: dict[str, Callable[..., Any]] = {
        "prepare": measurer.prepare,
        "finish": measurer.finish,
        "copy": measurer.copy,
        "reset": measurer.reset,
        "check": measurer.check,
    }
    streamed: dict[str, int] = {}
    for order in orders:
        what = order.pop("do")
        if what == "open":
            return order
        if what == "totals":
            _answer(wrong=measurer.wrong, failed=measurer.failed, reason=measurer.reason)
        elif what == "call":
            each, cpu_ns = measurer.call()
            _answer(ns=each, cpu_ns=cpu_ns)
        elif what == "stream":  # until the next order comes, which asks how much it was
            streamed = measurer.stream(order["size_bytes"], _has_order, _answer)
        elif what == "streamed":
            _answer(**streamed)
        elif what == "longest_step":
            _answer(nbytes=measurer.client.stat()["counters"]["longest_step_bytes"])
        elif what == "memcpy":
            _answer(**memcpy_gbps(measurer, **order))
        elif what == "raw":
            _answer(gbps=raw_tcp_gbps(measurer, **order))
        else:
            _answer(ns=work[what](**order))
    return None


def _has_order() -> bool:
    return bool(select.select([sys.stdin], [], [], 0)[0])


def _answer(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


if __name__ == "__main__":
    main()
