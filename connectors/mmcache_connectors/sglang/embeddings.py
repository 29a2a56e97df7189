"""`MMCacheEmbeddingStore`: SGLang's global encoder cache keeps its embeddings in mmcache. Made by SGLang's encoder.

SGLang has requests wait for its question what is there; it reads, and stores, from one background thread. It takes
False for what it has to encode. Once made, no method raises, and no call to the cache takes longer than the deadline.
When one has failed, requests are not made to wait again: what is stored in the background finds out when the cache
answers. Interface as of SGLang 0.5.23.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple

import torch
from sglang.srt.mem_cache.embedding_store import EmbeddingStore
from sglang.srt.runtime_context import get_parallel

import mmcache
from mmcache.keys import Key, Namespace, embedding_key
from mmcache.media import Media
from mmcache.transport.base import Outcome
from mmcache_connectors.sglang import encoder_items
from mmcache_connectors.sglang.encoder_facts import encoder_facts, shared_tower
from mmcache_connectors.sglang.encoder_memory import Pools
from mmcache_connectors.sglang.encoder_settings import environment_settings
from mmcache_connectors.sglang.encoder_shared import shared_picture
from mmcache_connectors.sglang.faults import Faults
from mmcache_connectors.sglang.pages import cuts
from mmcache_connectors.sglang.transfer import CALL_NBYTES
from mmcache_connectors.sglang.weights import ChangedFiles
from mmcache_connectors.shared_embeddings import shared_facts

log = logging.getLogger("mmcache.sglang")
ASK_AGAIN_S: Final = 30.0  # should nothing be stored that finds out


class Value(NamedTuple):
    """One embedding of a call: its place in the call, its name and key, and where in a pool it lies."""

    at: int
    name: str
    key: Key
    rows: list[torch.Tensor]


Move = Callable[[list[Value]], list[bool]]


class MMCacheEmbeddingStore(EmbeddingStore):  # type: ignore[misc]
    """Embeddings of a whole fleet's encoders in an mmcache server, `[tokens, width]` each, named by what the item is.

    Settings that cannot be taken, and a model whose weights cannot be told, raise ConfigError when it is made; a server
    that does not answer is only warned of. Names are those of encoder_items.py; what has another is not cached.
    """

    def __init__(self) -> None:
        self._settings = settings = environment_settings(os.environ)
        encoder_items.install()
        self._pools = Pools()
        self._facts: dict[str, Any] | None = None
        self._namespace: Namespace | None = None
        self._shared: Namespace | None = None  # of names that other kinds of engines use too
        self._faults = Faults()
        self._ask_at = 0.0
        self._cache = mmcache.connect(settings.url, lazy=True, deadline_s=settings.deadline_s, verify=settings.verify)
        if get_parallel().tp_rank:  # the first rank reads and stores for all
            return
        try:
            self._facts = encoder_facts(settings.model_identity)
        except ChangedFiles as error:
            log.error("mmcache: %s; this encoder stores and reads nothing", error)

    def register_buffer(self, tensor: torch.Tensor) -> None:
        """Take one of the host pools, `[tokens, width]`, that embeddings lie in. SGLang makes both before it asks."""
        self._pools.add(tensor)
        if self._facts is None or self._namespace is not None:
            return
        dtype = str(tensor.dtype).removeprefix("torch.")
        self._namespace = Namespace(kind="embedding", dtype=dtype, width=tensor.shape[1], **self._facts)
        log.info("mmcache: embeddings go to %s as namespace %s", self._settings.url, self._namespace.id.hex())
        if self._settings.shared_embeddings:
            self._share(self._facts["model"], dtype)
        self._ask_once(self._namespace)

    # ------------------------------------------------------------------------------------------ what SGLang calls

    def batch_get(self, hashes: list[str], ptrs: list[int], sizes: list[int]) -> list[bool]:
        """Read embeddings into a pool; True for each that is there. What the others' memory holds then is undefined."""
        return self.batch_get_into_multi_buffers(hashes, _each_alone(ptrs), _each_alone(sizes))

    def batch_put(self, hashes: list[str], ptrs: list[int], sizes: list[int]) -> list[bool]:
        """Store embeddings of a pool; True for each that is stored now."""
        return self.batch_put_from_multi_buffers(hashes, _each_alone(ptrs), _each_alone(sizes))

    def batch_get_into_multi_buffers(
        self, hashes: list[str], ptrs: list[list[int]], sizes: list[list[int]]
    ) -> list[bool]:
        """As `batch_get`, each embedding into several places, one after the other."""
        return self._faults.caught(lambda: self._move(hashes, ptrs, sizes, self._read), [False] * len(hashes))

    def batch_put_from_multi_buffers(
        self, hashes: list[str], ptrs: list[list[int]], sizes: list[list[int]]
    ) -> list[bool]:
        """As `batch_put`, each embedding from several places, one after the other."""
        return self._faults.caught(lambda: self._move(hashes, ptrs, sizes, self._write), [False] * len(hashes))

    def batch_is_exist(self, hashes: list[str]) -> list[bool]:
        """Which are stored. None, at once, while the cache is known not to answer."""

        def look() -> list[bool]:
            if time.monotonic() < self._ask_at:
                return [False] * len(hashes)
            keys = [self._key(name) for name in hashes]
            found = iter(self._cache.contains([key for key in keys if key is not None]))
            self._note_whether_it_answers()
            return [key is not None and next(found) for key in keys]

        return self._faults.caught(look, [False] * len(hashes))

    def get_key(self, mm_hash: str) -> str:
        """The key an embedding is stored under, in hex; "" if it is not cached."""
        key = self._key(mm_hash)
        return key.digest.hex() if key is not None else ""

    # ------------------------------------------------------------------------------------------ inside

    def _key(self, name: str) -> Key | None:
        item, namespace = encoder_items.digest_of(name), self._namespace
        if item is None:
            item, namespace = encoder_items.shared_digest_of(name), self._shared
        return embedding_key(namespace, item) if namespace is not None and item is not None else None

    def _move(self, names: list[str], ptrs: list[list[int]], sizes: list[list[int]], move: Move) -> list[bool]:
        """Move what has a key and lies in whole rows of a pool, in calls of bounded size."""
        values = []
        for at, (name, *memory) in enumerate(zip(names, ptrs, sizes, strict=True)):
            key, rows = self._key(name), self._pools.rows(*memory)
            if key is not None and rows:
                values.append(Value(at, name, key, rows))
        moved = [False] * len(names)
        for cut in cuts([sum(sizes[value.at]) for value in values], CALL_NBYTES):
            for value, there in zip(values[cut], move(values[cut]), strict=True):
                moved[value.at] = there
            self._note_whether_it_answers()
        return moved

    def _read(self, values: list[Value]) -> list[bool]:
        places = [value.rows[0] if len(value.rows) == 1 else _room_for(value.rows) for value in values]
        found = [bool(result) for result in self._cache.get_into([value.key for value in values], places)]
        for value, place, there in zip(values, places, found, strict=True):
            if there and len(value.rows) > 1:
                for piece, rows in zip(place.split([*map(len, value.rows)]), value.rows, strict=True):
                    rows.copy_(piece)
        return found

    def _write(self, values: list[Value]) -> list[bool]:
        once = list({value.name: value for value in values}.values())  # one picture may be shown twice
        results = self._cache.put(
            [value.key for value in once],
            [value.rows[0] if len(value.rows) == 1 else torch.cat(value.rows) for value in once],
            media=[Media(encoder_items.modality_of(value.name)) for value in once],
        )
        stored = {value.name: bool(result) for value, result in zip(once, results, strict=True)}
        return [stored[value.name] for value in values]

    def _share(self, model: str, dtype: str) -> None:
        """Name pictures as other kinds of engines do, if theirs are the same; before the first one comes."""
        tower, reason = shared_tower(model, dtype)
        if tower is None:
            log.warning("mmcache: shared_embeddings: nothing is shared with other kinds of engines: %s", reason)
            return
        self._shared = Namespace(kind="embedding", **shared_facts(tower))
        encoder_items.share(shared_picture)
        log.info("mmcache: pictures' embeddings are shared as namespace %s", self._shared.id.hex())

    def _ask_once(self, namespace: Namespace) -> None:
        """Have it said now, and not at the first picture, that no server answers or that it refuses this client."""
        (result,) = self._cache.get_into([embedding_key(namespace, bytes(32))], [bytearray(1)])
        if result.outcome is Outcome.UNAVAILABLE and self._cache.answering:  # else the client has said so
            log.warning("mmcache: %s", result.reason)
        self._note_whether_it_answers()

    def _note_whether_it_answers(self) -> None:
        self._ask_at = 0.0 if self._cache.answering else time.monotonic() + ASK_AGAIN_S


def _room_for(rows: list[torch.Tensor]) -> torch.Tensor:
    return rows[0].new_empty(sum(map(len, rows)), rows[0].shape[1])


def _each_alone(values: Iterable[int]) -> list[list[int]]:
    return [[value] for value in values]
