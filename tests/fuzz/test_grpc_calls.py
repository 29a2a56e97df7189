"""What the gRPC target makes of answers: a schema of this test's own, served well, badly or not at all."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool

from mmcache.pb import cache_pb2 as pb
from tests.fuzz.bed import in_time
from tests.fuzz.grpc_target import Methods

grpc: Any = pytest.importorskip("grpc")
NAMES = ("Fine", "Refused", "Broken", "Late", "Garbled", "Parted")


def schema() -> Any:
    """A file with one service, all of whose methods take and give mmcache's own messages."""
    file = descriptor_pb2.FileDescriptorProto(name="fuzz_test.proto", package="fuzz", syntax="proto3")
    file.dependency.append(pb.DESCRIPTOR.name)
    service = file.service.add(name="Calls")
    for name in NAMES:
        service.method.add(
            name=name,
            input_type=".mmcache.v1.ContainsRequest",
            output_type=".mmcache.v1.ContainsReply",
            server_streaming=name == "Parted",
        )
    pool: Any = descriptor_pool.Default()
    pool.AddSerializedFile(file.SerializeToString())
    return pool.FindFileByName(file.name)


class Handlers(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Answers by the method's name."""

    def service(self, details: Any) -> Any:
        name = details.method.rpartition("/")[2]
        if name == "Parted":
            return grpc.unary_stream_rpc_method_handler(lambda request, context: iter([b"", b"\n\1\1"]))
        return grpc.unary_unary_rpc_method_handler(getattr(self, name.lower()))

    def fine(self, request: bytes, context: Any) -> bytes:
        return pb.ContainsReply(present=b"\1").SerializeToString()

    def refused(self, request: bytes, context: Any) -> None:
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, "keys have 32 bytes")

    def broken(self, request: bytes, context: Any) -> bytes:
        raise KeyError("an internal error")

    def late(self, request: bytes, context: Any) -> bytes:
        over = threading.Event()
        context.add_callback(over.set)
        over.wait(60)  # until nobody waits for the answer any more
        return b""

    def garbled(self, request: bytes, context: Any) -> bytes:
        return b"\xff"


@pytest.fixture(scope="module")
def methods() -> Iterator[Methods]:
    server = grpc.server(ThreadPoolExecutor(2), handlers=[Handlers()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    calls = Methods(schema(), f"127.0.0.1:{port}")
    yield calls
    calls.close()
    server.stop(None)


def test_answers_and_refusals_are_good_and_silence_is_late(methods: Methods) -> None:
    assert [method.name for method in methods.methods] == list(NAMES)
    for name in ("Fine", "Refused", "Parted"):
        in_time(partial(methods.ask, NAMES.index(name), b"\xff"), name)
    assert not methods.ask(NAMES.index("Late"), b"\xff")


def test_an_internal_error_is_a_crash(methods: Methods) -> None:
    with pytest.raises(AssertionError, match="Broken: UNKNOWN"):
        in_time(partial(methods.ask, NAMES.index("Broken"), b""), "Broken")


def test_an_answer_that_cannot_be_read_is_a_crash(methods: Methods) -> None:
    with pytest.raises(Exception, match="parsing"):
        in_time(partial(methods.ask, NAMES.index("Garbled"), b""), "Garbled")
