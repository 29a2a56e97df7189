"""Any bytes as the body of a gRPC call: an answer or a status that blames the caller, within a second; never a crash.

It knows no method by name: it takes them, and what their requests are, from the services of the schema. The first byte
of an input picks the method, the rest is the body.
"""

from __future__ import annotations

import importlib.util
from dataclasses import fields
from random import Random
from typing import Any, Final

from google.protobuf import message_factory
from google.protobuf.message import DecodeError, Message

from mmcache.config import ServerConfig
from mmcache.pb import cache_pb2 as pb
from mmcache.server.serve import Server
from tests.fuzz.bed import ANSWER_S, Complaints, Mutate, in_time, resident_below
from tests.fuzz.edits import edit_body
from tests.fuzz.server_target import KEYS, KNOWN, NAMESPACE, ROOM_NBYTES, VALUE, nothing_claimed

SETTING: Final = "grpc"  # of ServerConfig: HOST:PORT where gRPC is served, like `metrics`
ADDRESS: Final = "grpc_address"  # of Server, once started: where that came to be
BLAMES_CALLER: Final = (
    "INVALID_ARGUMENT", "NOT_FOUND", "ALREADY_EXISTS", "PERMISSION_DENIED", "UNAUTHENTICATED", "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED",
)  # fmt: skip


def unavailable() -> str:
    """Why this target cannot run here; empty where it can."""
    if importlib.util.find_spec("grpc") is None:
        return "grpcio is not installed"
    if not pb.DESCRIPTOR.services_by_name:
        return "the schema has no service yet"
    if SETTING not in {field.name for field in fields(ServerConfig)}:
        return f"no server listens for gRPC yet: ServerConfig has no {SETTING!r}"
    return ""


def _kind(descriptor: Any) -> type[Message]:
    return message_factory.GetMessageClass(descriptor)


class Methods:
    """The methods of a schema's services, to be called with bytes over one channel."""

    def __init__(self, schema: Any, address: str) -> None:
        import grpc

        self._errors = grpc.RpcError
        self._channel = grpc.insecure_channel(address)
        self.methods = [method for service in schema.services_by_name.values() for method in service.methods]
        self._calls = [self._call(method) for method in self.methods]

    def _call(self, method: Any) -> Any:
        sides = ("stream" if streams else "unary" for streams in (method.client_streaming, method.server_streaming))
        return getattr(self._channel, "_".join(sides))(f"/{method.containing_service.full_name}/{method.name}")

    def ask(self, number: int, body: bytes) -> bool:
        """Call; raise AssertionError unless the answer is one that the schema or the caller's mistake explains. False
        if there was none in time."""
        method = self.methods[number]
        try:
            request = iter([body]) if method.client_streaming else body
            answer = self._calls[number](request, timeout=ANSWER_S)
            for reply in answer if method.server_streaming else [answer]:
                _kind(method.output_type).FromString(reply)
        except self._errors as error:
            code = error.code().name
            if code == "DEADLINE_EXCEEDED":
                return False
            unreadable = code == "INTERNAL" and not _readable(method, body)  # what grpcio itself answers
            if code not in BLAMES_CALLER and not unreadable:
                raise AssertionError(f"{method.name}: {code}: {error.details()}") from error
        return True

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()


def _readable(method: Any, body: bytes) -> bool:
    try:
        _kind(method.input_type).FromString(body)
    except DecodeError:
        return False
    return True


class GrpcTarget:
    """See the top of this file."""

    max_nbytes = 16384

    def __init__(self) -> None:
        settings: dict[str, Any] = {SETTING: "127.0.0.1:0", "listen": "", "unix_path": "", "memory_nbytes": 1 << 20}
        self._complaints = Complaints()
        self._server = Server(ServerConfig(**settings, lease_s=0.1))
        self._server.start()
        host, port = getattr(self._server, ADDRESS)
        self._methods = Methods(pb.DESCRIPTOR, f"{host}:{port}")

    def seeds(self) -> list[bytes]:
        """For each method an empty request, and one whose bytes fields are a key; two entries, put and got."""
        seeds = []
        for number, method in enumerate(self._methods.methods):
            request = _kind(method.input_type)()
            seeds.append(bytes([number]) + request.SerializeToString())
            for field in method.input_type.fields:
                if field.type == field.TYPE_BYTES and isinstance(getattr(request, field.name), bytes):
                    setattr(request, field.name, KNOWN[0])
            seeds.append(bytes([number]) + request.SerializeToString())
        tensor = pb.Tensor(name="0", dtype="uint8", shape=[300], data=VALUE[:300].tobytes())
        entries = [pb.PutEntry(key=key, tensors=[tensor]) for key in KEYS.digests[:2]]
        put = pb.PutRequest(kind="kv", namespace=NAMESPACE.id, facts=NAMESPACE.id.facts, entries=entries)
        return [self._input("Put", put), self._input("Get", pb.GetRequest(keys=b"".join(KEYS.digests[:3]))), *seeds]

    def _input(self, name: str, request: Message) -> bytes:
        numbers = {method.name: number for number, method in enumerate(self._methods.methods)}
        return bytes([numbers[name]]) + request.SerializeToString()

    def mutate(self, data: bytes, random: Random, blind: Mutate) -> bytes:
        """One field of the request changed, or any bytes."""
        number = data[0] % len(self._methods.methods) if data else 0
        kind = _kind(self._methods.methods[number].input_type)
        return bytes([number]) + edit_body(data[1:], kind, random, blind, KNOWN)

    def check(self, data: bytes) -> None:
        """Call the method the first byte picks with the rest as its body."""
        number = data[0] % len(self._methods.methods) if data else 0
        with resident_below(ROOM_NBYTES):
            in_time(lambda: self._methods.ask(number, data[1:]), "an answer over gRPC")
        self._complaints.check()
        nothing_claimed(self._server)
        shard = self._server.shard
        with shard.lock:
            shard.index.check_integrity()

    def close(self) -> None:
        """Stop the server."""
        self._methods.close()
        self._server.stop()
        self._complaints.close()
