"""The installed SGLang against what facts.py says of its arguments: a group that is out must be known whole."""

from __future__ import annotations

import json
import subprocess
import sys
from hashlib import sha256

import pytest

from mmcache_connectors.sglang.facts import IN_BUT, OUT_BUT
from tests.engines.sglang.harness import shim_environment

# SHA-256 of the sorted names, with blanks between, of the arguments in each group that is out. If another one: read
# what is new, and say in facts.py whether it is in.
KNOWN = {
    "device": "08d7e547968f322ac897e30225d7e1af0b135d529448fdb176ff8c412b38a13b",
    "disagg": "8afbc16d85f9b2ece47df3d806c9410d209096145a9a5f6c873babc20f0856ad",
    "exec.graph": "2bf3808ceb6fefafa08adda42c3b9211aa94b9f7fb8bade8ab8bffe80dd909ef",
    "memory": "0827a60890c0b4c39c6ddf70e4ceb9f97c5fda940e0338b69155f18089bc1f6a",
    "mm": "7bb03dd9fc20a69b65d90fa17f1a9d7b4889d48c88ab762b34bd30c6c8454a44",
    "observability": "88896845f86801cd4dc9486f537d9c0d47953aa1bcf570c5a0c840f42afc6376",
    "parallel": "b0e086d78cdb57e95672c68b65b389e5f64232e7108192e7c7fa5a282c5be654",
    "schedule": "f0c048e9fe8037faf9da04834b95dbc35c27ad02753982a1af3e91d1db056f61",
    "serving": "cfc32059a87f0b3db807767949198573d00842a2c6f99fddfdaff6760234b38e",
}
READ = """
import json
from sglang.srt.arg_groups.arg_utils import namespace_of
from sglang.srt.server_args import ServerArgs
print(json.dumps(namespace_of(ServerArgs)))
"""


@pytest.fixture(scope="module")
def groups() -> dict[str, str]:
    """Each argument's group."""
    command = [sys.executable, "-W", "ignore", "-c", READ]
    done = subprocess.run(command, env=shim_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_groups_that_are_out_hold_nothing_new(groups: dict[str, str]) -> None:
    names = {group: sorted(name for name in groups if groups[name] == group) for group in OUT_BUT}
    changed = {
        group: held for group, held in names.items() if sha256(" ".join(held).encode()).hexdigest() != KNOWN[group]
    }
    assert changed == {}


def test_every_argument_that_is_named_exists(groups: dict[str, str]) -> None:
    named = {name: group for table in (OUT_BUT, IN_BUT) for group, names in table.items() for name in names}
    assert {name: groups.get(name) for name in named} == named
