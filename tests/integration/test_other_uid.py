"""Another user on the server's host can neither change the shared memory, nor read what is not its own, nor come in
where a socket's permissions forbid it. Needs root, to become another user."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mmcache
from mmcache.testing.process import ServerProcess
from tests.integration.access_bed import TOKENS, tenants_file, write_access
from tests.integration.support import ROOT, MiB, blanks, keys_of, values_of

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")

VALUE_NBYTES = 1 * MiB
REFUSED = {"EPERM", "EACCES"}


def other_user(*words: str) -> dict[str, Any]:
    """What other_uid.py says."""
    ended = subprocess.run(
        [sys.executable, "-m", "tests.integration.other_uid", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=60,
    )
    said: dict[str, Any] = json.loads(ended.stdout)
    return said


def test_a_client_that_became_another_user_can_neither_write_nor_cut_the_arena() -> None:
    keys, buffers = keys_of(40, "arena"), blanks(40, VALUE_NBYTES)
    with ServerProcess("64MiB") as server, mmcache.connect(f"{server.url}?transport=tcp", deadline_s=20) as cache:
        assert all(cache.put(keys, values_of(keys, VALUE_NBYTES)))
        said = other_user("attack_arena", server.unix_path, str(server.pid))
        assert {name: result for name, result in said["tried"].items() if result not in REFUSED} == {}
        assert len(said["tried"]) == 12
        assert said["nbytes"] == 64 * MiB
        assert all(cache.get_into(keys, buffers))
        assert all(map(np.array_equal, buffers, values_of(keys, VALUE_NBYTES)))
        assert cache.counters["verify_failures"] == 0


def test_without_seals_the_same_attempts_succeed() -> None:
    said = other_user("attack_unsealed", str(4 * MiB))
    assert set(said["tried"].values()) == {"done"}
    assert said["nbytes"] < 4 * MiB  # it was cut


def test_another_user_reads_nothing_of_another_tenant(tmp_path: Path) -> None:
    keys = keys_of(2, "tenants")
    access = write_access(tmp_path / "access.toml", tenants_file())
    with ServerProcess("64MiB", "--access", access) as server:
        with mmcache.connect(server.url, token=TOKENS["a"], deadline_s=20) as cache:
            assert all(cache.put(keys, values_of(keys, VALUE_NBYTES)))
        found = other_user("use_tenant", server.url, TOKENS["b"], "tenants", str(VALUE_NBYTES))
        assert found == {
            "transport": "tcp",
            "got": ["miss", "miss"],
            "right": 0,
            "acquired": 0,
            "matched": 0,
            "inspected": False,
            "listed": 0,
            "deleted": 0,
        }
        with mmcache.connect(server.url, token=TOKENS["a"], deadline_s=20) as cache:
            assert cache.match_prefix(keys) == 2
        own = other_user("use_tenant", server.url, TOKENS["a"], "tenants", str(VALUE_NBYTES))
        assert own == {  # the same user, as the tenant that stored them
            "transport": "tcp",
            "got": ["hit", "hit"],
            "right": 2,
            "acquired": 2,
            "matched": 2,
            "inspected": True,
            "listed": 2,
            "deleted": 2,
        }


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody may look into, as pytest's own are not."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_another_user_cannot_connect_to_the_unix_socket(open_folder: Path) -> None:
    path = open_folder / "shard.sock"
    with ServerProcess("16MiB", "--unix", str(path)):
        assert path.stat().st_mode & 0o777 == 0o600
        assert other_user("connect_unix", str(path)) == {"root": "done", "other": "EACCES"}
        path.chmod(0o666)  # an operator who lets everybody in
        assert other_user("connect_unix", str(path)) == {"root": "done", "other": "done"}


def test_the_folder_of_an_automatic_socket_keeps_others_out_too() -> None:
    with ServerProcess("16MiB") as server:
        Path(server.unix_path).chmod(0o666)
        assert other_user("connect_unix", server.unix_path) == {"root": "done", "other": "EACCES"}
