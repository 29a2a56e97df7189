"""The commands in examples/vllm and docs/vllm.md: every flag and every setting in them is one that exists.

`mmcache` commands go through our command line's parser, `vllm serve` through the installed vLLM's, what stands in their
JSON through vLLM's configuration classes and our settings. The compose file cannot run here (Docker, GPUs), so it is
read: what its services run is held to the same, and its parts must fit each other. offline.py runs as it stands.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import mmcache_connectors.vllm as connectors
from mmcache_connectors.vllm.settings import CacheSettings, EncoderSettings, Settings, parse_settings
from tests.engines.cache import Cache
from tests.engines.examples import commands, complaints, compose_complaints
from tests.engines.vllm.harness import ENVIRONMENT, made
from tests.engines.vllm.models import ROOT

# vLLM, imported here, warns of its own dependencies.
pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning", "default::UserWarning")
EXAMPLES = ROOT / "examples" / "vllm"
PAGES = ("examples/vllm/README.md", "docs/vllm.md")


@cache
def _vllm_parser() -> Any:
    importlib.import_module("vllm.config")
    arguments = importlib.import_module("vllm.utils.argparse_utils")
    cli = importlib.import_module("vllm.entrypoints.launchers.cli_args")
    return cli.make_arg_parser(arguments.FlexibleArgumentParser(exit_on_error=False))


def wrong(words: list[str]) -> list[str]:
    """What is wrong with one command."""
    return complaints(words, "vllm", _of_vllm)


def _of_vllm(arguments: list[str]) -> list[str]:
    try:
        parsed, unknown = _vllm_parser().parse_known_args(arguments)
    except (Exception, SystemExit) as error:
        return [f"vllm serve: {error}"]
    found = [f"vllm serve has no {' '.join(unknown)}"] if unknown else []
    if parsed.kv_transfer_config:
        config = _as_mapping(parsed.kv_transfer_config)
        found += _of_connector(config["kv_connector"], config["kv_connector_module_path"])
        found += _of_settings(config["kv_connector_extra_config"], Settings)
    if parsed.ec_transfer_config:
        config = _as_mapping(parsed.ec_transfer_config)
        found += _of_connector(config["ec_connector"], config["ec_connector_module_path"])
        found += _of_settings(config["ec_connector_extra_config"], EncoderSettings)
    return found


def _of_settings(extra: Mapping[str, Any], kind: type[CacheSettings]) -> list[str]:
    try:
        parse_settings(extra, kind)
    except ValueError as error:
        return [str(error)]
    return []


def _as_mapping(config: Any) -> Mapping[str, Any]:
    return config if isinstance(config, Mapping) else vars(config)


def _of_connector(name: str, module: str) -> list[str]:
    there = module == connectors.__name__ and name in connectors.__all__
    return [] if there else [f"there is no connector {name} in {module}"]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_one_that_exists(page: str) -> None:
    found = commands((ROOT / page).read_text())
    assert {words[0] for words in found} >= {"mmcache", "vllm"}
    assert {" ".join(words): wrong(words) for words in found if wrong(words)} == {}


def test_the_check_of_commands_can_fail() -> None:
    text = """```sh
A=1 mmcache serve --memry 1GiB &
mmcache server  # no such command
vllm serve m --prot 8000
vllm serve m --kv-transfer-config '{"kv_connector": "X", "kv_connector_module_path": "y",
  "kv_role": "kv_both", "kv_connector_extra_config": {"ulr": "mmcache://127.0.0.1"}}'
vllm serve m --kv-transfer-config '{"kv_connector": "X", "kv_role": "kv_booth"}'
python examples/ask.py --imagine x; python examples/vllm/none.py
make coffee
```
"""
    found = [wrong(words) for words in commands(text)]
    assert [len(one) for one in found] == [1, 1, 1, 2, 1, 1, 1, 1]
    said = [" ".join(one) for one in found]
    wanted = ["--memry", "server", "--prot", "'ulr'", "kv_booth", "--imagine", "none.py", "make"]
    assert [word for word, one in zip(wanted, said, strict=True) if word not in one] == []


# ---------------------------------------------------------------------------------------------------------- compose
def misfits(text: str) -> list[str]:
    """What is wrong with a compose file."""
    return compose_complaints(text, EXAMPLES, ["vllm", "serve"], wrong)


def test_the_compose_file_fits_together() -> None:
    text = (EXAMPLES / "compose.yaml").read_text()
    assert misfits(text) == []
    assert "unix:///run/mmcache/shard.sock" in text


@pytest.mark.parametrize(
    ("part", "other", "said"),
    [
        ("--memory", "--memry", "No such option"),
        ('"url"', '"ulr"', "'ulr'"),
        ("127.0.0.1:8002:", "8002:", "is open to others"),
        ("    test:", "    tests:", "no health check"),
        ("  models:\n", "", "no volume models"),
        ("    cache:\n      condition", "    cash:\n      condition", "no service cash"),
        ("      COPY kernels /src/kernels\n", "", "kernels is not copied"),
        ("context: ../..", "context: ..", "there is no pyproject.toml"),
        ("- socket:/run/mmcache\n  ", "- socket:/run/other\n  ", "is on no volume"),
    ],
)
def test_the_check_of_the_compose_file_can_fail(part: str, other: str, said: str) -> None:
    text = (EXAMPLES / "compose.yaml").read_text()
    assert part in text
    assert said in "\n".join(misfits(text.replace(part, other)))


# ---------------------------------------------------------------------------------------------------------- offline
@pytest.mark.full
def test_the_offline_example_runs(tmp_path: Path) -> None:
    """Twice: in the second process mmcache has all of the prompts the first time."""
    cached = []
    with Cache() as cache:
        for _ in range(2):
            script = [sys.executable, str(EXAMPLES / "offline.py"), str(made("text")), "--url", cache.url]
            environment = {**ENVIRONMENT, "PYTHONPATH": f"{ROOT}:{ROOT / 'connectors'}", "PATH": "/usr/bin:/bin"}
            done = subprocess.run(script, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-4000:]
            cached.append(
                [int(line.split(": ")[1].split()[0]) for line in done.stdout.splitlines() if "cached" in line]
            )
    shared = cached[0][0]  # the prompts begin alike: the second and third of the first round find the first's blocks
    assert 0 < shared < cached[0][1]
    assert cached == [[shared, *cached[0][1:2] * 2], cached[0][1:2] * 3]
