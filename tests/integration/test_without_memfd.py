"""No shared memory to be had, at either end: values travel by sockets, and both ends say why."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Iterator

import pytest

import mmcache
from mmcache.errors import TransportError
from mmcache.testing.process import ServerProcess
from tests.integration.support import blanks, keys_of, values_of
from tests.integration.without_memfd import MEMFD_CREATE

pytestmark = pytest.mark.skipif(platform.machine() not in MEMFD_CREATE, reason="the call's number is not known here")
UNDER = (sys.executable, "-m", "tests.integration.without_memfd")
CLIENT = """
import json, sys, mmcache
from tests.integration.support import blanks, keys_of, values_of
keys = keys_of(3, "client without")
with mmcache.connect(sys.argv[1]) as cache:
    stored = [one.outcome for one in cache.put(keys, values_of(keys, 70_000))]
    found = [one.outcome for one in cache.get_into(keys, blanks(3, 70_000))]
    stat = cache.stat()
print(json.dumps([stored, found, stat["transport"], stat["transport_why"]]))
"""


@pytest.fixture
def without() -> Iterator[ServerProcess]:
    process = ServerProcess("64MiB", under=UNDER)
    with process:
        yield process
    assert (
        "clients on this host go by sockets: no shared memory (memfd_create: Operation not permitted)" in process.said
    )
    assert "Traceback" not in process.said


def test_a_server_without_it_serves_by_sockets(without: ServerProcess) -> None:
    keys = keys_of(20, "server without")
    values = values_of(keys, 300_000)
    for url, path in ((without.url, "tcp"), (f"mmcache+unix://{without.unix_path}", "unix")):
        with mmcache.connect(url) as cache:
            assert all(cache.put(keys, values))
            into = blanks(20, 300_000)
            assert all(cache.get_into(keys, into))
            assert all((value == found).all() for value, found in zip(values, into, strict=True))
            stat = cache.stat()
            assert stat["transport"] == path
            assert "memory cannot be shared (memfd_create: Operation not permitted)" in stat["transport_why"]
    with pytest.raises(TransportError, match="memory cannot be shared"):
        mmcache.connect(f"{without.url}?transport=shm")


def test_huge_pages_or_nixl_without_it_are_refused() -> None:
    with pytest.raises(TransportError, match="leave --huge-pages out"):
        ServerProcess("64MiB", "--huge-pages", under=UNDER).start()
    with pytest.raises(TransportError, match=r"--nixl needs memory that can be shared|NIXL is not installed"):
        ServerProcess("64MiB", "--nixl", "lo", under=UNDER).start()


@pytest.mark.parametrize("unix", [False, True])
def test_a_client_without_it_goes_by_sockets(unix: bool) -> None:
    with ServerProcess("64MiB") as server:
        url = f"mmcache+unix://{server.unix_path}" if unix else server.url
        ended = subprocess.run([*UNDER, sys.executable, "-c", CLIENT, url], capture_output=True, text=True, timeout=60)
        assert ended.returncode == 0, ended.stderr
        stored, found, path, why = json.loads(ended.stdout)
        assert (stored, found) == (["stored"] * 3, ["hit"] * 3)
        assert path == ("unix" if unix else "tcp")
        assert "memfd" in why or "write ring" in why
        with mmcache.connect(server.url) as cache:  # and what it stored is read through shared memory by others
            assert all(cache.get_into(keys_of(3, "client without"), blanks(3, 70_000)))
            assert cache.stat()["transport"] == "shm"
