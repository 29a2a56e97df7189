"""Which weights an engine loaded: a name by content, and whether the files still are what the engine read.

The backend is made after SGLang has loaded its weights, so a digest is of the files as they are now. It stands for what
was loaded only if no file has changed since the process began. Reads files; knows SGLang's arguments by name.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from mmcache.errors import ConfigError
from mmcache.identity import commit_identity, directory_digest, file_digest

REMEDY: Final = (
    'give "model_identity" (docs/sglang.md): any text that changes when a file of the model does, such as '
    "repository@commit"
)
# Formats whose weights come from elsewhere than the files `model_path` names. Source: LoadFormat in SGLang 0.5.23.
FROM_ELSEWHERE: Final = ("ipc_cache", "private", "rdma", "remote", "remote_instance")


class ChangedFiles(Exception):
    """Files may not be what the engine loaded; the message names one, and the remedy."""


class Contents:
    """Digests of files and folders that have not changed since `since_s` (Unix time); each is read once."""

    def __init__(self, since_s: float) -> None:
        self._since_ns = int(since_s * 1e9)
        self._known: dict[str, str] = {}

    def digest(self, path: str) -> str:
        """ "b3:..." of a file or folder. Raises ChangedFiles if any of it changed since, KeyInputError."""
        place = os.path.realpath(path)
        if place not in self._known:
            before = _changes(place)
            digest = directory_digest(place) if os.path.isdir(place) else file_digest(place)
            after = _changes(place)
            for name in sorted(before.keys() | after.keys()):
                if before.get(name) != after.get(name) or after[name] > self._since_ns:
                    raise ChangedFiles(
                        f"{name} changed after this engine began to start, so it may have loaded something else; "
                        f"restart the engine, or {REMEDY}"
                    )
            self._known[place] = digest
        return self._known[place]


def _changes(place: str) -> dict[str, int]:
    """When (ns, Unix time) each file and folder changed last, contents or place; links are followed."""
    names = [place]
    for folder, folders, files in os.walk(place, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names += [os.path.join(folder, name) for name in (*folders, *files) if not name.startswith(".")]
    found = {}
    for name in names:
        try:
            found[name] = os.stat(name).st_ctime_ns
        except OSError:  # gone meanwhile, or a link to nothing: reading it will say so, if it counts
            found[name] = -1
    return found


def process_start_s() -> float:
    """When this process began, Unix time, to 10 ms. Linux: field 22 of /proc/self/stat, see proc(5)."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    ticks = int(fields[19])
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))


def model_identity(values: Mapping[str, Any], given: str, contents: Contents) -> str:
    """Which weights: `given` if set, else repository and commit where all files are the Hugging Face cache's own links,
    else a digest of the files.

    `values` are SGLang's arguments by name. Reads every byte of any other model. Raises ConfigError if nothing local
    can tell, ChangedFiles if the files are not what was loaded.
    """
    if given:
        return given
    path, form = str(values["model_path"]), str(values["load_format"])
    if form in FROM_ELSEWHERE or values["weight_cache_mode"] != "off":
        way = f"--load-format {form}, --weight-cache-mode {values['weight_cache_mode']}"
        raise ConfigError(f"the weights come from elsewhere than {path!r} ({way}); {REMEDY}")
    return weights_of(path, values["revision"], values["download_dir"], contents)


def weights_of(path: str, revision: str | None, download_dir: str | None, contents: Contents) -> str:
    """Which weights a folder, file or repository holds, as `model_identity` says it; raises the same."""
    if not os.path.exists(path):
        folder = None if download_dir else _snapshot(path, revision)
        if folder is None:
            raise ConfigError(f"cannot tell which weights {path!r} stands for; {REMEDY}")
        path = folder
    return commit_identity(Path(path)) or contents.digest(path)


def _snapshot(repository: str, revision: str | None) -> str | None:
    """The folder of a repository in the local Hugging Face cache, which SGLang downloads to; None if not there."""
    from huggingface_hub import try_to_load_from_cache

    try:
        file = try_to_load_from_cache(repository, "config.json", revision=revision)
    except ValueError:  # no name of a repository
        return None
    return os.path.dirname(file) if isinstance(file, str) else None
