"""Reads by NIXL: what its agent may know and where it listens, and what clients see when it is killed, stopped or gone.

Skipped where NIXL is not installed, but for CI (nixl_bed.py); test_nixl_missing.py is not.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import mmcache
from mmcache.client.blocking import Client
from mmcache.errors import MMCacheError, ProtocolError, TransportError
from mmcache.server.access_edit import with_token
from mmcache.server.grants import digest_of
from mmcache.testing.process import ServerProcess
from mmcache.transport.base import Found, Outcome
from mmcache.transport.nixl import Reader, RemoteArena, client_agent
from tests.integration.access_bed import write_access
from tests.integration.certificates import Authority
from tests.integration.nixl_bed import (
    OVER_TCP,
    VALUE_NBYTES,
    agent_of,
    listens_on,
    needs_nixl,
    nixl_client,
    one_tenant,
    open_files,
    outcomes,
    stored,
)
from tests.integration.support import PATIENCE_S, MiB, blanks, eventually, keys_of, reserved_address, run_cli, suspend

pytestmark = needs_nixl


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[ServerProcess]:
    environment = {"AN_ENGINES_SECRET": "of the server only", **getattr(request, "param", {})}
    with ServerProcess("64MiB", "--nixl", "lo", environment=environment) as process:
        yield process


def test_the_agent_has_the_arena_to_read_and_nothing_else(server: ServerProcess) -> None:
    pid = agent_of(server)
    arena = [line.split()[1] for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "mmcache-arena" in line]
    assert arena == ["r--s"]
    names = {entry.partition(b"=")[0].decode() for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")}
    assert "AN_ENGINES_SECRET" not in names
    assert {name for name in names if name and not name.startswith("UCX_")} <= {"HOME", "LD_LIBRARY_PATH", "PYTHONPATH"}
    sockets = {link for link in open_files(server.pid) if link.startswith("socket:")}
    assert sockets
    assert not sockets & open_files(pid)


def test_the_agent_and_the_client_listen_on_loopback_only(server: ServerProcess) -> None:
    with nixl_client(server):
        for pid in (agent_of(server), os.getpid()):
            assert set(listens_on(pid)) == {"0100007F"}
    with socket.create_server(("0.0.0.0", 0)):
        assert "00000000" in listens_on(os.getpid())  # so that it would be seen


def test_stat_says_which_path_is_used_and_why(server: ServerProcess) -> None:
    said = run_cli("stat", "-c", f"{server.url}?transport=nixl").stdout
    assert "read by nixl: the URL asks for it" in said
    report = json.loads(run_cli("stat", "--json", "-c", server.url).stdout)
    assert (report["transport"], report["transport_why"]) == (
        "shm",
        "the server is on this host and shares its memory",
    )
    assert "over lo" in run_cli("doctor", "-c", f"{server.url}?transport=nixl").stdout


def is_another(server: ServerProcess, pid: int) -> bool:
    return agent_of(server) != pid


def by_nixl(cache: Client) -> bool:
    with contextlib.suppress(MMCacheError):
        return bool(cache.stat()["transport"] == "nixl")
    return False


def test_a_killed_agent_is_unavailable_in_time_and_then_used_again(server: ServerProcess) -> None:
    took = []
    with nixl_client(server, deadline_s=6) as cache:
        keys = stored(cache, "killed")
        assert outcomes(cache, keys) == {"hit"}
        for _ in range(3):
            pid = agent_of(server)
            os.kill(pid, signal.SIGKILL)
            began = time.monotonic()
            assert outcomes(cache, keys) <= {"hit", "unavailable"}
            took.append(time.monotonic() - began)
            # Until the server knows that it is gone, it sends clients to it; these read by TCP for some seconds.
            eventually(partial(is_another, server, pid), "the agent is started again")
            eventually(lambda: outcomes(cache, keys) == {"hit"} and by_nixl(cache), "reads go by NIXL again", 60)
    assert min(took) < 7  # the machine may stop us in one,
    assert max(took) < 10  # and not for as long as a second deadline


@pytest.mark.alone
@pytest.mark.parametrize("server", [OVER_TCP], indirect=True)
def test_a_stopped_agent_is_unavailable_in_time_and_what_it_sends_late_harms_nobody(server: ServerProcess) -> None:
    with nixl_client(server, deadline_s=20) as patient:
        keys = stored(patient, "stopped", 8)
    with nixl_client(server, deadline_s=1, lazy=True) as cache:
        eventually(lambda: outcomes(cache, keys) == {"hit"} and by_nixl(cache), "reads are hits")
        pid = agent_of(server)
        suspend(pid)
        began = time.monotonic()
        (result,) = cache.get_into(keys[:1], blanks(1, VALUE_NBYTES))
        assert result.outcome is Outcome.UNAVAILABLE
        assert "by NIXL before the deadline" in result.reason
        assert 0.9 < time.monotonic() - began < 4.5
        with mmcache.connect(server.url, deadline_s=20) as neighbour:
            eventually(lambda: neighbour.stat()["counters"]["leases"] == 0, "the lease is given back")
        assert client_agent().abandoned_nbytes > 0
        assert outcomes(cache, keys) == {"unavailable"}  # at once: it is left alone for a while
        os.kill(pid, signal.SIGCONT)
        for _ in range(20):  # what comes late lands under reads that go on
            assert outcomes(cache, keys) <= {"hit", "unavailable"}
            time.sleep(0.02)
        eventually(lambda: outcomes(cache, keys) == {"hit"}, "reads are hits again")
    with nixl_client(server) as cache:
        eventually(
            lambda: outcomes(cache, keys) == {"hit"} and not client_agent().abandoned_nbytes,
            "what was given up has ended",
        )
        assert cache.stat()["transport"] == "nixl"


def test_a_restarted_server_is_found_again_on_its_port() -> None:
    with (
        reserved_address() as place,
        ServerProcess("64MiB", "--nixl", "lo", listen=place) as first,
        nixl_client(first, deadline_s=10) as cache,
    ):
        keys = stored(cache, "restarted")
        assert outcomes(cache, keys) == {"hit"}
        old = agent_of(first)
        first.stop(signal.SIGKILL)
        assert outcomes(cache, keys) == {"unavailable"}
        eventually(lambda: not Path(f"/proc/{old}").exists(), "the agent ends with its server")
        with ServerProcess("64MiB", "--nixl", "lo", listen=place):
            eventually(lambda: outcomes(cache, keys) == {"miss"}, "the new server answers")
            stored(cache, "restarted")
            assert outcomes(cache, keys) == {"hit"}
            assert cache.stat()["transport"] == "nixl"


def test_a_place_outside_the_arena_is_refused_before_anything_is_asked(server: ServerProcess) -> None:
    with nixl_client(server) as cache:
        keys = stored(cache, "places", 1)
        link = cache._pool._idle[0]
        assert link.reader is not None
        reader, arena = link.reader, link.reader._arena
        assert arena.nbytes == 64 * MiB
        inside = Found(arena.nbytes - 64, 64, 64, b"")
        deadline = time.monotonic() + PATIENCE_S
        assert reader.read([inside], deadline)[0].nbytes >= 64
        for bad in (inside._replace(offset=arena.nbytes - 63), inside._replace(offset=(1 << 64) - 64)):
            with pytest.raises(ProtocolError, match="outside the server's arena"):
                reader.read([inside, bad], deadline)
        assert outcomes(cache, keys) == {"hit"}
        wrong = Reader(RemoteArena(arena.metadata, arena.base, arena.nbytes + MiB), deadline)
        with pytest.raises(TransportError, match="cannot be read by NIXL"):  # NIXL's own check, of what is registered
            wrong.read([inside._replace(offset=arena.nbytes)], deadline)
        wrong.close()
    with pytest.raises(TransportError, match="what the server says of its memory"):
        Reader(RemoteArena(b"no metadata", 0, 1), deadline)


@pytest.mark.parametrize("server", [{}, OVER_TCP], indirect=True, ids=["same-host", "tcp"])
def test_a_peer_that_writes_changes_nothing(server: ServerProcess) -> None:
    """UCX lets it try: over TCP the agent ends by the attempt, as its map is read-only, and is started again."""
    with nixl_client(server, deadline_s=10) as cache:
        keys = stored(cache, "written", 2)
        assert outcomes(cache, keys) == {"hit"}
        reader = cache._pool._idle[0].reader
        assert reader is not None
        agent, staging = client_agent().agent, reader._staging
        assert staging is not None
        staging.data[:] = 0xEE
        rows = [
            agent.bindings.nixlXferDList(agent.bindings.DRAM_SEG, np.array([(base, MiB, 0)], np.uint64))
            for base in (staging.data.ctypes.data, reader._arena.base)
        ]
        nixl, name = agent.agent, reader._peer.name
        handle = nixl.createXferReq(agent.bindings.NIXL_WRITE, *rows, name, b"", agent._backends)

        def write() -> None:
            nixl.postXferReq(handle, b"")
            until = time.monotonic() + PATIENCE_S
            while time.monotonic() < until:
                nixl.getXferStatus(handle)

        with pytest.raises(Exception, match="NIXL_ERR_REMOTE_DISCONNECT"):
            write()
        with mmcache.connect(server.url, deadline_s=20) as neighbour:  # shared memory: the very bytes
            assert neighbour.stat()["transport"] == "shm"
            assert outcomes(neighbour, keys) == {"hit"}
        eventually(lambda: outcomes(cache, keys) == {"hit"}, "the agent is there again")


def test_values_larger_than_the_staging_memory_and_several_threads() -> None:
    with ServerProcess("512MiB", "--nixl", "lo") as server, nixl_client(server, deadline_s=20) as cache:
        large = keys_of(1, "large")
        value = np.arange(10 * MiB)
        assert all(cache.put(large, [value]))
        keys = stored(cache, "threads", 16)
        seen: list[set[str]] = []

        def read_often() -> None:
            for _ in range(5):
                seen.append(outcomes(cache, keys))

        threads = [threading.Thread(target=read_often) for _ in range(4)]
        for thread in threads:
            thread.start()
        into = np.zeros_like(value)
        assert all(cache.get_into(large, [into]))
        assert np.array_equal(into, value)
        for thread in threads:
            thread.join()
        assert seen == [{"hit"}] * 20


def test_clients_that_come_and_go_leave_nothing(server: ServerProcess) -> None:
    def held() -> list[int]:
        agent = client_agent()
        names = ("self/fd", "self/task", f"{agent_of(server)}/fd")
        return [len(os.listdir(f"/proc/{name}")) for name in names] + [peer.users for peer in agent._peers.values()]

    with nixl_client(server) as cache:
        keys = stored(cache, "come and go")

    def comes_and_goes() -> list[int]:
        with nixl_client(server) as cache:
            assert outcomes(cache, keys) == {"hit"}
        return held()

    for _ in range(2):  # what is made once
        comes_and_goes()
    first = comes_and_goes()
    for _ in range(7):
        comes_and_goes()
    # This process has threads of other tests too, which may end meanwhile, but no more begin.
    # Of peers that nobody uses any may go.
    eventually(lambda: all(now <= then for now, then in zip(held()[:3], first[:3], strict=True)), "no more is held")
    assert not any(held()[3:])
    assert len(held()) <= len(first)


def test_a_forked_child_reads_by_an_agent_of_its_own(server: ServerProcess) -> None:
    with nixl_client(server) as cache:
        keys = stored(cache, "forked")
        child = os.fork()
        if not child:
            good = False
            try:
                good = outcomes(cache, keys) == {"hit"} and cache.stat()["transport"] == "nixl"
                cache.close()
            finally:
                os._exit(0 if good else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert outcomes(cache, keys) == {"hit"}


def test_a_second_tenant_ends_it(tmp_path: Path) -> None:
    path = tmp_path / "access.toml"
    with ServerProcess("64MiB", "--nixl", "lo", "--access", one_tenant(path)) as server:
        with pytest.raises(TransportError, match="access denied"):
            nixl_client(server)
        with nixl_client(server, token="token-of-a") as cache:
            keys = stored(cache, "tenants")
            assert outcomes(cache, keys) == {"hit"}
            assert cache.stat()["transport"] == "nixl"
            pid = agent_of(server)
            write_access(path, with_token(path.read_text(), "b", digest_of("token-of-b").hex()))
            eventually(lambda: not Path(f"/proc/{pid}").exists(), "the agent is gone")
            eventually(lambda: outcomes(cache, keys) == {"hit"}, "reads go on")
            assert cache.stat()["transport"] == "tcp"
            assert "runs without --nixl" in cache.stat()["transport_why"]
    assert "more than one tenant" in server.said


def test_where_it_is_told_over_tls_too(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("server")
    with (
        ServerProcess("64MiB", "--nixl", "lo", "--tls-cert", cert, "--tls-key", key) as server,
        mmcache.connect(f"{server.url}?transport=nixl&ca={authority.ca}", deadline_s=20) as cache,
    ):
        assert outcomes(cache, stored(cache, "tls")) == {"hit"}
        assert by_nixl(cache)


def test_who_may_not_see_the_memory_is_not_told_where_it_is(tmp_path: Path) -> None:
    path = tmp_path / "access.toml"
    one_tenant(path)
    write_access(path, path.read_text().replace('name = "a"', 'name = "a"\nshared_memory = false'))
    arguments = ("--nixl", "lo", "--access", str(path))
    with (
        ServerProcess("64MiB", *arguments) as server,
        nixl_client(server, token="token-of-a") as cache,
    ):
        assert cache.stat()["transport"] == "tcp"
        assert "may not see the server's whole memory" in cache.stat()["transport_why"]


def test_devices_that_are_not_there_end_the_start_with_a_reason() -> None:
    with pytest.raises(TransportError, match="--nixl nonesuch0"):
        ServerProcess("1MiB", "--nixl", "nonesuch0").start()
