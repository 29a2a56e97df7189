"""`mmcache doctor`: what it tries is really tried, and each finding says why."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest

from mmcache import doctor
from mmcache.client.blocking import Client
from mmcache.config import ClientConfig
from mmcache.errors import StoreError
from mmcache.testing.process import ServerProcess, suspend
from mmcache.transport import native
from tests.integration.access_bed import TOKENS, bed_arguments
from tests.integration.support import PATIENCE_S, run_cli


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "ASK_S", PATIENCE_S)


def test_a_server_that_answers_and_how_it_is_reached() -> None:
    with ServerProcess("16MiB") as server:
        found = {row["what"]: row for row in json.loads(run_cli("doctor", "--json", "-c", server.url).stdout)}
        assert found["server"]["state"] == "yes"
        assert "read by shm: the server is on this host" in found["server"]["text"]
        assert found["access"]["state"] == "open"
        assert "no TLS" in found["access"]["text"]
        shown = run_cli("doctor", "-c", f"{server.url}?transport=tcp")
        assert shown.returncode == 0
        assert "read by tcp: the URL asks" in " ".join(shown.stdout.split())
    assert found["shared memory"]["state"] == "yes"
    assert (found["native"]["state"] == "yes") == (native.NATIVE is not native.PYTHON)
    assert native.STATE in found["native"]["text"]
    assert found["memory"]["state"].endswith("GiB")
    assert found["cores"]["state"].isdecimal()


def test_whether_a_server_asks_for_a_token_or_a_certificate(tmp_path: Path) -> None:
    authority, arguments = bed_arguments(tmp_path)
    cert, key = authority.issue("engine-1")
    token_file = tmp_path / "token"
    token_file.touch(0o600)
    token_file.write_text(TOKENS["a"])

    def found(url: str) -> dict[str, doctor.Finding]:
        return {row.what: row for row in doctor.examine(url)}

    with ServerProcess("1MiB", *arguments) as server:
        url = f"{server.url}?ca={authority.ca}"
        for options in (f"&token_file={token_file}", f"&cert={cert}&key={key}"):
            good = found(url + options)
            assert good["server"].state == good["access"].state == "yes"
            assert "TLS; a token or a client certificate is needed" in good["access"].text
        bad = found(url)
        assert bad["server"].state == bad["access"].state == "no"
        assert "token_file=PATH" in bad["server"].text
        assert "needed" in bad["access"].text
        assert "use mmcaches://" in found(server.url.replace("mmcaches", "mmcache"))["server"].text


def test_who_is_not_answered_in_time_knows_nothing_of_access(monkeypatch: pytest.MonkeyPatch) -> None:
    with ServerProcess("1MiB") as server:

        def as_nobody(config: ClientConfig) -> Client:
            suspend(server.pid)
            monkeypatch.setattr(doctor, "Client", as_somebody)
            return Client(replace(config, deadline_s=0.5))

        def as_somebody(config: ClientConfig) -> Client:
            os.kill(server.pid, signal.SIGCONT)
            return Client(config)

        monkeypatch.setattr(doctor, "Client", as_nobody)
        found = {row.what: row for row in doctor.examine(server.url)}
    assert found["server"].state == "yes"
    assert found["access"].state == "unknown"
    assert "needed" not in found["access"].text


def test_what_is_not_there_says_what_to_do() -> None:
    found = {row.what: row for row in doctor.examine("mmcache://127.0.0.1:1")}
    assert found["server"].state == "no"
    assert "mmcache serve" in found["server"].text
    assert found["kernels"].state == "no"
    assert "CUDA" in found["kernels"].text or "torch is not installed" in found["kernels"].text


def test_a_bad_url_is_a_finding_too() -> None:
    (found,) = [row for row in doctor.examine("ftp://nowhere") if row.what == "server"]
    assert found.state == "no"
    assert "ftp" in found.text


def test_without_shared_memory_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(nbytes: int) -> None:
        raise StoreError("no sealed shared memory")

    monkeypatch.setattr(doctor, "Arena", refuse)
    found = {row.what: row for row in doctor.examine("mmcache://127.0.0.1:1")}
    assert found["shared memory"].state == "no"
    assert "clients use sockets" in found["shared memory"].text


def test_a_package_whose_findings_fail_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = metadata.EntryPoint("broken", "no.such.module:findings", doctor.GROUP)
    monkeypatch.setattr(metadata, "entry_points", lambda group: [broken])
    found = {row.what: row for row in doctor.examine("mmcache://127.0.0.1:1")}
    assert found["broken"].state == "no"
    assert "ModuleNotFoundError" in found["broken"].text
