"""A gRPC server that answers what a test wants it to, however wrong: real calls, over a real connection."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import xxhash
from google.protobuf.message import Message

from mmcache.keyset import Keys
from mmcache.pb import cache_pb2 as pb
from tests.integration.rpc_support import CACHE
from tests.integration.support import Bytes

LIMITS = pb.Limits(batch_keys=100, inline_nbytes=1 << 26, message_nbytes=1 << 26)
STAT = pb.StatReply(server="rogue", server_id=bytes(16), limits=LIMITS, alignment=64)
Answer = Message | bytes | Callable[[bytes], Message]


class Rogue:
    """`answers` says what each method answers; `asked` what was asked, in order."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {"Stat": STAT}
        self.asked: list[tuple[str, bytes]] = []
        self._pool = ThreadPoolExecutor(4)
        self._server = grpc.server(self._pool, options=[("grpc.max_receive_message_length", -1)])
        handlers = {
            method.name: grpc.unary_unary_rpc_method_handler(lambda body, _, name=method.name: self._answer(name, body))
            for method in CACHE.methods
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(CACHE.full_name, handlers),))
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self.url = f"mmcache://127.0.0.1:{self.port}?transport=grpc&connect_s=15&deadline_s=15"
        self._server.start()

    def _answer(self, name: str, body: bytes) -> bytes:
        self.asked.append((name, body))
        answer = self.answers[name]
        found: Any = answer(body) if callable(answer) else answer
        return found if isinstance(found, bytes) else found.SerializeToString()

    def count(self, name: str) -> int:
        """How often a method was called."""
        return sum(one == name for one, _ in self.asked)

    def close(self) -> None:
        """End it, and its threads."""
        self._server.stop(0).wait()
        self._pool.shutdown()


@contextmanager
def rogue_server() -> Iterator[Rogue]:
    """One that is gone when the block ends."""
    rogue = Rogue()
    try:
        yield rogue
    finally:
        rogue.close()


def entry_of(keys: Keys, at: int, value: Bytes, **fields: Any) -> pb.Entry:
    """What an honest server says of a key with one tensor; `fields` replace some of it, those of the tensor too."""
    data = value.tobytes()
    tensor: dict[str, Any] = {"name": "0", "dtype": "uint8", "shape": value.shape, "data": data}
    tensor["xxh3_128"] = xxhash.xxh3_128_digest(data)
    entry: dict[str, Any] = {
        "status": pb.FOUND,
        "key": keys.digests[at],
        "kind": "kv",
        "namespace": keys.namespaces[at],
        "home": keys.homes[at],
    }
    for name, wanted in fields.items():
        (tensor if name in tensor else entry)[name] = wanted
    entry.setdefault("tensors", [pb.Tensor(**tensor)])
    return pb.Entry(**entry)
