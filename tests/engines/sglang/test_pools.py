"""The real host pools of models with pages of several kinds: every byte of what was stored comes back, and no other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from tests.engines.sglang.harness import HERE, Cache, shim_environment

PAGES = 6
ALL = [True] * PAGES


def said_by(script: str, folder: Path) -> Any:
    """The JSON a script prints that is run with SGLang's classes, before an empty cache."""
    with Cache() as cache:
        environment = shim_environment()
        environment["PYTHONPATH"] += f"{os.pathsep}{HERE.parents[2]}"
        command = [sys.executable, "-W", "ignore", str(HERE / script), cache.url, str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of two models what each call answered, and bytes that are alike by pool."""
    return said_by("real_pools.py", tmp_path_factory.mktemp("pools"))


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The keys of one page by kind of pool and process, "rank/ranks" and "stage/stages"."""
    return said_by("real_names.py", tmp_path_factory.mktemp("names"))


def apart(found: dict[str, list[str]]) -> bool:
    """Whether no two processes have a key in common."""
    keys = [key for held in found.values() for key in held]
    return len(keys) == len(set(keys))


def test_what_ranks_hold_a_share_of_is_theirs_alone(names: Any) -> None:
    assert apart(names["heads"])
    assert apart(names["window"])


def test_what_is_cut_by_heads_is_named_by_them(names: Any) -> None:
    cut = names["heads, cut"]
    assert cut["0/1"] == cut["0/2"] + cut["1/2"]
    assert len(set(cut["0/1"])) == 2


@pytest.mark.parametrize("kind", ["latent", "compressed"])
def test_what_every_rank_holds_has_one_name(names: Any, kind: str) -> None:
    assert names[kind]["0/1"] == names[kind]["0/2"] == names[kind]["1/2"] != []


@pytest.mark.parametrize("kind", ["heads, stages", "latent, stages", "compressed, stages"])
def test_stages_have_names_of_their_own(names: Any, kind: str) -> None:
    """Though each may count its layers from 0 on. Ranks of one stage are as without stages."""
    first, second = (
        {name: keys for name, keys in names[kind].items() if name.endswith(f" {stage}")} for stage in ("0/2", "1/2")
    )
    assert not {*chain(*first.values())} & {*chain(*second.values())}
    for stage in (first, second):
        assert apart(stage) if kind == "heads, stages" else len({*chain(*stage.values())}) == 1


def test_a_window_and_states_come_back_where_the_prompt_ends(told: Any) -> None:
    answers, alike = told[0]
    assert answers == [
        ALL,
        {"swa": [True]},
        {"mamba": [True]},
        [PAGES, {"kv": PAGES, "swa": PAGES, "mamba": PAGES}, [PAGES]],
        ALL,
        {"swa": [True], "mamba": [True]},
        [[PAGES, 2], [], True],
    ]
    assert alike == {
        "kv": [2 * PAGES * 4 * 2 * 16 * 2],  # keys and values, pages, tokens, layers, elements, bytes
        "swa": [2 * 1 * 4 * 1 * 16 * 2],
        "mamba": [3 * 20 * 4, 3 * 18 * 2],  # layers, elements, bytes: states, then convolutions
    }


def test_compressed_pages_beside_mere_places_come_back(told: Any) -> None:
    answers, alike = told[1]
    assert answers == [
        ALL,
        {"deepseek_v4_c4": ALL},
        [PAGES, {"kv": PAGES, "deepseek_v4_c4": PAGES}, [*range(1, PAGES + 1)]],
        ALL,
        {"deepseek_v4_c4": ALL},
        [[PAGES], [], True],
    ]
    assert alike == {"kv": [], "deepseek_v4_c4": [2 * PAGES * 48]}
