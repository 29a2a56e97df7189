"""The installed SGLang against what facts.py says of its arguments: a group that is out must be known whole."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter

import pytest

from mmcache_connectors.sglang.facts import IN_BUT, OUT_BUT
from tests.engines.sglang.harness import shim_environment

# How many arguments each group that is out has. Another number: read what is new, and say in facts.py if it is in.
KNOWN = {
    "device": 12,
    "disagg": 30,
    "exec.graph": 19,
    "memory": 31,
    "mm": 18,
    "observability": 45,
    "parallel": 42,
    "schedule": 41,
    "serving": 64,
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
    assert {group: count for group, count in Counter(groups.values()).items() if group in OUT_BUT} == KNOWN


def test_every_argument_that_is_named_exists(groups: dict[str, str]) -> None:
    named = {name: group for table in (OUT_BUT, IN_BUT) for group, names in table.items() for name in names}
    assert {name: groups.get(name) for name in named} == named
