"""A real redis-server for tests: alone, under Sentinels with a replica, or as a Redis Cluster; all on loopback."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from mmcache.cluster.urls import parse_members_url
from mmcache.testing.ports import keeper
from mmcache.testing.values import eventually

redis = pytest.importorskip("redis", reason="the extra cluster is not installed")
if not shutil.which("redis-server"):
    pytest.skip("no redis-server on PATH", allow_module_level=True)


def keepers() -> list[socket.socket]:
    """Of a free port, and of its partner for the cluster bus (10,000 above)."""
    while True:
        kept = keeper()
        bus_port = kept.getsockname()[1] + 10_000
        with contextlib.suppress(OSError, OverflowError):
            with socket.socket() as other:  # fails where it is kept for somebody else
                other.bind(("127.0.0.1", bus_port))
            return [kept, keeper(bus_port)]
        kept.close()


class Redis:
    """One redis-server, without persistence. Use as a context manager.

    `words` go to it as they are; `settings` are how redis-py reaches it, with `ssl` at a TLS port; `sentinel`, its
    lines, makes it one.
    """

    def __init__(self, *words: str, port: int = 0, sentinel: str = "", **settings: Any) -> None:
        self._keepers = [keeper(port)] if port else keepers()
        self.port = self._keepers[0].getsockname()[1]
        self._words, self._sentinel, self._settings = words, sentinel, settings
        self.folder = tempfile.TemporaryDirectory(prefix="mmcache-redis-")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        """Start it, and wait until it answers."""
        port = ["--port", "0", "--tls-port"] if self._settings.get("ssl") else ["--port"]
        place = [*port, str(self.port), "--bind", "127.0.0.1", "--dir", self.folder.name]
        command = ["redis-server", *place, "--save", "", "--appendonly", "no", *self._words]
        if self._sentinel:
            file = Path(self.folder.name) / "sentinel.conf"
            file.write_text(f"port {self.port}\nbind 127.0.0.1\ndir {self.folder.name}\n{self._sentinel}\n")
            command = ["redis-server", str(file), "--sentinel"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        eventually(self._answers, f"redis-server answers on {self.port}")
        return self

    def client(self) -> Any:
        """A connection of redis-py's."""
        return redis.Redis(host="127.0.0.1", port=self.port, **self._settings)

    def _answers(self) -> bool:
        with contextlib.closing(self.client()) as client, contextlib.suppress(redis.ConnectionError):
            with contextlib.suppress(redis.AuthenticationError, redis.ResponseError):
                client.ping()
            return True
        return False

    def kill(self) -> None:
        """SIGKILL, if it runs."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def signal(self, number: int) -> None:
        """Send it."""
        assert self.process is not None
        self.process.send_signal(number)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.kill()
        for kept in self._keepers:
            kept.close()
        self.folder.cleanup()


@contextlib.contextmanager
def redis_cluster(count: int = 3) -> Iterator[list[Redis]]:
    """A Redis Cluster of masters that share the slots, once all say that it is well."""
    words = ["--cluster-enabled", "yes", "--cluster-node-timeout", "15000", "--cluster-config-file", "nodes.conf"]
    with contextlib.ExitStack() as stack:
        nodes = [stack.enter_context(Redis(*words)) for _ in range(count)]
        clients = [stack.enter_context(contextlib.closing(node.client())) for node in nodes]
        for number, client in enumerate(clients):
            first, last = 16384 * number // count, 16384 * (number + 1) // count - 1
            client.execute_command("CLUSTER ADDSLOTSRANGE", first, last)
            client.execute_command("CLUSTER MEET", "127.0.0.1", nodes[0].port)

        def well() -> bool:
            said = [client.execute_command("CLUSTER INFO") for client in clients]
            peers = [len(client.execute_command("CLUSTER NODES")) for client in clients]
            return all(one["cluster_state"] == "ok" for one in said) and peers == [count] * count

        eventually(well, "the Redis Cluster is well", 20.0)
        yield nodes


@contextlib.contextmanager
def redis_sentinels(master_name: str = "main") -> Iterator[tuple[list[Redis], Redis, Redis]]:
    """Three Sentinels over a master and a replica, once they know of each other."""
    with contextlib.ExitStack() as stack:
        master = stack.enter_context(Redis())
        replica = stack.enter_context(Redis("--replicaof", "127.0.0.1", str(master.port)))
        lines = [
            f"sentinel monitor {master_name} 127.0.0.1 {master.port} 2",
            f"sentinel down-after-milliseconds {master_name} 2000",
            f"sentinel failover-timeout {master_name} 2000",
        ]
        sentinels = [stack.enter_context(Redis(sentinel="\n".join(lines))) for _ in range(3)]
        clients = [stack.enter_context(contextlib.closing(one.client())) for one in sentinels]

        def well() -> bool:
            said = [client.sentinel_master(master_name) for client in clients]
            return all(one["num-other-sentinels"] == 2 and one["num-slaves"] == 1 for one in said)

        eventually(well, "the Sentinels know of each other and of the replica", 20.0)
        yield sentinels, master, replica


def url_of(one: Redis, options: str = "") -> str:
    return f"mmcache+redis://127.0.0.1:{one.port}/0?cluster=test{options}"


def registered(url: str, *ports: int, **changed: Any) -> list[Any]:
    """Servers that say that they are there; nobody listens on their ports."""
    from mmcache.cluster.registration import Registration  # which needs redis-py

    found = []
    for port in ports:
        settings: dict[str, Any] = {
            "id": f"127.0.0.1:{port}",
            "address": f"mmcache://127.0.0.1:{port}",
            "weight": 1.0,
        } | changed
        found.append(Registration(parse_members_url(url), **settings))
        found[-1].start(3.0)
        eventually(lambda: not found[-1].why_not, "it has joined")
    return found
