"""`MMCacheHiCacheStorage`: SGLang's HiCache keeps its pages in mmcache. Loaded by SGLang's "dynamic" storage backend.

SGLang calls from two background threads, and takes False, None or 0 for pages it has to compute. Once made, no method
raises, and no call to the cache takes longer than the deadline; transfer.py cuts batches into calls. Interface as of
SGLang 0.5.23.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, PoolTransferResult

import mmcache
from mmcache.errors import ConfigError
from mmcache.keys import Keys, Namespace
from mmcache.transport.base import Outcome
from mmcache_connectors.sglang import hooks
from mmcache_connectors.sglang.engine import Pages, check_start, describe_pages, media_transport, untold_media
from mmcache_connectors.sglang.pages import by_page, in_page_order, page_keys
from mmcache_connectors.sglang.settings import parse_settings
from mmcache_connectors.sglang.transfer import read_pages, write_pages
from mmcache_connectors.sglang.trust import TRUST
from mmcache_connectors.sglang.weights import ChangedFiles

log = logging.getLogger("mmcache.sglang")
T = TypeVar("T")


class MMCacheHiCacheStorage(HiCacheStorage):  # type: ignore[misc]
    """HiCache's third tier in an mmcache server: interface v1, and the page-by-page one before it.

    Settings that cannot be taken, pools whose pages cannot be reached, and an engine that was started without it raise
    ConfigError when it is made; a server that does not answer is only warned of.
    """

    def __init__(self, storage_config: Any, kwargs: Any = None) -> None:
        extra: dict[str, Any] = storage_config.extra_config or {}
        self._config, self._settings = storage_config, parse_settings(extra)
        self._v1 = bool(extra.get("interface_v1", 0))
        self._passes_prefix = check_start(type(self))
        self._pages: Pages | None = None
        self._faults: set[str] = set()
        hooks.install()
        settings = self._settings
        self._cache = mmcache.connect(settings.url, lazy=True, deadline_s=settings.deadline_s, verify=settings.verify)
        untold = untold_media()
        if untold is not None:
            TRUST.end(untold)
        if media_transport() not in (None, "cpu"):
            log.warning(
                "mmcache: media come to the scheduler as %s, which for some models only the model opens; the first of "
                "these ends the caching: use --mm-feature-transport cpu",
                media_transport(),
            )
        if not self._passes_prefix:
            log.warning(
                'mmcache: set "hicache_storage_pass_prefix_keys": true, so that a prompt\'s pages stay together'
            )

    # ------------------------------------------------------------------------------------------ what SGLang registers

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Take the host pool whose pages are stored, and name them. Raises ConfigError, KeyInputError."""
        super().register_mem_pool_host(mem_pool_host)
        if not mem_pool_host.layer_num:
            TRUST.end("this process holds no layers whose pages could be cached")
        if TRUST.reason is not None:
            return
        try:
            self._pages = describe_pages(self._config, mem_pool_host, self._settings.model_identity)
        except ChangedFiles as error:
            TRUST.end(str(error))
            return
        if self._v1:
            _check_pool(mem_pool_host)
        log.info("mmcache: pages go to %s as namespace %s", self._settings.url, self._namespace(self._v1).id.hex())
        self._ask_once()

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """Take a model's further pools (sliding windows, states): not cached yet, so neither is such a model."""
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        if host_pool_name != "kv":
            TRUST.end(f"this model has pages of more than one kind ({host_pool_name}), which cannot be cached yet")

    # ------------------------------------------------------------------------------------------ interface v1

    def batch_exists(self, keys: Sequence[str], extra_info: Any = None) -> int:
        """How many leading pages are stored."""
        return self._run(lambda: self._cache.match_prefix(self._keys(keys, extra_info, self._v1)), 0)

    def batch_get_v1(self, keys: Sequence[str], host_indices: Any, extra_info: Any = None) -> list[bool]:
        """Read pages into the host pool; True for each that is there. What others hold then is undefined."""

        def read() -> list[bool]:
            return read_pages(self._cache, self._keys(keys, extra_info, True), self._places(host_indices, len(keys)))

        return self._run(read, [False] * len(keys))

    def batch_set_v1(self, keys: Sequence[str], host_indices: Any, extra_info: Any = None) -> list[bool]:
        """Store pages of the host pool; True for each that is stored now."""

        def write() -> list[bool]:
            return write_pages(self._cache, self._keys(keys, extra_info, True), self._places(host_indices, len(keys)))

        return self._run(write, [False] * len(keys))

    # ------------------------------------------------------------------------------------------ page by page

    def exists(self, key: str) -> bool:
        """Whether one page is stored."""
        return self.batch_exists([key]) == 1

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Any:
        """Read one page into `target_location`, a flat tensor; returns it, or None."""
        return self.batch_get([key], [target_location])[0]

    def batch_get(self, keys: Sequence[str], target_locations: Any = None, target_sizes: Any = None) -> list[Any]:
        """As `get` for each; None for those that are not there."""

        def read() -> list[Any]:
            found = read_pages(self._cache, self._keys(keys, None, False), target_locations)
            return [target if there else None for target, there in zip(target_locations, found, strict=True)]

        return self._run(read, [None] * len(keys))

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        """Store one page, a tensor; whether it is stored now."""
        return self.batch_set([key], [value])

    def batch_set(
        self, keys: Sequence[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        """Store pages, a tensor each; whether all are stored now."""
        return self._run(lambda: all(write_pages(self._cache, self._keys(keys, None, False), [*values])), False)

    # ------------------------------------------------------------------------------------------ further pools: misses

    def batch_exists_v2(self, keys: Sequence[str], pool_transfers: Any = None, extra_info: Any = None) -> Any:
        """Nothing is there of a model with several kinds of pages."""
        return PoolTransferResult.empty()

    def batch_get_v2(self, transfers: Sequence[Any], extra_info: Any = None) -> dict[str, list[bool]]:
        """Nothing is read of a model with several kinds of pages."""
        return {transfer.name: [False] * len(transfer.keys or ()) for transfer in transfers}

    def batch_set_v2(self, transfers: Sequence[Any], extra_info: Any = None) -> dict[str, list[bool]]:
        """Nothing is stored of a model with several kinds of pages."""
        return self.batch_get_v2(transfers, extra_info)

    # ------------------------------------------------------------------------------------------ administration

    def clear(self) -> None:
        """Nothing goes: the cache is shared, and no page in it can be wrong for another engine."""
        log.warning("mmcache: the cache is shared and stays as it is; pages leave when others need their place")

    def close(self) -> None:
        """Close this client's connections; what is stored stays."""
        self._cache.close()

    # ------------------------------------------------------------------------------------------ inside

    def _namespace(self, v1: bool) -> Namespace:
        assert self._pages is not None, "SGLang registers the pool before it asks"
        return self._pages.buffers if v1 else self._pages.flat

    def _keys(self, hashes: Sequence[str], extra_info: Any, v1: bool) -> Keys:
        prefix = getattr(extra_info, "prefix_keys", None)
        if prefix is None and extra_info is not None and self._passes_prefix:
            prefix = []  # SGLang passes None for "no pages before these"
        namespace = self._namespace(v1)
        return page_keys(namespace, self._pages.part, hashes, prefix)  # type: ignore[union-attr]

    def _places(self, host_indices: Any, pages: int) -> list[list[Any]]:
        pointers, sizes = self.mem_pool_host.get_page_buffer_meta(host_indices)
        return by_page([_bytes_at(*place) for place in zip(pointers, sizes, strict=True)], pages)

    def _ask_once(self) -> None:
        """Have it said now, and not at the first request, that no server answers or that it refuses this client."""
        assert self._pages is not None
        key = page_keys(self._namespace(self._v1), self._pages.part, ["00" * 32], None)
        (result,) = self._cache.get_into(key, [bytearray(1)])
        if result.outcome is Outcome.UNAVAILABLE and self._cache.answering:  # else the client has said so
            log.warning("mmcache: %s", result.reason)

    def _run(self, work: Callable[[], T], missed: T) -> T:
        """`work()`, or `missed` if it fails or its keys cannot be trusted; what fails again is said once."""
        if TRUST.reason is not None:
            return missed
        try:
            return work()
        except Exception as error:
            if type(error).__name__ not in self._faults:
                self._faults.add(type(error).__name__)
                log.exception("mmcache: a call failed inside the connector; it counts as a miss, and so will others")
            return missed


def _bytes_at(pointer: int, nbytes: int) -> Any:
    """A writable view of this process's memory; valid as long as the pool, which outlives the backend."""
    memory: Any = (ctypes.c_uint8 * nbytes).from_address(pointer)
    return np.frombuffer(memory, np.uint8)


def _check_pool(pool: Any) -> None:
    """Raises ConfigError unless the pool says where its pages lie."""
    import torch

    size = pool.page_size
    try:
        pages = torch.arange(2 * size).split(size)
        pointers, *alone = [[*zip(*pool.get_page_buffer_meta(at), strict=True)] for at in (torch.cat(pages), *pages)]
        by_page(pointers, len(pages))
        if not in_page_order(pointers, alone):
            raise ValueError("they do not come page after page")
    except Exception as error:
        raise ConfigError(
            f"the pages of a {type(pool).__name__} with layout {pool.layout!r} cannot be reached ({error!r}); "
            "use --hicache-mem-layout page_first_direct"
        ) from error
