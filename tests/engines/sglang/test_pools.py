"""The real host pools of models with pages of several kinds: every byte of what was stored comes back, and no other."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.engines.sglang.harness import HERE, Cache, shim_environment

PAGES = 6
ALL = [True] * PAGES


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What real_pools.py says of both models: what each call answered, and bytes that are alike by pool."""
    with Cache() as cache:
        command = [sys.executable, "-W", "ignore", str(HERE / "real_pools.py"), cache.url]
        environment = shim_environment()
        environment["PYTHONPATH"] += f":{HERE.parents[2]}"
        done = subprocess.run(
            [*command, str(tmp_path_factory.mktemp("pools"))],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])


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
