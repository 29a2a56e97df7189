"""The installed SGLang's storage interface against ours: every method is there, and takes what SGLang passes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.engines.sglang.harness import shim_environment

READ = """
import inspect, json
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage
from mmcache_connectors.sglang.hicache import MMCacheHiCacheStorage

def methods(owner):
    found = {name: held for name, held in inspect.getmembers(owner, inspect.isfunction) if not name.startswith("_")}
    return {name: [(one.name, str(one.kind), one.default is one.empty)
                   for one in inspect.signature(held).parameters.values()] for name, held in found.items()}

own = [name for name in vars(MMCacheHiCacheStorage) if not name.startswith("_")]
print(json.dumps([methods(HiCacheStorage), methods(MMCacheHiCacheStorage), own]))
"""


@pytest.fixture(scope="module")
def found() -> tuple[dict[str, list[list[object]]], dict[str, list[list[object]]], list[str]]:
    """Methods and parameters (name, kind, whether it must be given) of SGLang's class and ours; our own methods."""
    command = [sys.executable, "-W", "ignore", "-c", READ]
    done = subprocess.run(command, env=shim_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    theirs, ours, own = json.loads(done.stdout.splitlines()[-1])
    return theirs, ours, own


def test_every_method_of_the_interface_is_our_own(
    found: tuple[dict[str, list[list[object]]], dict[str, list[list[object]]], list[str]],
) -> None:
    theirs, _, own = found
    assert len(theirs) >= 16
    assert set(own) == {*theirs, "close"}  # SGLang calls close, though its class does not have it


def test_every_method_takes_what_the_interface_names(
    found: tuple[dict[str, list[list[object]]], dict[str, list[list[object]]], list[str]],
) -> None:
    theirs, ours, _ = found
    for name, parameters in theirs.items():
        assert [one[:2] for one in ours[name]] == [one[:2] for one in parameters], name
        for (_, _, ours_must), (_, _, theirs_must) in zip(ours[name], parameters, strict=True):
            assert theirs_must or not ours_must, name  # what may be left out there may be left out here
