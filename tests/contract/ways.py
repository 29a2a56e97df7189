"""Every way to a shard that the contract is tried on."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest

from mmcache.errors import TransportError
from mmcache.testing.process import ServerProcess
from mmcache.testing.way import Way
from mmcache.transport.nixl import load_bindings
from tests.integration.certificates import Authority

WAYS = ("shm", "unix", "tcp", "tls", "nixl", "grpc", "grpc-tls")
_fresh = count()


def way_of(name: str, folder: Path) -> Way:
    """The way of this name, with its certificates and sockets in a folder. Skips the test where it cannot be had."""
    if name == "unix":
        return Way(
            name,
            lambda path: ("--unix", path or str(folder / f"{next(_fresh)}.sock")),
            lambda server: server.unix_path,
            lambda path: f"mmcache+unix://{path}?transport=tcp",
        )
    listening, secured, options = ("--listen", "--grpc")[name.startswith("grpc")], "tls" in name, []
    words: tuple[str, ...] = ()
    if name == "nixl":
        try:
            load_bindings()
        except TransportError as error:
            pytest.skip(str(error))
        words = ("--nixl", "lo")
    if secured:
        authority = Authority(folder, f"ca-{next(_fresh)}")
        cert, key = authority.issue("server")
        words, options = ("--tls-cert", cert, "--tls-key", key), [f"ca={authority.ca}"]
    transport = {"tls": "tcp", "grpc-tls": "grpc"}.get(name, name)
    query = "&".join([f"transport={transport}", *options])
    scheme = "mmcaches" if secured else "mmcache"
    return Way(
        name,
        lambda address: (listening, address or "127.0.0.1:0", *words),
        (lambda server: server.grpc_address) if transport == "grpc" else _listening,
        lambda address: f"{scheme}://{address}?{query}",
    )


def _listening(server: ServerProcess) -> str:
    return server.url.rpartition("/")[2]
