"""Mooncake Store, the build without CUDA: zero-copy `put_from` and `get_into` on registered memory.

`serve` has the storage in a node of its own, reached over TCP; `serve_alone` starts the master only, and each client
brings its storage, which it reaches by memcpy.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.peers.adapters.base import Bytes, Client, MiB, free_port, listens, spawn
from benchmarks.peers.install import python_of

# Where only lo exists it finds no address to bind by itself.
ENVIRONMENT = {"MC_TCP_BIND_ADDRESS": "127.0.0.1"}
NODE_NBYTES, CLIENT_NBYTES, LOCAL_BUFFER_NBYTES = 2048 * MiB, 1024 * MiB, 64 * MiB


def serve_alone(run: Path, environments: Path, stack: ExitStack) -> dict[str, Any]:
    """Start the master with its metadata server."""
    rpc, http = free_port(), free_port()
    # A lease shorter than a read makes get_into fail.
    command = [python_of(environments, "mooncake").with_name("mooncake_master"), "--rpc_address=127.0.0.1",
               f"--rpc_port={rpc}", "--metrics_host=127.0.0.1", f"--metrics_port={free_port()}",
               "--enable_http_metadata_server=true", "--http_metadata_server_host=127.0.0.1",
               f"--http_metadata_server_port={http}", "--default_kv_lease_ttl=5000"]  # fmt: skip
    spawn(stack, run, command, lambda: listens(rpc)() and listens(http)())
    return {"rpc": rpc, "http": http, "segment_nbytes": CLIENT_NBYTES}


def serve(run: Path, environments: Path, stack: ExitStack) -> dict[str, Any]:
    """Start the master and a node with all the storage."""
    options = serve_alone(run, environments, stack)
    ready = run / "node.ready"
    command = [python_of(environments, "mooncake"), "-m", "benchmarks.peers.adapters.mooncake",
               str(options["rpc"]), str(options["http"]), str(ready)]  # fmt: skip
    root = str(Path(__file__).resolve().parents[3])
    spawn(stack, run, command, ready.exists, {**ENVIRONMENT, "PYTHONPATH": root})
    return {**options, "segment_nbytes": 0}


def _store(options: Mapping[str, Any], segment_nbytes: int) -> Any:
    from mooncake.store import MooncakeDistributedStore

    store = MooncakeDistributedStore()
    metadata, master = f"http://127.0.0.1:{options['http']}/metadata", f"127.0.0.1:{options['rpc']}"
    code = store.setup("127.0.0.1", metadata, segment_nbytes, LOCAL_BUFFER_NBYTES, "tcp", "", master)
    if code:
        raise RuntimeError(f"setup answered {code}")
    return store


class Mooncake(Client):
    """A client whose source and target are registered; values go straight from one and to the other."""

    def __init__(self, options: Mapping[str, Any], source: Bytes, target: Bytes) -> None:
        super().__init__(options, source, target)
        self._store = _store(options, options["segment_nbytes"])
        for memory in (source, target):
            if self._store.register_buffer(memory.ctypes.data, memory.nbytes):
                raise RuntimeError("register_buffer failed")

    def prepare(self, names: Sequence[str], buffers: Sequence[Bytes]) -> Any:
        return list(names), [buffer.ctypes.data for buffer in buffers], [buffer.nbytes for buffer in buffers]

    def put(self, batch: Any) -> None:
        names, addresses, sizes = batch
        if len(names) == 1:
            codes = [self._store.put_from(names[0], addresses[0], sizes[0])]
        else:
            codes = self._store.batch_put_from(names, addresses, sizes)
        if any(codes):
            raise RuntimeError(f"put_from answered {codes[:4]}")

    def get(self, batch: Any) -> None:
        names, addresses, sizes = batch
        if len(names) == 1:
            found = [self._store.get_into(names[0], addresses[0], sizes[0])]
        else:
            found = self._store.batch_get_into(names, addresses, sizes)
        if found != sizes:
            raise RuntimeError(f"get_into answered {found[:4]}")

    def delete(self, names: Sequence[str]) -> None:
        for name in names:
            self._store.remove(name, True)

    def close(self) -> None:
        self._store.close()


def node(rpc: str, http: str, ready: str) -> None:
    """Offer storage until told to end."""
    store = _store({"rpc": rpc, "http": http}, NODE_NBYTES)
    Path(ready).touch()
    signal.sigwait([signal.SIGTERM])
    store.close()


if __name__ == "__main__":
    node(*sys.argv[1:])
