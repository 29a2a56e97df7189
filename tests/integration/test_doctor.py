"""`mmcache doctor`: what it tries is really tried, and each finding says why."""

from __future__ import annotations

import json
from importlib import metadata

import pytest

from mmcache import doctor
from mmcache.errors import StoreError
from mmcache.testing.process import ServerProcess
from tests.integration.support import run_cli


def test_a_server_that_answers_and_how_it_is_reached() -> None:
    with ServerProcess("16MiB") as server:
        found = {row["what"]: row for row in json.loads(run_cli("doctor", "--json", "-c", server.url).stdout)}
        assert found["server"]["state"] == "yes"
        assert "shared memory" in found["server"]["text"]
        shown = run_cli("doctor", "-c", f"{server.url}?transport=tcp")
        assert shown.returncode == 0
        assert "over TCP" in " ".join(shown.stdout.split())
    assert found["shared memory"]["state"] == "yes"
    assert found["memory"]["state"].endswith("GiB")
    assert found["cores"]["state"].isdecimal()


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
