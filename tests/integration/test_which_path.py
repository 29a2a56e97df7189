"""`mmcache stat` and Client.stat say which path reads take, and why not a faster one. NIXL's are in test_nixl*.py."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import mmcache
from mmcache.errors import TransportError
from mmcache.testing.process import ServerProcess
from tests.integration.access_bed import TOKENS, tenants_file, write_access
from tests.integration.certificates import Authority
from tests.integration.on_a_loop import OnALoop
from tests.integration.support import ROOT, run_cli
from tests.integration.wire_bed import NAMESPACE, THERE, network

ON_THIS_HOST = "the server is on this host and shares its memory"
A_SOCKET = "the URL asks for a socket and no shared memory (transport=tcp)"


def said(url: str, token: str | None = None) -> tuple[str, str]:
    """The path of reads, and the reason, by both clients."""
    with mmcache.connect(url, token=token) as cache, OnALoop(mmcache.AsyncClient(url, token=token)) as looped:
        reports = [cache.stat(), looped.stat()]
    (path, why), other = ((report["transport"], report["transport_why"]) for report in reports)
    assert other == (path, why)
    return path, why


def test_what_the_url_asks_for_and_what_is_found_without_asking() -> None:
    assert said("embedded://?memory=1MiB") == ("shm", "the server is in this process")
    with ServerProcess("4MiB") as server:
        unix = f"mmcache+unix://{server.unix_path}"
        for url in (server.url, unix):
            assert said(url) == ("shm", ON_THIS_HOST)
            assert said(f"{url}?transport=shm") == ("shm", "the URL asks for it (transport=shm)")
        assert said(f"{server.url}?transport=tcp") == ("tcp", A_SOCKET)
        assert said(f"{unix}?transport=tcp") == ("unix", A_SOCKET)
        shown = run_cli("stat", "-c", f"{server.url}?transport=tcp").stdout
        assert f"read by tcp: {A_SOCKET}" in shown
        report = json.loads(run_cli("stat", "--json", "-c", server.url).stdout)
        assert (report["transport"], report["transport_why"]) == ("shm", ON_THIS_HOST)


def test_tls_says_the_same(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("server")
    with ServerProcess("4MiB", "--tls-cert", cert, "--tls-key", key) as server:
        url = f"{server.url}?ca={authority.ca}"
        assert said(url) == ("shm", ON_THIS_HOST)
        assert said(f"{url}&transport=tcp") == ("tls", A_SOCKET)
        os.unlink(server.unix_path)
        path, why = said(url)
        assert path == "tls"
        assert "No such file" in why


def removed(path: str) -> None:
    os.unlink(path)


def left_behind(path: str) -> None:
    """As a killed server leaves it: nobody listens."""
    os.unlink(path)
    with socket.socket(socket.AF_UNIX) as nobody:
        nobody.bind(path)


@pytest.mark.parametrize(("harm", "words"), [(removed, "No such file"), (left_behind, "Connection refused")])
def test_a_unix_socket_that_cannot_be_used(harm: Callable[[str], None], words: str, tmp_path: Path) -> None:
    # Not where it is by default: any other server that starts clears away what is left there.
    with ServerProcess("4MiB", "--unix", str(tmp_path / "s")) as server:
        harm(server.unix_path)
        path, why = said(server.url)
        assert path == "tcp"
        assert server.unix_path in why
        assert words in why
        with pytest.raises(TransportError, match=f"no shared memory: .*{words}.*; use transport=tcp"):
            mmcache.connect(f"{server.url}?transport=shm")


def test_a_server_without_a_unix_socket() -> None:
    with ServerProcess("4MiB", "--unix", "") as server:
        path, why = said(server.url)
        assert path == "tcp"
        assert "has no unix socket" in why


def test_another_server_at_the_place_of_the_unix_socket() -> None:
    with ServerProcess("4MiB") as server, ServerProcess("4MiB") as other:
        os.unlink(server.unix_path)
        os.symlink(other.unix_path, server.unix_path)
        path, why = said(server.url)
        assert path == "tcp"
        assert "another server than the URL's" in why
        os.unlink(server.unix_path)


def test_a_tenant_that_may_not_see_the_whole_memory(tmp_path: Path) -> None:
    why = "the server does not share its memory with this client's tenant (docs/access.md)"
    access = write_access(tmp_path / "access.toml", tenants_file())
    with ServerProcess("4MiB", "--access", access) as server:
        assert said(server.url, TOKENS["a"]) == ("tcp", why)
        assert said(f"mmcache+unix://{server.unix_path}", TOKENS["a"]) == ("unix", why)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_user_who_may_not_use_the_unix_socket() -> None:
    with ServerProcess("4MiB") as server:
        command = [sys.executable, "-m", "tests.integration.other_uid", "which_path", server.url]
        ended = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True, timeout=60)
        found = json.loads(ended.stdout)
        assert found["transport"] == "tcp"
        assert server.unix_path in found["transport_why"]
        assert "Permission denied" in found["transport_why"]


def test_grpc_is_taken_only_where_it_is_asked_for(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("server")
    for words, scheme, options, path in (
        ((), "mmcache", "", "grpc"),
        (("--tls-cert", cert, "--tls-key", key), "mmcaches", f"&ca={authority.ca}", "grpc-tls"),
    ):
        with ServerProcess("4MiB", "--grpc", "127.0.0.1:0", *words) as server:
            with mmcache.connect(f"{scheme}://{server.grpc_address}?transport=grpc{options}") as cache:
                report = cache.stat()
            assert (report["transport"], report["transport_why"]) == (path, "the URL asks for it (transport=grpc)")


@pytest.mark.alone  # one network of these addresses at a time
def test_a_server_on_another_host() -> None:
    under = ("ip", "netns", "exec", NAMESPACE)
    with network(), ServerProcess("4MiB", "--insecure-network", listen=f"{THERE}:0", under=under) as server:
        path, why = said(server.url)
        assert path == "tcp"
        assert "another host" in why
