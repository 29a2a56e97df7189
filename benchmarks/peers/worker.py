"""A worker process: one client of one peer, and memcpy beside it in the same memory.

It runs in the peer's environment, obeys lines of JSON on stdin and answers each with one on stdout. All sources are in
one file that every worker maps; destinations are its own. A destination is poisoned before memcpy and before the peer
writes to it, and compared with the source afterwards, outside the timed part.
"""

from __future__ import annotations

import importlib
import json
import mmap
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.peers.adapters.base import Bytes, Client, KiB

SLICE_NBYTES = 256 * KiB
POISON = 0xA5


class Worker:
    """Rounds of one client: `prepare`, then `copy`, `poison`, `put`, `get` or `view`, `check`, as it is told."""

    def __init__(self, source_path: str, target_nbytes: int) -> None:
        with open(source_path, "r+b") as file:
            flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
            self.source: Bytes = np.frombuffer(mmap.mmap(file.fileno(), 0, flags=flags), np.uint8)
        self.target: Bytes = np.full(target_nbytes, POISON, np.uint8)
        self._client: Client | None = None
        self._names: list[str] = []

    @property
    def client(self) -> Client:
        """The client; `open` has been asked for before."""
        assert self._client is not None
        return self._client

    def open(self, client: str, options: dict[str, Any]) -> None:
        """Connect."""
        module, _, name = client.partition(":")
        make = getattr(importlib.import_module(f"benchmarks.peers.adapters.{module}"), name)
        self._client = make(options, self.source, self.target)

    def prepare(self, op: str, names: list[str], offset: int, size_bytes: int, batch: int) -> None:
        """Choose what the following orders move: values at `offset` of the source, `batch` a call."""
        self._names = names
        count = len(names)
        self._source = self.source[offset : offset + count * size_bytes]
        self._target = self.target[: count * size_bytes]
        memory = self._source if op == "put" else self._target
        buffers = [memory[at * size_bytes : (at + 1) * size_bytes] for at in range(count)]
        self._size_bytes = size_bytes
        self._calls = [
            self.client.prepare(names[at : at + batch], buffers[at : at + batch]) for at in range(0, count, batch)
        ]

    def copy(self, at_ns: int, whole: bool) -> dict[str, Any]:
        """Copy the values from the source to the target, from `at_ns` on: each whole, or in slices."""
        step = self._size_bytes if whole else min(SLICE_NBYTES, self._size_bytes)
        started_ns = _wait(at_ns)
        for at in range(0, self._source.nbytes, step):
            np.copyto(self._target[at : at + step], self._source[at : at + step])
        return {"start_ns": started_ns, "end_ns": time.monotonic_ns()}

    def poison(self) -> None:
        """Overwrite the target."""
        self._target.fill(POISON)

    def put(self, at_ns: int) -> dict[str, Any]:
        """Store the values, from `at_ns` on."""
        return self._timed(at_ns, self.client.put, self.client.settle)

    def get(self, at_ns: int) -> dict[str, Any]:
        """Fetch the values, from `at_ns` on."""
        return self._timed(at_ns, self.client.get)

    def can_view(self) -> bool:
        """Whether the peer shows values where it keeps them."""
        return self.client.VIEWS

    def view(self, at_ns: int) -> dict[str, Any]:
        """See the values, from `at_ns` on, a call at a time; what is seen is copied to the target, untimed."""
        each_ns, at = [], 0
        started_ns = _wait(at_ns)
        for batch in self._calls:
            before_ns = time.monotonic_ns()
            views = self.client.view(batch)
            each_ns.append(time.monotonic_ns() - before_ns)
            for view in views:
                self._target[at : at + self._size_bytes] = np.frombuffer(view, np.uint8)[: self._size_bytes]
                at += self._size_bytes
            del view, views
            self.client.leave(batch)
        return {"start_ns": started_ns, "end_ns": started_ns + sum(each_ns), "each_ns": each_ns}

    def _timed(
        self, at_ns: int, call: Callable[[Any], None], last: Callable[[Any], None] | None = None
    ) -> dict[str, Any]:
        each_ns = []
        before_ns = started_ns = _wait(at_ns)
        for batch in self._calls:
            call(batch)
            now_ns = time.monotonic_ns()
            each_ns.append(now_ns - before_ns)
            before_ns = now_ns
        if last is not None:
            last(self._calls[-1])
        return {"start_ns": started_ns, "end_ns": time.monotonic_ns(), "each_ns": each_ns}

    def check(self) -> int:
        """How many values are not what is in the source."""
        size = self._size_bytes
        parts = range(0, self._source.nbytes, size)
        return sum(not np.array_equal(self._source[at : at + size], self._target[at : at + size]) for at in parts)

    def handles(self) -> Sequence[str]:
        """The peer's own names for what was put, if it has such."""
        return self.client.handles(self._names)

    def learn(self, names: list[str], handles: list[str]) -> None:
        """Take another worker's."""
        if handles:
            self.client.learn(names, handles)

    def delete(self, names: list[str]) -> None:
        """Forget values."""
        self.client.delete(names)

    def close(self) -> None:
        """Leave the peer."""
        self.client.close()


def _wait(at_ns: int) -> int:
    """Sleep until then, so that several workers begin together; the time it is now."""
    time.sleep(max(0, at_ns - time.monotonic_ns()) / 1e9)
    return time.monotonic_ns()


def main() -> None:
    """Obey until stdin ends; what goes wrong is an answer."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print to stdout
    worker = Worker(sys.argv[1], int(sys.argv[2]))
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = {"value": getattr(worker, order.pop("do"))(**order)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
    os._exit(0)  # some libraries' threads do not end


if __name__ == "__main__":
    main()
