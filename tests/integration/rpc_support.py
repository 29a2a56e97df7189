"""What the gRPC tests share: a client made from the schema's descriptor alone, and tensors as messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from numpy.typing import NDArray

from mmcache.keyset import Key
from mmcache.pb import cache_pb2 as pb
from tests.integration.support import NAMESPACE, PATIENCE_S

CACHE = pb.DESCRIPTOR.services_by_name["Cache"]
ENDLESS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
Tensors = Mapping[str, tuple[NDArray[Any], str]]  # name -> words, and the dtype they really are


def method(channel: Any, name: str) -> Callable[..., Any]:
    """A method of the service: takes its request message, returns its reply."""
    described = CACHE.methods_by_name[name]
    reply = GetMessageClass(described.output_type)
    return channel.unary_unary(  # type: ignore[no-any-return]
        f"/{CACHE.full_name}/{name}",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=reply.FromString,
    )


class Rpc:
    """A client of one server."""

    def __init__(self, address: str, credentials: Any = None, token: str = "", options: Any = ENDLESS) -> None:
        self.channel = (
            grpc.secure_channel(address, credentials, options)
            if credentials
            else grpc.insecure_channel(address, options)
        )
        self._metadata = [("authorization", f"Bearer {token}")] if token else []

    def __call__(self, name: str, request: Message, timeout_s: float = PATIENCE_S) -> Any:
        """Call a method; its reply."""
        return method(self.channel, name)(request, timeout=timeout_s, metadata=self._metadata)

    def refused(self, name: str, request: Message, timeout_s: float = PATIENCE_S) -> tuple[Any, str]:
        """Call a method that must be refused: the status code, and the words."""
        with pytest.raises(grpc.RpcError) as caught:
            self(name, request, timeout_s)
        return caught.value.code(), caught.value.details()

    def close(self) -> None:
        """Close the connection."""
        self.channel.close()


@contextmanager
def rpc_to(address: str, **options: Any) -> Iterator[Rpc]:
    """A client that is closed when the block ends."""
    rpc = Rpc(address, **options)
    try:
        yield rpc
    finally:
        rpc.close()


def tensor(name: str, array: NDArray[Any], dtype: str = "", **fields: Any) -> pb.Tensor:
    """An array as a message."""
    return pb.Tensor(name=name, dtype=dtype or array.dtype.name, shape=array.shape, data=array.tobytes(), **fields)


def put_of(key: Key, *tensors: pb.Tensor, **fields: Any) -> pb.PutEntry:
    """What stores tensors under a key."""
    return pb.PutEntry(key=key.digest, home=key.home, chain_index=key.index, tensors=tensors, **fields)


def put_request(*entries: pb.PutEntry, **fields: Any) -> pb.PutRequest:
    """A Put into the tests' namespace."""
    return pb.PutRequest(**{"kind": "kv", "facts": NAMESPACE.facts, "entries": entries, **fields})


def ones(nbytes: int) -> NDArray[np.uint8]:
    """A value of this size."""
    return np.ones(nbytes, np.uint8)
