"""What the tests of NIXL share: whether it is there, clients, and the server's agent."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

import mmcache
from mmcache.client.blocking import Client
from mmcache.errors import TransportError
from mmcache.keyset import Keys
from mmcache.server.access_edit import with_token
from mmcache.server.grants import digest_of
from mmcache.testing.process import ServerProcess, children_of
from mmcache.transport.nixl import load_bindings
from tests.integration.access_bed import write_access
from tests.integration.support import MiB, blanks, eventually, keys_of, value_of, values_of

try:
    load_bindings()
    WITHOUT = ""
except TransportError as trouble:
    WITHOUT = str(trouble)
if os.environ.get("CI"):  # there, what is not tested is a failure
    assert not WITHOUT, f"{WITHOUT}; `make test` does so"
needs_nixl = pytest.mark.skipif(bool(WITHOUT), reason=WITHOUT or "it is there")

VALUE_NBYTES: Final = MiB + 17
OVER_TCP: Final = {"UCX_TLS": "tcp"}  # else UCX copies out of the other process itself, whether that runs or not


def nixl_client(server: ServerProcess, deadline_s: float = 20.0, **settings: Any) -> Client:
    """A client that wants NIXL."""
    return mmcache.connect(f"{server.url}?transport=nixl", deadline_s=deadline_s, **settings)


def agent_of(server: ServerProcess) -> int:
    """The pid of the server's agent."""
    return int(eventually(lambda: children_of(server.pid), "the agent runs")[0])


def open_files(pid: int) -> set[str]:
    """What this process has open; in this one the look itself comes and goes."""
    links = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            links.add(os.readlink(f"/proc/{pid}/fd/{name}"))
    return links


def listens_on(pid: int) -> list[str]:
    """The addresses, as the kernel writes them, of the sockets on which this process listens."""
    inodes = {link[8:-1] for link in open_files(pid) if link.startswith("socket:[")}
    tables = [Path(f"/proc/{pid}/net/{name}").read_text() for name in ("tcp", "tcp6")]
    rows = [line.split() for table in tables for line in table.splitlines()]
    return [row[1].partition(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes]


def stored(cache: Client, label: str, count: int = 4) -> Keys:
    """New keys, whose values are stored."""
    keys = keys_of(count, label)
    assert all(cache.put(keys, values_of(keys, VALUE_NBYTES)))
    return keys


def outcomes(cache: Client, keys: Keys) -> set[str]:
    """What a read comes to; what is a hit must be right."""
    buffers = blanks(len(keys), VALUE_NBYTES)
    results = cache.get_into(keys, buffers)
    for result, buffer, digest in zip(results, buffers, keys.digests, strict=True):
        assert not result or np.array_equal(buffer, value_of(digest, VALUE_NBYTES))
    return {str(result.outcome) for result in results}


def one_tenant(path: Path) -> str:
    """An access file of tenant a."""
    return write_access(path, with_token("", "a", digest_of("token-of-a").hex(), admin=True))
