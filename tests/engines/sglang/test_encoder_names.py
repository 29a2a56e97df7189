"""The installed SGLang's embedding store against ours; and what its encoder takes for one item, and ours does not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mmcache_connectors.sglang.encoder_items import digest_of
from tests.engines.sglang.harness import HERE, shim_environment

THEIRS, OURS = 0, 1


@pytest.fixture(scope="module")
def probe(made: Path) -> dict[str, Any]:
    """What encoder_probe.py prints."""
    command = [sys.executable, "-W", "ignore", str(HERE / "encoder_probe.py"), str(made / "vl")]
    done = subprocess.run(command, env=shim_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_every_method_is_there_with_its_parameters(probe: dict[str, Any]) -> None:
    theirs, ours = probe["methods"]
    assert ours == theirs
    assert set(probe["abstract"]) <= set(theirs)
    assert len(theirs) == 7


def test_every_argument_that_is_named_exists(probe: dict[str, Any]) -> None:
    assert probe["processing"] == []


def test_a_name_is_the_same_for_the_same(probe: dict[str, Any]) -> None:
    assert probe["row"] == probe["row again"]
    assert probe["halves"][OURS][0] == probe["first half"][OURS][0]
    first, second = probe["twice"][OURS]
    assert first == second


def test_what_sglang_takes_for_one_item_is_told_apart(probe: dict[str, Any]) -> None:
    """A grid and a dtype are not in its hash; sound after the first is hashed as if it were none."""
    for one, other, place in (("row", "column", 0), ("row", "other dtype", 0), ("sounds", "other sounds", 1)):
        assert probe[one][THEIRS][place] == probe[other][THEIRS][place]
        assert probe[one][OURS][place] != probe[other][OURS][place]


def test_what_comes_for_the_item_counts_and_so_does_its_place_among_several(probe: dict[str, Any]) -> None:
    assert probe["row with a size"][OURS] != probe["row"][OURS]
    assert probe["masked sound"][OURS] != probe["sounds"][OURS][:1]
    assert len({*probe["twice, with times"][OURS], *probe["twice"][OURS]}) == 3


@pytest.mark.parametrize("items", ["unknown", "masked sounds", "twice, with sizes", "film of two ranks"])
def test_what_might_become_a_wrong_embedding_has_no_name(probe: dict[str, Any], items: str) -> None:
    assert all(name.startswith("once-") for name in probe[items][OURS])


@pytest.mark.parametrize(
    "items", ["row", "halves", "sounds", "masked sound", "row with a size", "twice, with times", "film"]
)
def test_a_name_is_a_digest(probe: dict[str, Any], items: str) -> None:
    assert all(digest_of(name) for name in probe[items][OURS])
