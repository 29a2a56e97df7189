"""The peers, one row each. Another one is another row: its client, what starts its servers, where its library lives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks.peers.adapters import aibrix, grpc_floor, lmcache, mmcache, mooncake, ray, redis, vineyard

REDIS, VERBS = ("redis-server", "redis-server"), ("libibverbs1", "libibverbs.so.1")
Serve = Callable[[Path, Path, ExitStack], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One row.

    Attributes:
        client: the class a worker makes, "module:class" below `adapters`.
        serve: starts the servers; None where there are none.
        system: what it needs of the system: a package, and what that has (a command, or a library `lib*`).
        environment: the one that has the client's library (install.py); empty: this one.
        settings: environment variables of its workers.
        verified: whether the peer itself checks bytes at both ends, within the time shown.
        alone: clients do not share: each reads what it wrote itself.
        control: delivers wrong bytes on purpose, which must be found.
        note: what the peer does, for whoever reads the table.
    """

    client: str
    serve: Serve | None
    system: tuple[str, str] | None = None
    environment: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)
    verified: bool = False
    alone: bool = False
    control: bool = False
    note: str


PEERS: Final[dict[str, Peer]] = {
    "mmcache-shm": Peer(
        client="mmcache:Shm", serve=mmcache.serve, verified=True,
        note="shared memory; checksums checked in the copy to the destination and before a put counts as stored",
    ),
    "mmcache-unix": Peer(
        client="mmcache:Unix", serve=mmcache.serve, verified=True, note="framed protocol, unix socket",
    ),
    "mmcache-tcp": Peer(client="mmcache:Tcp", serve=mmcache.serve, verified=True, note="framed protocol, TCP"),
    "mmcache-nixl": Peer(
        client="mmcache:Nixl", serve=mmcache.serve_nixl, settings=mmcache.ON_LOOPBACK, verified=True,
        note="gets are NIXL's one-sided reads, which UCX makes on one host by copying from the server's agent; puts go "
        "by TCP",
    ),
    "mmcache-grpc": Peer(
        client="mmcache:Grpc", serve=mmcache.serve, verified=True, note="unary gRPC calls of up to 8 MiB",
    ),
    "grpc-floor": Peer(
        client="grpc_floor:Plain", serve=grpc_floor.serve,
        note="no cache: a dict behind plain grpcio, the same messages; the floor for gRPC from Python",
    ),
    "redis-tcp": Peer(
        client="redis:RedisTcp", serve=redis.serve, system=REDIS, environment="redis",
        note="redis-server, redis-py with hiredis; several values a call: one pipeline",
    ),
    "redis-unix": Peer(
        client="redis:RedisUnix", serve=redis.serve, system=REDIS, environment="redis", note="by its unix socket",
    ),
    "mooncake-tcp": Peer(
        client="mooncake:Mooncake", serve=mooncake.serve, environment="mooncake", system=VERBS,
        settings=mooncake.ENVIRONMENT,
        note="Mooncake Store, storage in another process, put_from and get_into over TCP",
    ),
    "mooncake-local": Peer(
        client="mooncake:Mooncake", serve=mooncake.serve_alone, environment="mooncake", system=VERBS, alone=True,
        settings={**mooncake.ENVIRONMENT, "MC_STORE_MEMCPY": "1"},
        note="Mooncake Store, storage in the client's own process, by memcpy; with several clients a value may lie in "
        "another's",
    ),
    "lmcache-cpu": Peer(
        client="lmcache:LocalCpu", serve=None, environment="lmcache", settings=lmcache.ENVIRONMENT, alone=True,
        note="LMCache LocalCPUBackend, in the client's own process; allocate, copy, put; get, copy",
    ),
    "lmcache-lm": Peer(
        client="lmcache:Remote", serve=lmcache.serve, environment="lmcache", settings=lmcache.ENVIRONMENT,
        note="LMCache RemoteBackend, lm:// server; a round of puts ends with a question, as puts are not acknowledged",
    ),
    "lmcache-resp": Peer(
        client="lmcache:NativeResp", serve=redis.serve, system=REDIS, environment="lmcache",
        settings=lmcache.ENVIRONMENT,
        note="LMCache's native client, two threads, to redis-server over TCP",
    ),
    "aibrix-shfs": Peer(
        client="aibrix:Shfs", serve=aibrix.serve, environment="aibrix", note="AIBrix SHFS connector on tmpfs",
    ),
    "ray": Peer(
        client="ray:Ray", serve=ray.serve, environment="ray", settings=ray.ENVIRONMENT,
        note="Ray object store; get: a view of shared memory, copied to the destination",
    ),
    "vineyard": Peer(
        client="vineyard:Vineyard", serve=vineyard.serve, environment="vineyard",
        note="vineyardd; get: a view of shared memory, copied to the destination",
    ),
    "control-other-key": Peer(
        client="mmcache:OtherKey", serve=mmcache.serve, control=True, note="control: returns another key's bytes",
    ),
    "control-untouched": Peer(
        client="mmcache:Untouched", serve=mmcache.serve, control=True, note="control: leaves the destination as it was",
    ),
}  # fmt: skip
CONTROLS: Final = tuple(name for name, peer in PEERS.items() if peer.control)
