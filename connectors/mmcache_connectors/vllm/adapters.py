"""Which weights a LoRA adapter holds: a digest by content, and no answer where the engine may hold other weights.

vLLM loads an adapter once for each lora_int_id and keeps it, whatever happens to the files. Retrained weights under the
same name and path were seen to hit the old ones' blocks, so neither is an identity. Imports no vLLM.
"""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mmcache.errors import KeyInputError
from mmcache.identity import directory_digest
from mmcache_connectors.vllm.weights import Signature, hub_snapshot, stat_signature

log = logging.getLogger("mmcache.vllm")

MAX_ADAPTERS: Final = 16_384


@dataclass(slots=True)
class _Seen:
    """One lora_int_id at its first request; `digest` None: the engine may hold weights that are not known."""

    path: str
    signature: tuple[Path, Signature]
    digest: str | None


class AdapterIdentities:
    """Digests of adapters by lora_int_id. Thread-safe. Remembers 16,384 ids; later ones are not cached."""

    def __init__(self, max_adapters: int = MAX_ADAPTERS) -> None:
        self._max_adapters = max_adapters
        self._seen: dict[int, _Seen] = {}
        self._digests: dict[tuple[Path, Signature], str] = {}  # at most one for each id seen
        self._lock = threading.Lock()
        self._full = False

    def identity(self, lora_int_id: int, path: str) -> str | None:
        """ "b3:" and a digest of the adapter's files; None: do not cache this request.

        `path` is resolved as vLLM does: a folder, else a repository in the local Hugging Face cache. The first call for
        new files reads them whole (milliseconds for each 10 MB), later calls cost one stat a file. None from then on
        for an id whose files, or path, are no longer those of its first call: the engine may hold either. Call it
        before the engine loads the adapter, and `unchanged` before storing. What happened to the files of an adapter that
        was loaded before its first request cannot be seen here. Raises nothing.
        """
        try:
            with self._lock:
                return self._identity(lora_int_id, path)
        except (KeyInputError, OSError, ValueError) as error:
            with self._lock:
                self._forbid(lora_int_id, path, f"its files cannot be read ({error})")
            return None

    def unchanged(self, lora_int_id: int) -> bool:
        """Whether `identity`, which was given for this id before, still holds. One stat a file, and no waiting."""
        seen = self._seen.get(lora_int_id)
        if seen is None or seen.digest is None:
            return False
        folder, signature = seen.signature
        try:
            return stat_signature(folder) == signature
        except KeyInputError:
            return False

    def _identity(self, lora_int_id: int, path: str) -> str | None:
        seen = self._seen.get(lora_int_id)
        if seen is not None and seen.digest is None:
            return None
        folder = _local_folder(path)
        if folder is None:
            self._forbid(lora_int_id, path, "no local folder holds it")
            return None
        signature = (folder, stat_signature(folder))
        if seen is not None:
            if (seen.path, seen.signature) != (path, signature):
                self._forbid(lora_int_id, path, "its files changed after its first request")
            return seen.digest
        if len(self._seen) >= self._max_adapters:
            if not self._full:
                self._full = True
                log.warning("more than %d adapters: requests of new ones are not cached", self._max_adapters)
            return None
        digest = self._digests.get(signature) or directory_digest(folder)
        if (folder, stat_signature(folder)) != signature:
            self._forbid(lora_int_id, path, "its files changed while they were read")
            return None
        self._digests[signature] = digest
        self._seen[lora_int_id] = _Seen(path, signature, digest)
        return digest

    def _forbid(self, lora_int_id: int, path: str, why: str) -> None:
        """From now on None for this id, said once. Ids beyond the limit stay unknown, which is None as well."""
        seen = self._seen.get(lora_int_id)
        if seen is not None and seen.digest is not None:
            seen.digest = None
        elif seen is None and len(self._seen) < self._max_adapters:
            self._seen[lora_int_id] = _Seen(path, (Path(), ()), None)
        else:
            return
        log.warning(
            "requests of LoRA adapter %d (%s) are not cached: %s. Load complete files under a new lora_int_id",
            lora_int_id,
            path,
            why,
        )


def _local_folder(path: str) -> Path | None:
    """Where vLLM looks (vllm/lora/utils.py, get_adapter_absolute_path): a folder, else the Hugging Face hub."""
    folder = Path(os.path.abspath(os.path.expanduser(path)))
    if folder.is_dir():
        return folder
    if os.path.isabs(path) or path.startswith("~") or folder.exists():
        return None
    snapshot = hub_snapshot(path, None, "adapter_config.json")
    return snapshot.resolve() if snapshot is not None else None
