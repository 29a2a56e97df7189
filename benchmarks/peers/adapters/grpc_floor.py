"""The floor for gRPC from Python: bytes in a dict behind plain grpcio, by unary calls, nothing checked.

What goes in one message lies in the dict as it came, under its first name, and is asked for again in the same way.

Run as a module it is the server: it writes its port to the file that is named.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.adapters.base import Bytes, Client, MiB, spawn

ROOT = Path(__file__).resolve().parents[3]
MESSAGE_NBYTES = 8 * MiB  # mmcache's
ENDLESS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
CALL_S = 30.0


def serve(run: Path, environments: Path, stack: ExitStack) -> dict[str, Any]:
    """Start the server. Raises PeerError where there is no grpcio."""
    port = run / "port"
    command = [sys.executable, "-m", "benchmarks.peers.adapters.grpc_floor", port]
    spawn(stack, run, command, port.exists, {"PYTHONPATH": str(ROOT)})
    return {"port": int(port.read_text())}


class Plain(Client):
    """A channel, and its three calls; the name goes with a put as metadata."""

    def __init__(self, options: Mapping[str, Any], source: Bytes, target: Bytes) -> None:
        super().__init__(options, source, target)
        import grpc

        self._channel = grpc.insecure_channel(f"127.0.0.1:{options['port']}", options=ENDLESS)
        self._put, self._get, self._delete = (
            self._channel.unary_unary(f"/floor/{name}") for name in ("put", "get", "delete")
        )

    def prepare(self, names: Sequence[str], buffers: Sequence[Bytes]) -> Any:
        step = max(1, MESSAGE_NBYTES // buffers[0].nbytes)
        return [(names[at], buffers[at : at + step]) for at in range(0, len(names), step)]

    def put(self, batch: Any) -> None:
        for name, buffers in batch:
            self._put(b"".join(buffers), timeout=CALL_S, metadata=[("name", name)])

    def get(self, batch: Any) -> None:
        for name, buffers in batch:
            came, position = np.frombuffer(self._get(name.encode(), timeout=CALL_S), np.uint8), 0
            for buffer in buffers:
                np.copyto(buffer, came[position : position + buffer.nbytes])
                position += buffer.nbytes

    def delete(self, names: Sequence[str]) -> None:
        for name in names:
            self._delete(name.encode(), timeout=CALL_S)

    def close(self) -> None:
        self._channel.close()


def main(port_file: str) -> None:
    """Serve until the end."""
    import grpc

    values: dict[str, bytes] = {}

    def put(value: bytes, context: Any) -> bytes:
        values[dict(context.invocation_metadata())["name"]] = value
        return b""

    def get(name: bytes, context: Any) -> bytes:
        return values[name.decode()]

    def delete(name: bytes, context: Any) -> bytes:
        values.pop(name.decode(), None)
        return b""

    handlers = {call.__name__: grpc.unary_unary_rpc_method_handler(call) for call in (put, get, delete)}
    server = grpc.server(ThreadPoolExecutor(8), options=ENDLESS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("floor", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    Path(f"{port_file}.new").write_text(str(port))
    os.rename(f"{port_file}.new", port_file)
    threading.Event().wait()


if __name__ == "__main__":
    main(sys.argv[1])
