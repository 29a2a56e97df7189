"""The commands in examples/vllm and docs/vllm.md: every flag and every setting in them is one that exists.

`mmcache` commands go through our command line's parser, `vllm serve` through the installed vLLM's, what stands in their
JSON through vLLM's configuration classes and our settings. The compose file cannot run here (Docker, GPUs), so it is
read: what its services run is held to the same, and its parts must fit each other. offline.py runs as it stands.
"""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

import mmcache_connectors.vllm as connectors
from mmcache.cli import app
from mmcache.config import parse_url
from mmcache_connectors.vllm.settings import CacheSettings, EncoderSettings, Settings, parse_settings
from tests.engines.vllm.harness import ENVIRONMENT, Cache, made
from tests.engines.vllm.models import ROOT

# vLLM, imported here, warns of its own dependencies.
pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning", "default::UserWarning")
EXAMPLES = ROOT / "examples" / "vllm"
PAGES = ("examples/vllm/README.md", "docs/vllm.md")
OTHERS = {"pip", "docker"}  # not ours to check
FENCE = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """Every command of every shell block of a page, as words; without what sets variables, and without `&`."""
    found: list[list[str]] = []
    for block in FENCE.findall(text):
        lexer = shlex.shlex(re.sub(r"(?m)(^|\s)#.*$", "", block), posix=True, punctuation_chars="&;|\n")
        lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
        words: list[str] = []
        for word in [*lexer, "\n"]:
            if set(word) <= set("&;|\n"):
                found += [words] if words else []
                words = []
            elif words or not re.match(r"\w+=", word):
                words.append(word)
    return found


@cache
def _vllm_parser() -> Any:
    importlib.import_module("vllm.config")
    arguments = importlib.import_module("vllm.utils.argparse_utils")
    cli = importlib.import_module("vllm.entrypoints.launchers.cli_args")
    return cli.make_arg_parser(arguments.FlexibleArgumentParser(exit_on_error=False))


def complaints(words: list[str]) -> list[str]:
    """What is wrong with one command."""
    program, *arguments = words
    if program == "mmcache":
        return _of_mmcache(arguments)
    if program == "vllm":
        return _of_vllm(arguments[1:]) if arguments[:1] == ["serve"] else [f"vllm {arguments[:1]} is not checked"]
    if program == "python":
        return _of_script(arguments)
    return [] if program in OTHERS else [f"{program} is not a command this test knows"]


def _of_mmcache(arguments: list[str]) -> list[str]:
    command: Any = typer.main.get_command(app)
    name = "mmcache"
    while arguments and hasattr(command, "commands"):
        if arguments[0] not in command.commands:
            return [f"{name} has no command {arguments[0]}"]
        name, command, arguments = arguments[0], command.commands[arguments[0]], arguments[1:]
    try:
        parsed = command.make_context(name, list(arguments))
    except Exception as error:
        return [f"mmcache {name}: {error}"]
    url = parsed.params.get("url")
    if url:
        parse_url(url)
    return []


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


def _of_script(arguments: list[str]) -> list[str]:
    path = ROOT / arguments[0]
    if not path.is_file():
        return [f"there is no {arguments[0]}"]
    told = subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True, check=True).stdout
    flags = [word for word in arguments[1:] if word.startswith("--")]
    return [f"{arguments[0]} has no {flag}" for flag in flags if not re.search(rf"(?<!\S){flag}\b", told)]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_one_that_exists(page: str) -> None:
    found = commands((ROOT / page).read_text())
    assert {words[0] for words in found} >= {"mmcache", "vllm"}
    assert {" ".join(words): complaints(words) for words in found if complaints(words)} == {}


def test_the_check_of_commands_can_fail() -> None:
    text = """```sh
A=1 mmcache serve --memry 1GiB &
mmcache server  # no such command
vllm serve m --prot 8000
vllm serve m --kv-transfer-config '{"kv_connector": "X", "kv_connector_module_path": "y",
  "kv_role": "kv_both", "kv_connector_extra_config": {"ulr": "mmcache://127.0.0.1"}}'
vllm serve m --kv-transfer-config '{"kv_connector": "X", "kv_role": "kv_booth"}'
python examples/vllm/ask.py --imagine x; python examples/vllm/none.py
make coffee
```
"""
    found = [complaints(words) for words in commands(text)]
    assert [len(one) for one in found] == [1, 1, 1, 2, 1, 1, 1, 1]
    said = [" ".join(one) for one in found]
    wanted = ["--memry", "server", "--prot", "'ulr'", "kv_booth", "--imagine", "none.py", "make"]
    assert [word for word, one in zip(wanted, said, strict=True) if word not in one] == []


# ---------------------------------------------------------------------------------------------------------- compose
def compose_complaints(text: str) -> list[str]:
    """What is wrong with a compose file: commands, services and volumes that are named, sockets, published ports."""
    yaml = importlib.import_module("yaml")
    file = yaml.safe_load(text)
    services, found = file["services"], []
    mounts = {name: dict(volume.split(":") for volume in one["volumes"]) for name, one in services.items()}
    for name, one in services.items():
        words = one["command"] if one["command"][0] == "mmcache" else ["vllm", "serve", *one["command"]]
        found += [f"{name}: {why}" for why in complaints(words)]
        found += _unhealthy(name, one)
        found += _not_copied(name, one["build"])
        found += [f"{name}: no volume {volume}" for volume in mounts[name] if volume not in file["volumes"]]
        found += [f"{name}: no service {other}" for other in one.get("depends_on", {}) if other not in services]
        found += [f"{name}: {port} is open to others" for port in one.get("ports", []) if not port.startswith("127.")]
        for path in re.findall(r"(?:mmcache\+unix://|^)(/\S+/\w+\.sock)", "\n".join(one["command"]), re.MULTILINE):
            if str(Path(path).parent) not in mounts[name].values():
                found.append(f"{name}: {path} is on no volume")
    sockets = {target for one in mounts.values() for volume, target in one.items() if volume == "socket"}
    return found + ([] if len(sockets) == 1 else [f"the socket is at {sorted(sockets)}"])


def _not_copied(name: str, build: Mapping[str, str]) -> list[str]:
    """What a build copies and is not there, or installs and was not copied."""
    lines = [line.split() for line in build["dockerfile_inline"].splitlines()]
    copied = [path for words in lines if words[0] == "COPY" for path in words[1:-1]]
    folder = EXAMPLES / build["context"]
    needed = {"pyproject.toml", "README.md", "LICENSE", "mmcache", "connectors", "kernels"}
    return [f"{name}: there is no {path}" for path in copied if not (folder / path).exists()] + [
        f"{name}: {path} is not copied" for path in sorted(needed - set(copied))
    ]


def _unhealthy(name: str, service: Mapping[str, Any]) -> list[str]:
    test = service.get("healthcheck", {}).get("test", [])
    if test[:1] != ["CMD"] or len(test) < 2:
        return [f"{name}: no health check"]
    return [f"{name}: {why}" for why in complaints(test[1:])] if test[1] == "mmcache" else []


def test_the_compose_file_fits_together() -> None:
    text = (EXAMPLES / "compose.yaml").read_text()
    assert compose_complaints(text) == []
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
    assert said in "\n".join(compose_complaints(text.replace(part, other)))


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
