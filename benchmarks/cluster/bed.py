"""The servers of a cluster, each a process: started, killed, started again where they were; and a real redis-server."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mmcache
from mmcache.client.blocking import Client
from mmcache.errors import ConfigError
from mmcache.keyset import Keys
from mmcache.testing.ports import keeper
from mmcache.testing.process import ServerProcess
from mmcache.testing.values import eventually


class Servers:
    """Shards by id, on loopback. Use as a context manager."""

    def __init__(self, memory_nbytes: int, *words: str) -> None:
        self._memory, self._words = str(memory_nbytes), words
        self._running: dict[str, ServerProcess] = {}
        self._places: dict[str, str] = {}
        self.ready_s: dict[str, float] = {}  # when each was there the last time, monotonic

    def start(self, name: str = "") -> str:
        """Start one, again where it was, or anew; its id, which is its HOST:PORT where none is given."""
        listen = self._places.get(name, "127.0.0.1:0")
        server = ServerProcess(self._memory, *self._words, listen=listen).start()
        place = server.url.rpartition("/")[2]
        name = name or place
        self._running[name], self._places[name] = server, place
        with mmcache.connect(server.url) as client:
            self.ready_s[name] = time.monotonic() - client.stat()["uptime_s"]
        return name

    def start_beside(self, name: str = "") -> threading.Thread:
        """The same, on a thread: join it."""
        thread = threading.Thread(target=self.start, args=(name,), daemon=True)
        thread.start()
        return thread

    def pid(self, name: str) -> int:
        """Its process."""
        return self._running[name].pid

    @property
    def members(self) -> tuple[tuple[str, str], ...]:
        """(id, address) of each."""
        return tuple((name, f"mmcache://{place}") for name, place in self._places.items())

    @property
    def names(self) -> list[str]:
        """Their ids."""
        return list(self._running)

    def counters(self, name: str) -> dict[str, Any]:
        """What a shard counts; nothing where it does not answer."""
        with contextlib.suppress(mmcache.MMCacheError), self.connect(name) as client:
            counters: dict[str, Any] = client.stat()["counters"]
            return counters
        return {}

    def connect(self, name: str) -> Client:
        """A client of one alone."""
        return mmcache.connect(self._running[name].url)

    def holding(self, name: str, keys: Keys) -> set[bytes]:
        """Those of these keys that a shard has now."""
        with self.connect(name) as client:
            return {digest for digest, there in zip(keys.digests, client.contains(keys), strict=True) if there}

    def __enter__(self) -> Servers:
        return self

    def __exit__(self, *error: object) -> None:
        with ThreadPoolExecutor() as pool:
            list(pool.map(ServerProcess.stop, self._running.values()))


@contextlib.contextmanager
def redis_server() -> Iterator[str]:
    """HOST:PORT of one of our own, without persistence. Raises ConfigError where there is no program of that name."""
    if not shutil.which("redis-server"):
        raise ConfigError("there is no redis-server on PATH: install it (6 or newer), the shards join by it")
    with keeper() as kept, tempfile.TemporaryDirectory(prefix="mmcache-redis-") as folder:
        port = kept.getsockname()[1]
        words = ["--port", str(port), "--bind", "127.0.0.1", "--dir", folder, "--save", "", "--appendonly", "no"]
        process = subprocess.Popen(["redis-server", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            eventually(lambda: _accepts(port), "redis-server answers")
            yield f"127.0.0.1:{port}"
        finally:
            process.kill()
            process.wait()


def _accepts(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
        return True
    return False
