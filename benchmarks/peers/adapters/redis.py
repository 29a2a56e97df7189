"""Redis over TCP and over its unix socket, by redis-py with hiredis; several values a call go in one pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.adapters.base import Bytes, Client, free_port, listens, spawn


def serve(run: Path, environments: Path, stack: ExitStack) -> dict[str, Any]:
    """Start redis-server, with nothing written to disk."""
    port = free_port()
    command = ["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--unixsocket", "redis.sock", "--save", "",
               "--appendonly", "no", "--maxmemory", "2gb", "--maxmemory-policy", "allkeys-lru"]  # fmt: skip
    spawn(stack, run, command, listens(port))
    return {"port": port, "socket": str(run / "redis.sock")}


class RedisTcp(Client):
    """A connection; replies arrive as new bytes objects and are copied to their destination."""

    def __init__(self, options: Mapping[str, Any], source: Bytes, target: Bytes) -> None:
        super().__init__(options, source, target)
        self._redis = self._connect(options)
        self._redis.ping()

    def _connect(self, options: Mapping[str, Any]) -> Any:
        import redis

        return redis.Redis(host="127.0.0.1", port=options["port"])

    def prepare(self, names: Sequence[str], buffers: Sequence[Bytes]) -> Any:
        return list(names), [buffer.data for buffer in buffers], list(buffers)

    def put(self, batch: Any) -> None:
        names, views, _ = batch
        if len(names) == 1:
            self._redis.set(names[0], views[0])
            return
        pipeline = self._redis.pipeline(transaction=False)
        for name, view in zip(names, views, strict=True):
            pipeline.set(name, view)
        pipeline.execute()

    def get(self, batch: Any) -> None:
        names, _, targets = batch
        if len(names) == 1:
            values = [self._redis.get(names[0])]
        else:
            pipeline = self._redis.pipeline(transaction=False)
            for name in names:
                pipeline.get(name)
            values = pipeline.execute()
        for value, target in zip(values, targets, strict=True):
            np.copyto(target, np.frombuffer(value, np.uint8))

    def delete(self, names: Sequence[str]) -> None:
        self._redis.delete(*names)

    def close(self) -> None:
        self._redis.close()


class RedisUnix(RedisTcp):
    """The same over the unix socket."""

    def _connect(self, options: Mapping[str, Any]) -> Any:
        import redis

        return redis.Redis(unix_socket_path=options["socket"])
