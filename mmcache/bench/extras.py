"""What the workloads of `mmcache bench` need beyond the base install, imported only when a benchmark runs.

Everything else of the command line, its --help included, works without.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from mmcache.errors import ConfigError

REMEDY = "needs the bench extra: pip install 'mmcache[bench]' (in a clone: make demo)"


def load(name: str, command: str = "") -> Any:
    """The module `name`. Raises ConfigError, with what to install, if it cannot be imported."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"{_remedy(command)}; {error}") from error


def folder(name: str, command: str = "") -> Path:
    """Where the package `name` is installed; it is not imported. Raises ConfigError, with what to install."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"{_remedy(command)}; there is no {name}")
    return Path(spec.submodule_search_locations[0])


def check(command: str) -> None:
    """Raise ConfigError, with what to install, unless everything that `mmcache bench COMMAND` needs is there."""
    for name in {"media": ["av"], "serve": ["aiohttp"]}.get(command, []):
        load(name, command)
    load("PIL.Image", command)
    folder("skimage", command)


def _remedy(command: str) -> str:
    return f"`mmcache bench{' ' if command else ''}{command}` {REMEDY}"
