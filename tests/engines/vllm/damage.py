"""Damage to what a cache holds, and a cache in a process of its own that can be damaged, stopped and killed.

`python -m tests.engines.vllm.damage ADDRESS MEMORY_NBYTES` is that process: it answers lines of JSON on stdin,
`{"op": ..., ...}`, each with a line, until its input ends. `CacheProcess` starts it and speaks to it.
"""

from __future__ import annotations

import contextlib
import json
import random
import selectors
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

import mmcache
from mmcache.errors import UsageError
from mmcache.frame import parse_header
from mmcache.keyset import Key, Keys, NamespaceId
from mmcache.tensors import as_numpy
from mmcache.testing import faults
from tests.engines.vllm.harness import Cache
from tests.engines.vllm.models import ROOT
from tests.integration.support import suspend

READY_S = 60.0
PAYLOAD_BIT = 8 * 4096  # well inside every payload


def flip(cache: Cache, digests: Sequence[bytes], bit: int = PAYLOAD_BIT) -> int:
    """Flip this bit of these frames; how many were still there."""
    return sum(_planted(faults.flip_bit, cache, digest, bit) for digest in digests)


def swap(cache: Cache, digests: Sequence[bytes]) -> int:
    """Have each two keys in a row name each other's frame; how many pairs were still there."""
    return sum(_planted(faults.swap_entries, cache, *pair) for pair in zip(digests[::2], digests[1::2], strict=False))


def reshape(cache: Cache, digests: Sequence[bytes]) -> int:
    """Under each of these keys a valid frame of another shape; how many were stored."""
    return _rewrite(cache, digests, [np.zeros((2, 2, 16, 64), np.float32)] * len(digests))


def exchange(cache: Cache, digests: Sequence[bytes]) -> int:
    """Under each of these keys the values of the next one, with a checksum that is right: nobody can notice but by what
    a model makes of them. How many were stored."""
    with mmcache.connect(cache.url) as client, client.acquire(_keys(client, digests)) as lease:
        frames = [frame for frame in lease.frames if frame is not None]
        assert len(frames) == len(digests), "something was evicted, or does not fit in what may be leased"
        values = [as_numpy(one.spec, frame.payload(one)).copy() for frame in frames for one in frame.header.tensors]
    return _rewrite(cache, digests, values[1:] + values[:1])


def _planted(fault: Any, cache: Cache, *where: Any) -> bool:
    with contextlib.suppress(UsageError):  # evicted meanwhile
        fault(cache.server.shard, *where)
        return True
    return False


def _rewrite(cache: Cache, digests: Sequence[bytes], values: Sequence[NDArray[Any]]) -> int:
    with mmcache.connect(cache.url) as client:
        keys = _keys(client, digests)
        client.delete(keys)
        return sum(result.outcome == "stored" for result in client.put(keys, list(values)[: len(keys)]))


def _keys(client: mmcache.Client, digests: Sequence[bytes]) -> Keys:
    """The keys of these entries, as far as they are still there."""
    found = []
    for digest in digests:
        known = client.inspect(digest)
        if known.found:
            namespace = parse_header(known.header, limit_nbytes=1 << 30).meta.namespace
            found.append(Key(digest, digest, digest, NamespaceId(namespace, known.kind, dict(known.facts))))
    return Keys.of(found)


class _Operations:
    """What the process is asked; all give what JSON can carry."""

    def __init__(self, cache: Cache) -> None:
        self._cache, self._leases = cache, [0]

    def harm(self, how: str, share: float, seed: int) -> int:
        """Do one of the functions above, or `forget`, to a share of the entries, two at least, drawn by the seed; its
        answer."""
        digests = self._cache.digests()
        some = random.Random(seed).sample(digests, min(len(digests), max(2, round(share * len(digests)))))
        if how == "forget":
            self._cache.forget(some)
            return len(some)
        harm = {"flip": flip, "swap": swap, "reshape": reshape, "exchange": exchange}[how]
        return harm(self._cache, some)

    def hold(self) -> int:
        """Lease every entry, so that none can be evicted; how many there were."""
        digests = self._cache.digests()
        lease_id, _ = self._cache.server.shard.acquire(0, digests)
        self._leases.append(lease_id)
        return len(digests)

    def let_go(self) -> None:
        """Give the leases back."""
        while len(self._leases) > 1:
            self._cache.server.shard.release(0, self._leases.pop())

    def settle(self) -> int:
        """Wait until nothing more is stored; how many entries there are."""
        self._cache.settle()
        return len(self._cache.digests())

    def counters(self) -> dict[str, int]:
        """The server's."""
        return {name: value for name, value in self._cache.counters().items() if isinstance(value, int)}


class CacheProcess:
    """A cache of so much memory at `address`, in a process of its own. Use as a context manager."""

    def __init__(self, address: str, memory_nbytes: int) -> None:
        command = [sys.executable, "-m", "tests.engines.vllm.damage", address, str(memory_nbytes)]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()

    def call(self, op: str, **arguments: Any) -> Any:
        """One operation."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.communicate()

    def suspend(self) -> None:
        """SIGSTOP: it still has its connections, and says nothing."""
        suspend(self._process.pid)

    def resume(self) -> None:
        """SIGCONT."""
        self._process.send_signal(signal.SIGCONT)

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            line = self._process.stdout.readline() if selector.select(READY_S) else ""
        assert line, "the cache's process ended, or said nothing in time"
        return json.loads(line)


def main(address: str, memory_nbytes: str) -> None:
    """Serve, say so, and do what is asked until stdin ends."""
    with Cache(int(memory_nbytes), pinned_share=1.0, listen=address) as cache:
        operations = _Operations(cache)
        print(json.dumps("ready"), flush=True)
        for line in sys.stdin:
            call = json.loads(line)
            print(json.dumps(getattr(operations, call.pop("op"))(**call)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
