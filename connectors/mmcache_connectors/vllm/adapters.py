"""Which weights a LoRA adapter holds: a digest by content, and no answer where the engine may hold other weights.

vLLM loads an adapter once for each lora_int_id and keeps it, whatever happens to the files. Its own prefix cache tells
adapters apart by name and path (0.32, v1/core/kv_cache_utils.py), its encoder cache by name: retrained weights under
the same ones were seen to be answered with the old ones' blocks. So neither is an identity. Imports no vLLM.
"""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mmcache.errors import KeyInputError
from mmcache.identity import directory_digest
from mmcache_connectors.vllm.weights import Signature, hub_snapshot, stat_signature

log = logging.getLogger("mmcache.vllm")

MAX_ADAPTERS: Final = 16_384


@dataclass(slots=True)
class _Seen:
    """One lora_int_id at its first request; `digest` None: the engine may hold weights that are not known."""

    name: str
    path: str
    signature: tuple[Path, Signature]
    digest: str | None


class AdapterIdentities:
    """Digests of adapters by lora_int_id. Thread-safe. Remembers 16,384 ids; later ones are not cached.

    A name that stood for two contents stands for none: vLLM's own prefix and encoder caches go by name and path, so
    they answer the second with what the first computed, and none of that may be stored.
    """

    def __init__(self, max_adapters: int = MAX_ADAPTERS) -> None:
        self._max_adapters = max_adapters
        self._seen: dict[int, _Seen] = {}
        self._names: dict[str, str | None] = {}  # name -> its one digest; None: it is not trusted
        self._digests: dict[tuple[Path, Signature], str] = {}  # at most one for each id seen
        self._lock = threading.Lock()
        self._full = False

    def identity(self, lora_int_id: int, name: str, path: str) -> str | None:
        """ "b3:" and a digest of the adapter's files; None: do not cache this request.

        `path` is resolved as vLLM does: a folder, else a repository in the local Hugging Face cache. The first call for
        new files reads them whole (milliseconds for each 10 MB), later calls cost one stat a file. None from then on
        for an id whose files, path or name are no longer those of its first call, and for every id of a name that had
        two contents. Call it before the engine loads the adapter, and `unchanged` before storing. What happened to the
        files of an adapter that was loaded before its first request cannot be seen here. Raises nothing.
        """
        seen = self._seen.get(lora_int_id)
        if seen is not None and seen.digest is None:
            return None
        try:
            folder = _local_folder(path)
            if folder is None:
                self._refuse(lora_int_id, name, path, "no local folder holds it")
                return None
            signature = (folder, stat_signature(folder))
            digest = self._digests.get(signature) or directory_digest(folder)
            if (folder, stat_signature(folder)) != signature:
                self._refuse(lora_int_id, name, path, "its files changed while they were read")
                return None
        except (KeyInputError, OSError, ValueError) as error:
            self._refuse(lora_int_id, name, path, f"its files cannot be read ({error})")
            return None
        return self._admit(lora_int_id, _Seen(name, path, signature, digest), digest)

    def of_request(self, request: Any) -> str | None:
        """The namespace's fact for a vLLM request: '' without an adapter; None: do not cache it."""
        lora = request.lora_request
        if lora is None:
            return ""
        identity = self.identity(lora.lora_int_id, lora.lora_name, lora.lora_path)
        return None if identity is None else identity + (" 3d" if lora.is_3d_lora_weight else "")

    def unchanged(self, lora_int_id: int) -> bool:
        """Whether `identity`, which was given for this id before, still holds. One stat a file, and no waiting."""
        seen = self._seen.get(lora_int_id)
        if seen is None or seen.digest is None or self._names.get(seen.name) != seen.digest:
            return False
        folder, signature = seen.signature
        try:
            return stat_signature(folder) == signature
        except KeyInputError:
            return False

    def _admit(self, lora_int_id: int, now: _Seen, digest: str) -> str | None:
        with self._lock:
            seen = self._seen.get(lora_int_id)
            if seen is None and len(self._seen) >= self._max_adapters:
                if not self._full:
                    self._full = True
                    log.warning("more than %d adapters: requests of new ones are not cached", self._max_adapters)
                return None
            if seen is None:
                self._seen[lora_int_id] = now
                self._digests[now.signature] = digest
            elif seen.digest is None:
                return None
            elif (seen.name, seen.path, seen.signature) != (now.name, now.path, now.signature):
                self._forbid(lora_int_id, now.name, now.path, "its files, path or name changed after its first request")
                return None
            if self._names.setdefault(now.name, digest) != digest:
                self._forbid(lora_int_id, now.name, now.path, "its name stood for other weights before")
                return None
            return digest

    def _refuse(self, lora_int_id: int, name: str, path: str, why: str) -> None:
        with self._lock:
            self._forbid(lora_int_id, name, path, why)

    def _forbid(self, lora_int_id: int, name: str, path: str, why: str) -> None:
        """From now on None for this id and its name, said once. Ids beyond the limit stay unknown: None as well."""
        if name in self._names or len(self._names) < self._max_adapters:
            self._names[name] = None
        seen = self._seen.get(lora_int_id)
        if seen is not None and seen.digest is not None:
            seen.digest = None
        elif seen is None and len(self._seen) < self._max_adapters:
            self._seen[lora_int_id] = _Seen(name, path, (Path(), ()), None)
        else:
            return
        log.warning(
            "requests of LoRA adapter %d (%s, %s) are not cached: %s. Load complete files under a new name",
            lora_int_id,
            name,
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
