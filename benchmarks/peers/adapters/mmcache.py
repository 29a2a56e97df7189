"""mmcache by each of its paths, verified at both ends; and the controls, which deliver wrong bytes on purpose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.adapters.base import Bytes, Client, MiB

MEMORY = "1GiB"
GRPC_NBYTES = 128 * MiB
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
    server = ServerProcess(MEMORY, *words, *grpc_words, environment={"MMCACHE_MAX_GRPC_NBYTES": str(GRPC_NBYTES)})
    stack.enter_context(server)
    return {"url": server.url, "unix_path": server.unix_path, "grpc_address": server.grpc_address}


def serve_nixl(run: Path, environments: Path, stack: ExitStack) -> dict[str, Any]:
    """Start a server whose memory NIXL reads. Raises TransportError where NIXL is not installed."""
    from mmcache.testing.process import ServerProcess

    words = ["--prefault", "--unix", "", "--nixl", ON_LOOPBACK["UCX_NET_DEVICES"]]
    server = ServerProcess(MEMORY, *words)
    stack.enter_context(server)
    return {"url": server.url}


def _keys(names: Sequence[str]) -> tuple[Any, list[Any]]:
    from mmcache.keys import Namespace, opaque_key

    namespace = Namespace(kind="kv", model="benchmark/none", dtype="uint8", layout="flat", block_size=16)
    return namespace, [opaque_key(namespace, name.encode()) for name in names]


class Framed(Client):
    """A client over one path; it refuses another one."""

    TRANSPORT = ""

    def __init__(self, options: Mapping[str, Any], source: Bytes, target: Bytes) -> None:
        super().__init__(options, source, target)
        from mmcache.connect import connect

        self._client = connect(self._url(options), deadline_s=DEADLINE_S)
        said = self._client.stat()
        if said["transport"] != self.TRANSPORT:
            found = f"{said['transport']}: {said['transport_why']}"
            raise RuntimeError(f"asked for {self.TRANSPORT}, but the values would travel by {found}")

    def _url(self, options: Mapping[str, Any]) -> str:
        return f"{options['url']}?transport={self.TRANSPORT}"

    def prepare(self, names: Sequence[str], buffers: Sequence[Bytes]) -> Any:
        from mmcache.keyset import Keys

        return Keys.of(_keys(names)[1]), list(buffers)

    def put(self, batch: Any) -> None:
        _demand(self._client.put(*batch))

    def get(self, batch: Any) -> None:
        _demand(self._client.get_into(*batch))

    def delete(self, names: Sequence[str]) -> None:
        self._client.delete(_keys(names)[1])

    def close(self) -> None:
        self._client.close()


def _demand(results: Sequence[Any]) -> None:
    """A put must have stored, a get must have hit; a value that was there already would have cost nothing."""
    for result in results:
        if not result or result.outcome == "present":
            raise RuntimeError(f"{result.outcome}: {result.reason}")


class Shm(Framed):
    """Shared memory."""

    TRANSPORT = "shm"


class Tcp(Framed):
    """Framed TCP."""

    TRANSPORT = "tcp"


class Nixl(Framed):
    """Gets by NIXL, puts by framed TCP."""

    TRANSPORT = "nixl"


class Unix(Framed):
    """The framed protocol on the unix socket."""

    TRANSPORT = "unix"

    def _url(self, options: Mapping[str, Any]) -> str:
        return f"mmcache+unix://{options['unix_path']}?transport=tcp"


class Grpc(Client):
    """Plain unary calls; checksums go with the values, and are compared where the bytes were delivered."""

    def __init__(self, options: Mapping[str, Any], source: Bytes, target: Bytes) -> None:
        super().__init__(options, source, target)
        if not options["grpc_address"]:
            raise RuntimeError("no grpcio here: pip install 'mmcache[grpc]'")
        import grpc

        from mmcache.pb import cache_pb2 as pb

        self._pb = pb
        endless = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        self._channel = grpc.insecure_channel(options["grpc_address"], options=endless)
        self._put = self._call("Put", pb.PutRequest, pb.PutReply)
        self._get = self._call("Get", pb.GetRequest, pb.GetReply)
        self._delete = self._call("Delete", pb.DeleteRequest, pb.DeleteReply)

    def _call(self, name: str, request: Any, reply: Any) -> Any:
        return self._channel.unary_unary(
            f"/mmcache.v1.Cache/{name}",
            request_serializer=request.SerializeToString,
            response_deserializer=reply.FromString,
        )

    def prepare(self, names: Sequence[str], buffers: Sequence[Bytes]) -> Any:
        namespace, keys = _keys(names)
        return namespace, keys, list(buffers)

    def put(self, batch: Any) -> None:
        import xxhash

        namespace, keys, buffers = batch
        pb = self._pb
        entries = []
        for key, buffer in zip(keys, buffers, strict=True):
            digest = xxhash.xxh3_128_digest(buffer)
            tensor = pb.Tensor(name="v", dtype="uint8", shape=buffer.shape, data=buffer.tobytes(), xxh3_128=digest)
            entries.append(pb.PutEntry(key=key.digest, home=key.home, tensors=[tensor]))
        reply = self._put(
            pb.PutRequest(kind=namespace.kind, facts=namespace.facts, entries=entries), timeout=DEADLINE_S
        )
        if any(status != pb.STORED for status in reply.status):
            raise RuntimeError(f"Put answered {reply.status[:4]!r}")

    def get(self, batch: Any) -> None:
        import xxhash

        _, keys, buffers = batch
        request = self._pb.GetRequest(keys=b"".join(key.digest for key in keys))
        entries = self._get(request, timeout=DEADLINE_S).entries
        for entry, buffer in zip(entries, buffers, strict=True):
            if entry.status != self._pb.FOUND:
                raise RuntimeError(f"Get answered {entry.status}")
            (tensor,) = entry.tensors
            np.copyto(buffer, np.frombuffer(tensor.data, np.uint8))
            if xxhash.xxh3_128_digest(buffer) != tensor.xxh3_128:
                raise RuntimeError("the checksum is another one")

    def delete(self, names: Sequence[str]) -> None:
        keys = _keys(names)[1]
        self._delete(self._pb.DeleteRequest(keys=b"".join(key.digest for key in keys)), timeout=DEADLINE_S)

    def close(self) -> None:
        self._channel.close()


class OtherKey(Tcp):
    """Control: every get delivers the bytes of the key beside the one that was asked for."""

    def prepare(self, names: Sequence[str], buffers: Sequence[Bytes]) -> Any:
        return super().prepare(names, buffers), super().prepare([_neighbour(name) for name in names], buffers)

    def put(self, batch: Any) -> None:
        super().put(batch[0])

    def get(self, batch: Any) -> None:
        super().get(batch[1])


class Untouched(Tcp):
    """Control: every get fetches the values, but leaves the destination as it was."""

    def get(self, batch: Any) -> None:
        keys, buffers = batch
        super().get((keys, [np.empty_like(buffer) for buffer in buffers]))


def _neighbour(name: str) -> str:
    head, _, index = name.rpartition("/")
    return f"{head}/{int(index) ^ 1}"
