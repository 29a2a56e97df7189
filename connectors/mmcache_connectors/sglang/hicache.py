"""`MMCacheHiCacheStorage`: SGLang's HiCache keeps its pages in mmcache. Loaded by SGLang's "dynamic" storage backend.

SGLang calls from two background threads, and takes False, None or 0 for pages it has to compute. Once made, no method
raises, and no call to the cache takes longer than the deadline; transfer.py cuts batches into calls. Interface as of
SGLang 0.5.23.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, PoolTransferResult
from sglang.srt.observability.metrics_collector import StorageMetrics

import mmcache
from mmcache.transport.base import Outcome
from mmcache_connectors.sglang import hooks
from mmcache_connectors.sglang.engine import (
    check_start,
    describe_first,
    describe_further,
    media_transport,
    untold_media,
)
from mmcache_connectors.sglang.faults import Faults
from mmcache_connectors.sglang.pools import FirstPool
from mmcache_connectors.sglang.prefixes import SAID
from mmcache_connectors.sglang.settings import parse_settings
from mmcache_connectors.sglang.store import FIRST, PageStore
from mmcache_connectors.sglang.trust import TRUST
from mmcache_connectors.sglang.weights import ChangedFiles

log = logging.getLogger("mmcache.sglang")
T = TypeVar("T")


class MMCacheHiCacheStorage(HiCacheStorage):  # type: ignore[misc]
    """HiCache's third tier in an mmcache server: interface v1, the page-by-page one before it, v2 for further pools.

    Settings that cannot be taken, pools whose pages cannot be reached, and an engine that was started without it raise
    ConfigError when it is made; a server that does not answer is only warned of.
    """

    def __init__(self, storage_config: Any, kwargs: Any = None) -> None:
        extra: dict[str, Any] = storage_config.extra_config or {}
        self._config, self._settings = storage_config, parse_settings(extra)
        self._v1 = bool(extra.get("interface_v1", 0))
        says_prefix, self._wait = check_start(type(self))
        self._first: FirstPool | None = None
        self._pages: PageStore | None = None
        self._faults = Faults()
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
        SAID.set() if says_prefix else SAID.clear()  # of an attached one: until it says any
        if says_prefix is False:
            log.warning(
                'mmcache: set "hicache_storage_pass_prefix_keys": true, so that a prompt\'s pages stay together'
            )

    # ------------------------------------------------------------------------------------------ what SGLang registers

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Take the host pool whose pages are stored, and name them. Raises ConfigError, KeyInputError."""
        super().register_mem_pool_host(mem_pool_host)
        holds_pages = getattr(mem_pool_host, "kv_buffer", True) is not None
        if holds_pages and not mem_pool_host.layer_num:
            TRUST.end("this process holds no layers whose pages could be cached")
        if TRUST.reason is not None:
            return
        try:
            self._first = describe_first(self._config, mem_pool_host, self._settings.model_identity, self._v1)
        except ChangedFiles as error:
            TRUST.end(str(error))
            return
        self._pages = PageStore(self._cache, self._first, self._wait)
        space = self._first.buffers if self._v1 else self._first.flat
        log.info("mmcache: pages go to %s as namespace %s", self._settings.url, space.id.hex())
        self._ask_once()

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """Take a model's further pools (sliding windows, states, a draft model's), and name their pages."""
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        name = str(host_pool_name)
        if name == FIRST or self._first is None or self._pages is None or TRUST.reason is not None:
            return
        try:
            self._pages.further[name] = describe_further(self._config, self._first, host_pool, name)
        except Exception as error:
            TRUST.end(
                f"the pages of the pool {name!r}, a {type(host_pool).__name__}, cannot be reached ({error!r}); "
                "use --hicache-mem-layout page_first_direct"
            )

    def on_host_pools_registered(self) -> None:
        """All pools are known that the model starts with."""
        if self._pages is not None and self._pages.further:
            for name, pool in self._pages.further.items():
                log.info("mmcache: pages of the pool %s are in namespace %s", name, pool.namespace.id.hex())

    # ------------------------------------------------------------------------------------------ interface v1

    def batch_exists(self, keys: Sequence[str], extra_info: Any = None) -> int:
        """How many leading pages are stored."""
        prefix = self._prefix(extra_info)
        return self._run(lambda pages: pages.count_leading(keys, prefix, flat=not self._v1), 0)

    def batch_get_v1(self, keys: Sequence[str], host_indices: Any, extra_info: Any = None) -> list[bool]:
        """Read pages into the host pool; True for each that is there. What others hold then is undefined."""
        prefix = self._prefix(extra_info)
        return self._run(lambda pages: pages.read(keys, host_indices, prefix), [False] * len(keys))

    def batch_set_v1(self, keys: Sequence[str], host_indices: Any, extra_info: Any = None) -> list[bool]:
        """Store pages of the host pool; True for each that is stored now."""
        prefix = self._prefix(extra_info)
        return self._run(lambda pages: pages.write(keys, host_indices, prefix), [False] * len(keys))

    # ------------------------------------------------------------------------------------------ interface v2

    def batch_exists_v2(self, keys: Sequence[str], pool_transfers: Any = None, extra_info: Any = None) -> Any:
        """After how many pages the prompt can go on, each kind of pages by its own policy; one question for all."""
        prefix = self._prefix(extra_info)

        def ask(pages: PageStore) -> Any:
            lengths, reach = pages.find(keys, pool_transfers or (), prefix, flat=not self._v1)
            return PoolTransferResult(lengths[-1] if lengths else 0, reach, lengths)

        return self._run(ask, PoolTransferResult.empty())

    def batch_get_v2(self, transfers: Sequence[Any], extra_info: Any = None) -> dict[Any, list[bool]]:
        """Read pages of several pools in one request; for each pool True for each page that is there."""
        prefix = self._prefix(extra_info)
        return self._run(lambda pages: pages.read_all(transfers, prefix), _nothing(transfers))

    def batch_set_v2(self, transfers: Sequence[Any], extra_info: Any = None) -> dict[Any, list[bool]]:
        """Store pages of several pools in one request; for each pool True for each page that is stored now."""
        prefix = self._prefix(extra_info)
        return self._run(lambda pages: pages.write_all(transfers, prefix), _nothing(transfers))

    # ------------------------------------------------------------------------------------------ page by page

    def exists(self, key: str) -> bool:
        """Whether one page is stored."""
        return self.batch_exists([key]) == 1

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Any:
        """Read one page into `target_location`, a flat tensor; returns it, or None."""
        return self.batch_get([key], [target_location])[0]

    def batch_get(self, keys: Sequence[str], target_locations: Any = None, target_sizes: Any = None) -> list[Any]:
        """As `get` for each; None for those that are not there."""

        def read(pages: PageStore) -> list[Any]:
            found = pages.read_flat(keys, target_locations)
            return [target if there else None for target, there in zip(target_locations, found, strict=True)]

        return self._run(read, [None] * len(keys))

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        """Store one page, a tensor; whether it is stored now."""
        return self.batch_set([key], [value])

    def batch_set(
        self, keys: Sequence[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        """Store pages, a tensor each; whether all are stored now."""
        return self._run(lambda pages: all(pages.write_flat(keys, [*values])), False)

    # ------------------------------------------------------------------------------------------ administration

    def clear(self) -> None:
        """Nothing goes: the cache is shared, and no page in it can be wrong for another engine."""
        log.warning("mmcache: the cache is shared and stays as it is; pages leave when others need their place")

    def close(self) -> None:
        """Close this client's connections; what is stored stays."""
        self._cache.close()

    def get_stats(self) -> Any:
        """Pages and GB/s of each batch since the last time, as StorageMetrics; None without --enable-metrics."""
        if not self._config.enable_storage_metrics or self._pages is None:
            return None
        read, written = self._pages.moved.take()
        return StorageMetrics(read.pages, written.pages, read.gb_per_s, written.gb_per_s)

    # ------------------------------------------------------------------------------------------ inside

    def _prefix(self, extra_info: Any) -> Sequence[str] | None:
        """The pages before those of a call; None if SGLang does not say. It says None too where there are none."""
        prefix: Sequence[str] | None = getattr(extra_info, "prefix_keys", None)
        if prefix is not None:
            SAID.set()
        elif extra_info is not None and SAID.is_set():
            prefix = []
        return prefix

    def _ask_once(self) -> None:
        """Have it said now, and not at the first request, that no server answers or that it refuses this client."""
        assert self._first is not None
        (result,) = self._cache.get_into(self._first.names(["00" * 32], None), [bytearray(1)])
        if result.outcome is Outcome.UNAVAILABLE and self._cache.answering:  # else the client has said so
            log.warning("mmcache: %s", result.reason)

    def _run(self, work: Callable[[PageStore], T], missed: T) -> T:
        """`work`, or `missed` if it fails or its keys cannot be trusted."""
        if TRUST.reason is not None:
            return missed
        pages = self._pages
        assert pages is not None, "SGLang registers the pool before it asks"
        return self._faults.caught(lambda: work(pages), missed)


def _nothing(transfers: Sequence[Any]) -> dict[Any, list[bool]]:
    return {transfer.name: [False] * len(transfer.keys or ()) for transfer in transfers}
