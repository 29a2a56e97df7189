"""Checks of the commands in examples/ and docs/ that every engine's suite makes: what a page's shell blocks say, and
what a compose file's services run. Each suite adds its engine's own command."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import typer

from mmcache.cli import app
from mmcache.config import parse_url

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
OTHERS = {"pip", "docker"}  # not ours to check
Complaints = Callable[[list[str]], list[str]]


def commands(text: str) -> list[list[str]]:
    """Every command of every shell block of a page, as words; without what sets variables, and without `&`."""
    found: list[list[str]] = []
    for block in FENCE.findall(text):
        block = re.sub(r"(?m)(^|\s)#.*$", "", block).replace("\\\n", " ")
        lexer = shlex.shlex(block, posix=True, punctuation_chars="&;|\n")
        lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
        words: list[str] = []
        for word in [*lexer, "\n"]:
            if set(word) <= set("&;|\n"):
                found += [words] if words else []
                words = []
            elif words or not re.match(r"\w+=", word):
                words.append(word)
    return found


def complaints(words: list[str], program: str, of_engine: Complaints) -> list[str]:
    """What is wrong with one command; `of_engine` says it of the arguments of `PROGRAM serve`."""
    name, *arguments = words
    if name == "mmcache":
        return _of_mmcache(arguments)
    if name == program:
        return of_engine(arguments[1:]) if arguments[:1] == ["serve"] else [f"{name} {arguments[:1]} is not checked"]
    if name == "python":
        return _of_script(arguments)
    return [] if name in OTHERS else [f"{name} is not a command this test knows"]


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
    if isinstance(url, str) and url:
        parse_url(url)
    return []


def _of_script(arguments: list[str]) -> list[str]:
    path = ROOT / arguments[0]
    if not path.is_file():
        return [f"there is no {arguments[0]}"]
    told = subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True, check=True).stdout
    flags = [word for word in arguments[1:] if word.startswith("--")]
    return [f"{arguments[0]} has no {flag}" for flag in flags if not re.search(rf"(?<!\S){flag}\b", told)]


# ---------------------------------------------------------------------------------------------------------- compose
def compose_complaints(text: str, folder: Path, engine: list[str], wrong: Complaints) -> list[str]:
    """What is wrong with a compose file of `folder`: commands, services and volumes that are named, sockets, ports.

    A service that does not run mmcache runs `engine` with its words; `wrong` says what is wrong with a command.
    """
    yaml = importlib.import_module("yaml")
    file = yaml.safe_load(text)
    services, found = file["services"], []
    mounts = {name: dict(volume.split(":") for volume in one["volumes"]) for name, one in services.items()}
    for name, one in services.items():
        words = one["command"] if one["command"][0] == "mmcache" else [*engine, *one["command"]]
        found += [f"{name}: {why}" for why in wrong(words)]
        found += [f"{name}: {why}" for why in _unhealthy(one, wrong)]
        found += [f"{name}: {why}" for why in _not_copied(folder, one["build"])]
        found += [f"{name}: no volume {volume}" for volume in mounts[name] if volume not in file["volumes"]]
        found += [f"{name}: no service {other}" for other in one.get("depends_on", {}) if other not in services]
        found += [f"{name}: {port} is open to others" for port in one.get("ports", []) if not port.startswith("127.")]
        for path in re.findall(r"(?:mmcache\+unix://|^)(/\S+/\w+\.sock)", "\n".join(one["command"]), re.MULTILINE):
            if str(Path(path).parent) not in mounts[name].values():
                found.append(f"{name}: {path} is on no volume")
    sockets = {target for one in mounts.values() for volume, target in one.items() if volume == "socket"}
    return found + ([] if len(sockets) == 1 else [f"the socket is at {sorted(sockets)}"])


def _not_copied(folder: Path, build: Mapping[str, str]) -> list[str]:
    """What a build copies and is not there, or installs and was not copied."""
    lines = [line.split() for line in build["dockerfile_inline"].splitlines()]
    copied = [path for words in lines if words[0] == "COPY" for path in words[1:-1]]
    needed = {"pyproject.toml", "README.md", "LICENSE", "mmcache", "connectors", "kernels"}
    return [f"there is no {path}" for path in copied if not (folder / build["context"] / path).exists()] + [
        f"{path} is not copied" for path in sorted(needed - set(copied))
    ]


def _unhealthy(service: Mapping[str, Any], wrong: Complaints) -> list[str]:
    test = service.get("healthcheck", {}).get("test", [])
    if test[:1] != ["CMD"] or len(test) < 2:
        return ["no health check"]
    return wrong(test[1:]) if test[1] == "mmcache" else []
