"""Where NIXL is missing, of another release, not offered or not allowed: what is said, and which path is taken."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from mmcache.client.link import run
from mmcache.client.session import join
from mmcache.errors import TransportError
from mmcache.server.access_edit import with_token
from mmcache.server.grants import digest_of
from mmcache.testing.process import ServerProcess
from mmcache.transport.base import Buffer
from mmcache.transport.nixl import lacks
from mmcache.transport.tcp import Channel
from tests.integration.access_bed import write_access
from tests.integration.nixl_bed import WITHOUT, needs_nixl, nixl_client, one_tenant, outcomes, stored
from tests.integration.support import PATIENCE_S, ROOT, eventually, run_cli


def test_a_server_without_it_is_read_by_tcp_and_stat_says_why(caplog: pytest.LogCaptureFixture) -> None:
    with ServerProcess("16MiB") as server, nixl_client(server) as cache:
        report = cache.stat()
        assert report["transport"] == "tcp"
        assert "runs without --nixl" in report["transport_why"]
        assert outcomes(cache, stored(cache, "plain")) == {"hit"}
    assert "reads go by tcp, not by NIXL" in caplog.text


class Unheard(Channel):
    """A channel on which `want_nixl` becomes a field that no release knows: what an older server sees in it."""

    def send(self, buffers: Sequence[Buffer], deadline: float | None) -> None:
        super().send([bytes(one).replace(b"\x38\x01", b"\x78\x01") for one in buffers], deadline)


def test_a_server_that_knows_nothing_of_it_is_an_older_one() -> None:
    deadline = time.monotonic() + PATIENCE_S
    with ServerProcess("1MiB") as server:
        channel = Unheard(socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), PATIENCE_S))
        joined = run(channel, join(shared=False, nixl_by=deadline), deadline)
        channel.close()
    assert joined.reader is None
    assert "older release" in joined.no_reader


def test_two_tenants_are_refused_at_the_start(tmp_path: Path) -> None:
    path = tmp_path / "access.toml"
    one_tenant(path)
    write_access(path, with_token(path.read_text(), "b", digest_of("token-of-b").hex()))
    ended = run_cli("serve", "--memory", "1MiB", "--listen", "127.0.0.1:0", "--nixl", "lo", "--access", str(path))
    assert ended.returncode == 2
    assert "more than one tenant" in ended.stderr


@pytest.fixture(params=["is another release than this one knows: it lacks nixlAgent", "does not load: it is broken"])
def unusable(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[dict[str, str], str]:
    """An environment in which NIXL is found first where it is of no use, and what is said about it."""
    for package in ("nixl_cu12", "nixl_cu13"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
        text = "" if "lacks" in request.param else "raise RuntimeError('it is broken')\n"
        (tmp_path / package / "_bindings.py").write_text(text)
    return {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", str(ROOT))])}, request.param


def test_a_server_that_cannot_load_it_says_so_and_does_not_start(unusable: tuple[dict[str, str], str]) -> None:
    environment, words = unusable
    with pytest.raises(TransportError, match=words) as error:
        ServerProcess("1MiB", "--nixl", "lo", environment=environment).start()
    assert "pip install 'mmcache[nixl]'" in str(error.value)


def test_doctor_says_what_is_wrong_with_it(unusable: tuple[dict[str, str], str]) -> None:
    environment, words = unusable
    assert words in findings("mmcache://127.0.0.1:1", environment)["nixl"]["text"]
    assert findings("mmcache://127.0.0.1:1", {})["nixl"]["state"] == ("no" if WITHOUT else "yes")


@needs_nixl
def test_a_client_that_cannot_load_it_reads_by_tcp_and_says_so(unusable: tuple[dict[str, str], str]) -> None:
    environment, words = unusable

    def answered() -> dict[str, str]:  # it asks for 2 s, so that a server that stands still is said not to answer
        row = findings(f"{server.url}?transport=nixl", environment)["server"]
        return row if row["state"] == "yes" else {}

    with ServerProcess("1MiB", "--nixl", "lo") as server:
        found = eventually(answered, "the server answers")
    assert "read by tcp: NIXL cannot be used" in found["text"]
    assert words in found["text"]


def findings(url: str, environment: dict[str, str]) -> dict[str, dict[str, str]]:
    """What `mmcache doctor` of another process finds."""
    command = [sys.executable, "-m", "mmcache", "doctor", "--json", "-c", url]
    ended = subprocess.run(command, env=os.environ | environment, capture_output=True, check=True, cwd=ROOT)
    return {row["what"]: row for row in json.loads(ended.stdout)}


def test_bindings_that_differ_are_named() -> None:
    agent = SimpleNamespace(createBackend=None, postXferReq=None)
    names = lacks(SimpleNamespace(nixlAgent=agent, nixlAgentConfig=SimpleNamespace(useProgThread=True)))
    assert {"NIXL_READ", "nixlAgent.getXferStatus", "nixlAgentConfig.pthrDelay"} <= set(names)
    assert "nixlAgent.createBackend" not in names
