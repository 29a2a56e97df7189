"""Which weights an engine loads: an identity by content, computed beside the engine's own start.

A path is no identity, as other weights can be put under it. Local files are named by a digest of their contents,
repositories of the Hugging Face Hub by their commit. Duck-typed over vLLM's configuration; imports no vLLM.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mmcache.errors import KeyInputError
from mmcache.identity import commit_identity, directory_digest, file_digest

log = logging.getLogger("mmcache.vllm")

Signature = tuple[tuple[str, int, int, int], ...]  # (name, nbytes, mtime in ns, inode) of every file, by name

_REPOSITORY: Final = re.compile(r"[\w.-]+(/[\w.-]+)?")
_REMEDY: Final = (
    'set "model_identity" in kv_connector_extra_config to a text that names these weights and no others, such as a '
    "repository with its commit"
)


@dataclass(frozen=True, slots=True)
class ModelSource:
    """What a loader is told: `model` is a folder, a file, or a repository id; `ranks` is tp x pp of the engine."""

    model: str
    revision: str | None = None
    load_format: str = "auto"
    seed: int = 0
    ranks: str = "1x1"


def model_sources(vllm_config: Any) -> tuple[ModelSource, ...]:
    """The target model's source, then the draft model's where speculation loads one (its KV lies in the same blocks).

    `model_weights` wins over `model`: vLLM sets it when it pulled from object storage and `model` is a local copy of
    the configuration alone.
    """
    parallel = vllm_config.parallel_config
    ranks = f"{parallel.tensor_parallel_size}x{parallel.pipeline_parallel_size}"

    def source(model: Any, load: Any) -> ModelSource:
        return ModelSource(model.model_weights or model.model, model.revision, str(load.load_format), model.seed, ranks)

    sources = [source(vllm_config.model_config, vllm_config.load_config)]
    speculative = vllm_config.speculative_config
    draft = getattr(speculative, "draft_model_config", None)
    if draft is not None:
        sources.append(source(draft, getattr(speculative, "draft_load_config", None) or vllm_config.load_config))
    return tuple(sources)


def model_identity(source: ModelSource, name: str | None = None) -> str:
    """`name` if given, else "repo@<40 hex>" for a whole snapshot of the Hugging Face cache, else a digest ("b3:").

    Reads every byte of a local model: a minute for a large one. Random weights (load_format "dummy") are not the
    folder's and depend on how they are cut, so they add the seed and the ranks. Raises KeyInputError with the remedy
    when nothing local tells which weights these are, or they changed while they were read.
    """
    identity = name or _content_identity(source.model, source.revision)
    if source.load_format == "dummy":
        return f"dummy seed={source.seed} ranks={source.ranks} of {identity}"
    return identity


def _content_identity(model: str, revision: str | None) -> str:
    path = Path(model).expanduser()
    if path.is_file():
        return _unchanged_digest(path)
    if not path.is_dir():
        snapshot = hub_snapshot(model, revision, "config.json")
        if snapshot is None:
            raise KeyInputError(f"cannot tell which weights {model!r} names: nothing local has them; {_REMEDY}")
        path = snapshot
    return commit_identity(path) or _unchanged_digest(path)


def _unchanged_digest(path: Path) -> str:
    before = stat_signature(path)
    identity = directory_digest(path) if path.is_dir() else file_digest(path)
    if stat_signature(path) != before:
        raise KeyInputError(f"{path} changed while it was read; restart the engine when its files are complete")
    return identity


def hub_snapshot(repository: str, revision: str | None, file: str) -> Path | None:
    """The folder of the local Hugging Face cache that holds `file` of this repository; None if there is none.

    Asks no server. `revision` None is "main", as it was when it was fetched last.
    """
    if not _REPOSITORY.fullmatch(repository):
        return None
    try:
        from huggingface_hub import try_to_load_from_cache  # type: ignore[import-not-found,unused-ignore]

        found = try_to_load_from_cache(repository, file, revision=revision)
    except Exception as error:  # not installed, or a name the hub refuses
        log.debug("no Hugging Face snapshot of %s: %s", repository, error)
        return None
    return Path(found).parent if isinstance(found, str) else None


def stat_signature(path: Path) -> Signature:
    """Names, sizes, times and inodes of all files at `path`, links followed. Costs one stat a file, reads none.

    Raises KeyInputError if one cannot be looked at: it may be on its way out.
    """
    try:
        if path.is_file():
            return (_signed(path, path.name),)
        places = os.walk(path, onerror=_raise)
        found = (os.path.join(top, name) for top, _folders, names in places for name in names)
        return tuple(sorted(_signed(Path(file), file) for file in found))
    except OSError as error:
        raise KeyInputError(f"cannot look at {error.filename}: {error.strerror}; check that it exists") from None


def _signed(file: Path, name: str) -> tuple[str, int, int, int]:
    stat = file.stat()
    return name, stat.st_size, stat.st_mtime_ns, stat.st_ino


def _raise(error: OSError) -> None:
    raise error


class WeightsIdentity:
    """The identity of an engine's weights, computed in a thread of its own while the engine loads them."""

    def __init__(self, vllm_config: Any, name: str | None = None) -> None:
        """`name` is the operator's name for all weights, a draft model's included: nothing is read then.

        Starts at once; the thread is a daemon and ends with the process. Raises nothing about the weights.
        """
        self._sources = model_sources(vllm_config)
        self._done = threading.Event()
        self._identity: str | None = None
        self._error: str | None = None
        threading.Thread(target=self._compute, args=(name,), name="mmcache-weights-identity", daemon=True).start()

    def ready(self, timeout_s: float = 0.0) -> str | None:
        """The identity, waiting for it up to `timeout_s`; None if it is not there yet or there is an `error`."""
        self._done.wait(timeout_s)
        return self._identity

    @property
    def error(self) -> str | None:
        """Why there will never be an identity, with the remedy; None while it is computed and when it is there."""
        return self._error

    def _compute(self, name: str | None) -> None:
        try:
            sources = self._sources[:1] if name else self._sources
            self._identity = " + draft ".join(model_identity(source, name) for source in sources)
        except KeyInputError as error:
            self._error = str(error)
        except Exception as error:  # whatever it is, the engine goes on without a cache
            self._error = f"{type(error).__name__}: {error}; {_REMEDY}"
        finally:
            self._done.set()
