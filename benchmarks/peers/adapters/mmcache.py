"""mmcache by each of its paths, verified at both ends; and the controls, which deliver wrong bytes on purpose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.adapters.base import Bytes, Client

MEMORY = "1GiB"
DEADLINE_S = 30.0
ON_LOOPBACK = {"UCX_NET_DEVICES": "lo"}


def serve(run: Path, environments: Path, stack: ExitStack) -> dict[str, Any]:
    """Start a server with a gRPC port too, if grpcio is here."""
    from mmcache.testing.process import ServerProcess

    words = ["--prefault", "--unix", str(run / "mmcache.sock")]
    try:
        import grpc  # noqa: F401
    except ImportError:
        grpc_words = []
    else:
        grpc_words = ["--grpc", "127.0.0.1:0"]
    server = ServerProcess(MEMORY, *words, *grpc_words)
    stack.enter_context(server)
    return {"url": server.url, "unix_path": server.unix_path, "grpc_address": server.grpc_address}


def serve_nixl(run: Path, environments: Path, stack: ExitStack) -> dict[str, Any]:
    """Start a server whose memory NIXL reads. Raises TransportError where NIXL is not installed."""
    from mmcache.testing.process import ServerProcess

    words = ["--prefault", "--unix", "", "--nixl", ON_LOOPBACK["UCX_NET_DEVICES"]]
    server = ServerProcess(MEMORY, *words)
    stack.enter_context(server)
    return {"url": server.url}


def _keys(names: Sequence[str]) -> list[Any]:
    from mmcache.keys import Namespace, opaque_key

    namespace = Namespace(kind="kv", model="benchmark/none", dtype="uint8", layout="flat", block_size=16)
    return [opaque_key(namespace, name.encode()) for name in names]


class ByPath(Client):
    """A client over one path; it refuses another one."""

    TRANSPORT = ""

    def __init__(self, options: Mapping[str, Any], source: Bytes, target: Bytes) -> None:
        super().__init__(options, source, target)
        from mmcache.connect import connect

        self._client = connect(self._url(options), deadline_s=DEADLINE_S)
        self._leased: Any = None
        said = self._client.stat()
        if said["transport"] != self.TRANSPORT:
            found = f"{said['transport']}: {said['transport_why']}"
            raise RuntimeError(f"asked for {self.TRANSPORT}, but the values would travel by {found}")

    def _url(self, options: Mapping[str, Any]) -> str:
        return f"{options['url']}?transport={self.TRANSPORT}"

    def prepare(self, names: Sequence[str], buffers: Sequence[Bytes]) -> Any:
        from mmcache.keyset import Keys

        return Keys.of(_keys(names)), list(buffers)

    def put(self, batch: Any) -> None:
        _demand(self._client.put(*batch))

    def get(self, batch: Any) -> None:
        _demand(self._client.get_into(*batch))

    def _views(self, keys: Any) -> list[Any]:
        self._leased = self._client.acquire(keys)
        return [frame.payload(frame.header.tensors[0]) for frame in self._leased.frames]

    def leave(self, batch: Any) -> None:
        if not self._leased.release():
            raise RuntimeError("the lease expired")

    def delete(self, names: Sequence[str]) -> None:
        self._client.delete(_keys(names))

    def close(self) -> None:
        self._client.close()


def _demand(results: Sequence[Any]) -> None:
    """A put must have stored, a get must have hit; a value that was there already would have cost nothing."""
    for result in results:
        if not result or result.outcome == "present":
            raise RuntimeError(f"{result.outcome}: {result.reason}")


class Shm(ByPath):
    """Shared memory."""

    TRANSPORT = "shm"
    VIEWS = True

    def view(self, batch: Any) -> list[Any]:
        return self._views(batch[0])


class Tcp(ByPath):
    """Framed TCP."""

    TRANSPORT = "tcp"


class Nixl(ByPath):
    """Gets by NIXL, puts by framed TCP."""

    TRANSPORT = "nixl"


class Unix(ByPath):
    """The framed protocol on the unix socket."""

    TRANSPORT = "unix"

    def _url(self, options: Mapping[str, Any]) -> str:
        return f"mmcache+unix://{options['unix_path']}?transport=tcp"


class Grpc(ByPath):
    """The public carrier, by the same client."""

    TRANSPORT = "grpc"

    def _url(self, options: Mapping[str, Any]) -> str:
        if not options["grpc_address"]:
            raise RuntimeError("no grpcio here: pip install 'mmcache[grpc]'")
        return f"mmcache://{options['grpc_address']}?transport=grpc"


class OtherKey(Tcp):
    """Control: every get delivers, and every view shows, the bytes of the key beside the one that was asked for."""

    VIEWS = True

    def prepare(self, names: Sequence[str], buffers: Sequence[Bytes]) -> Any:
        return super().prepare(names, buffers), super().prepare([_neighbour(name) for name in names], buffers)

    def put(self, batch: Any) -> None:
        super().put(batch[0])

    def get(self, batch: Any) -> None:
        super().get(batch[1])

    def view(self, batch: Any) -> list[Any]:
        return self._views(batch[1][0])


class Untouched(Tcp):
    """Control: every get fetches the values, but leaves the destination as it was."""

    def get(self, batch: Any) -> None:
        keys, buffers = batch
        super().get((keys, [np.empty_like(buffer) for buffer in buffers]))


def _neighbour(name: str) -> str:
    head, _, index = name.rpartition("/")
    return f"{head}/{int(index) ^ 1}"
