"""The cache that engines are tested before: one server, or, with MMCACHE_TEST_SHARDS=3, a cluster of three.

A cluster is `mmcache up`, known to a real Redis; where there is no redis-server, its URL is the list of its servers.
Either is looked at and damaged from outside: by clients of each server, and in the memory that its holder keeps.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Self, TypeVar

import mmcache
from mmcache.client.blocking import Client
from mmcache.client.operations import Operations
from mmcache.errors import FrameError
from mmcache.frame import Kind, parse_header
from mmcache.keyset import Key, Keys, NamespaceId
from mmcache.pb import cache_pb2 as pb
from mmcache.testing.ports import OWN, own_ports
from mmcache.testing.process import ServerProcess, children_of, suspend
from tests.engines.inside import Inside

SHARDS: Final = int(os.environ.get("MMCACHE_TEST_SHARDS", "1"))
DEADLINE_S: Final = 5.0  # of what is asked of a server here
READY_S: Final = 120.0  # on a busy machine
LOOK_S: Final = 0.02
VLLM_PORTS: Final = OWN[:5000]
SGLANG_PORTS: Final = OWN[5000:]
T = TypeVar("T")


class Cache(ServerProcess):
    """Use as a context manager. `url` is for engines, and known before it serves; `urls` has each server's.

    `memory` is for all servers together; `serving`: from the start, else call `start`. `at`: at the place of another
    one, which is gone.
    """

    quiet_s = 0.5  # nothing stored for so long: an engine has stored everything it will

    def __init__(
        self, memory: str = "256MiB", *, pinned_share: float = 0.5, serving: bool = True, at: Cache | None = None
    ) -> None:
        self.ports: list[int] = at.ports if at else free_ports(SHARDS)
        self._redis: Any = at._redis if at else _redis() if SHARDS > 1 else None
        self._serving, self._owner = serving, at is None
        self._leases = contextlib.ExitStack()
        words = ["--hold"] if SHARDS == 1 else ["--shards", str(SHARDS)]
        if self._redis is not None:
            words += ["--redis", f"redis://127.0.0.1:{self._redis.port}/0", "--cluster", "engines"]
        super().__init__(
            memory,
            *words,
            listen=f"127.0.0.1:{self.ports[0]}",
            ready_s=READY_S,
            environment={"MMCACHE_PINNED_SHARE": str(pinned_share)},
            command="serve" if SHARDS == 1 else "up",
        )
        self.urls = [f"mmcache://127.0.0.1:{port}" for port in self.ports]
        self._to_engines()

    def _to_engines(self) -> None:
        self.url = "mmcache://" + ",".join(f"127.0.0.1:{port}" for port in self.ports)
        if self._redis is not None:
            self.url = f"mmcache+redis://127.0.0.1:{self._redis.port}/0?cluster=engines"

    def __enter__(self) -> Self:
        try:
            if self._redis is not None and self._owner:
                self._redis.start()
            if self._serving:
                self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: Any) -> None:
        self.let_go()
        self.stop()
        if self._redis is not None and self._owner:
            self._redis.__exit__(*exc)

    def start(self) -> Self:
        """Start it, and wait until it accepts."""
        super().start()
        assert [shard["url"] for shard in self.shards] == self.urls
        told, _ = self.cluster_url or self.url, self._to_engines()
        assert told == self.url
        return self

    @property
    def listed(self) -> bool:
        """Whether the URL names the servers; else engines are told of them once they have joined."""
        return self._redis is None

    # ------------------------------------------------------------------ its processes
    @property
    def holders(self) -> list[int]:
        """Who keeps the memory of each server."""
        return [self.pid] if SHARDS == 1 else children_of(self.pid)

    @property
    def servers(self) -> list[int]:
        """The process of each server."""
        return [server for holder in self.holders for server in children_of(holder)]

    def suspend(self) -> None:
        """SIGSTOP every server: they still have their connections, and say nothing."""
        for server in self.servers:
            suspend(server)

    def resume(self) -> None:
        """SIGCONT."""
        for server in self.servers:
            os.kill(server, signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL every process of it; what it held is gone."""
        self.let_go()
        if self.process is None:
            return
        suspend(self.pid)  # so that nothing is started again
        for process in [*self.servers, *self.holders]:
            os.kill(process, signal.SIGKILL)
        self.stop(signal.SIGKILL)

    # ------------------------------------------------------------------ what is in it
    def each(self, ask: Callable[[Client], T]) -> list[T]:
        """What a client of each server makes of this."""
        found = []
        for url in self.urls:
            with mmcache.connect(url, deadline_s=DEADLINE_S) as client:
                found.append(ask(client))
        return found

    def counters(self) -> dict[str, int]:
        """The servers', added up."""
        counters: Counter[str] = Counter()
        for each in self.each(lambda client: client.stat()["counters"]):
            counters.update(each)
        return counters

    def entries(self) -> list[pb.EntryRow]:
        """Every stored entry."""
        return [row for rows in self.each(lambda client: list(Operations(client).entries())) for row in rows]

    def digests(self) -> list[bytes]:
        """Every stored key, in order."""
        return sorted({row.key for row in self.entries()})

    def kv_frames(self) -> set[int]:
        """The sizes of the frames of KV."""
        return {row.nbytes for row in self.entries() if row.kind == Kind.KV}

    def varying_facts(self) -> set[str]:
        """The facts that are not the same in all namespaces that clients declared."""
        each = self.each(lambda client: list(Operations(client).namespaces()))
        declared = [set(row.facts.items()) for rows in each for row in rows if row.kind]
        shared = declared[0].intersection(*declared[1:])
        return {name for facts in declared for name, _ in facts - shared}

    def settle(self, patience_s: float = 20.0) -> int:
        """Wait until nothing more is stored for a while; how many frames were, since the start.

        The while is counted in looks: of a machine that stands still, the clock alone says nothing.
        """
        deadline = time.monotonic() + patience_s
        last, same = -1, 0
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(mmcache.connect(url, deadline_s=DEADLINE_S)) for url in self.urls]
            while time.monotonic() < deadline:
                now = sum(client.stat()["counters"]["stored"] for client in clients)
                last, same = now, same + 1 if now == last else 0
                if same * LOOK_S > self.quiet_s:
                    break
                time.sleep(LOOK_S)
        return last

    # ------------------------------------------------------------------ what is done to it
    def forget(self, digests: Sequence[bytes]) -> None:
        """Remove these entries."""
        self.each(lambda client: client.delete(_bare(digests)))

    def hold(self) -> int:
        """Lease every entry, so that none can be evicted; how many there were."""
        digests, held = self.digests(), 0
        for url in self.urls:
            client = self._leases.enter_context(mmcache.connect(url, deadline_s=DEADLINE_S))
            leased = client.acquire(_bare(digests))
            self._leases.callback(leased.release)
            held += sum(frame is not None for frame in leased.frames)
        return held

    def let_go(self) -> None:
        """Give the leases back."""
        self._leases.close()

    def flip(self, digests: Sequence[bytes], bit: int) -> int:
        """Flip one bit in each of these frames; how many were there. `bit` counts from the frame's start, modulo its
        size."""
        return sum(inside.flip(digests, bit) for inside in self._insides())

    def swap(self, digests: Sequence[bytes]) -> int:
        """Have each two keys of one server, in a row, name each other's frame; how many pairs there were."""
        return sum(inside.swap(digests) for inside in self._insides())

    def _insides(self) -> Iterator[Inside]:
        for holder, shard in zip(self.holders, self.shards, strict=True):
            with Inside(holder, shard["memory_nbytes"]) as inside:
                yield inside


def most_said(log: str, what: str) -> int:
    """How often an engine's log says this of one server, of the one of which it says it most."""
    lines = Counter(re.findall(rf"(?m)^.*<(?:Client|Shard) (\S+)> {what}", log))
    return max(lines.values(), default=0)


def stored_keys(client: Client, digests: Sequence[bytes]) -> Keys:
    """The keys of these entries, with their homes and namespaces, as far as they are still there and whole."""
    found = []
    for digest in digests:
        known = client.inspect(digest)
        with contextlib.suppress(FrameError):  # damaged, or not there
            meta = parse_header(known.header, limit_nbytes=1 << 30).meta
            namespace = NamespaceId(meta.namespace, known.kind, dict(known.facts))
            found.append(Key(digest, digest, meta.home, namespace, meta.parent))
    return Keys.of(found)


def _bare(digests: Sequence[bytes]) -> list[Key]:
    """Enough of a key for one server, which is asked by digest."""
    return [Key(digest, digest, digest, digest) for digest in digests]


def free_ports(count: int) -> list[int]:
    """So many in a row. The suites of both engines run at the same time: each has ports of its own."""
    return own_ports(count, VLLM_PORTS if importlib.util.find_spec("vllm") else SGLANG_PORTS)


def _redis() -> Any:
    if not shutil.which("redis-server") or importlib.util.find_spec("redis") is None:
        return None
    from tests.integration.redis_bed import Redis  # skips where there is none

    return Redis()
