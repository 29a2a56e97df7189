"""MMCacheKVConnector: what vLLM calls. Every method hands on to the scheduler's or the worker's side.

vLLM lets an exception from a connector end the engine, so none leaves here once the engine has started: it is logged,
and the answer is the one of an empty cache. What is wrong with the settings or the model is an error at start.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import weakref
from collections.abc import Sequence
from typing import Any, Final

import torch
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from vllm.distributed.parallel_state import get_pp_group, get_tp_group

import mmcache
from mmcache_connectors.paged import PagedGroup
from mmcache_connectors.vllm.engine import Engine, EngineFacts
from mmcache_connectors.vllm.facts import worker_facts
from mmcache_connectors.vllm.guard import log_as_vllm_does, never_raises
from mmcache_connectors.vllm.identities import shared_identities
from mmcache_connectors.vllm.lookup import STORED_LAYOUT, Namespaces
from mmcache_connectors.vllm.messages import Dropped, StepJobs, WorkerFacts
from mmcache_connectors.vllm.metrics import CacheProm, CacheStats, StatsReporter
from mmcache_connectors.vllm.plan import Job
from mmcache_connectors.vllm.scheduler import SchedulerSide
from mmcache_connectors.vllm.settings import Settings, parse_settings
from mmcache_connectors.vllm.worker import GroupMemory, WorkerSide

log = logging.getLogger("mmcache.vllm")
FLUSH_S: Final = 10.0  # at shutdown, for blocks that wait to be stored
# Requests that ended. Under vLLM's MultiConnector only one connector may say something of a request under one name, or
# the engine ends.
_TOLD: Final[weakref.WeakSet[Any]] = weakref.WeakSet()


class MMCacheKVConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """KV blocks by content, shared by every engine that reaches the same cache. Settings: settings.py."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        log_as_vllm_does()
        settings = parse_settings(self._kv_transfer_config.kv_connector_extra_config, Settings)
        self._engine = Engine(vllm_config, kv_cache_config)
        self._load_async = _load_async(settings, self._engine)
        self._settings = settings
        self._stats = StatsReporter()
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._worker_facts: dict[str, str] | None = None
        self._idle_step = False
        self._media: dict[str, Any] = {}  # by request: the features its workers are to have, see _send_media
        self._layer_numbers: dict[str, int] = {}
        deadline_s = settings.lookup_s if role == KVConnectorRole.SCHEDULER else settings.load_s
        self._client = mmcache.connect(settings.url, deadline_s=deadline_s, lazy=True)
        reads = self._kv_transfer_config.is_kv_consumer
        # One line in the log for a change: the scheduler asks first, unless it never asks.
        self._client.announces = reads == (role == KVConnectorRole.SCHEDULER)
        if role == KVConnectorRole.SCHEDULER:
            self._start_scheduler(vllm_config)

    def _start_scheduler(self, vllm_config: Any) -> None:
        config = self._kv_transfer_config
        if config.kv_load_failure_policy != "recompute":
            config.kv_load_failure_policy = "recompute"  # read by the scheduler after this: a failure is a miss
        self._facts = EngineFacts(vllm_config, self._engine, self._settings)
        self._scheduler = SchedulerSide(
            self._settings,
            self._engine.parts(),
            Namespaces(self._facts.get, kind="kv", layout=STORED_LAYOUT, block_size=self._engine.block_tokens),
            shared_identities(vllm_config),
            self._client,
            block_tokens=self._engine.block_tokens,
            reads=config.is_kv_consumer,
            writes=config.is_kv_producer,
            load_async=self._load_async,
            save_blocks_per_step=max(1, (self._settings.save_buffer_mib << 20) // self._engine.block_nbytes),
            evict=self._evict,
        )

    @property
    def requires_kv_delivery(self) -> bool:
        """False: a block that is not saved is a miss some day, nothing more."""
        return False

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        """Each layer's block in one piece, where the attention backend leaves the choice; any other is served too."""
        return "LBHNC"

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Synchronous loads arrive layer by layer, and a whole graph's replay would not wait for them."""
        return extra_config.get("load_mode") == "sync"

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> CacheStats:
        """The form in which vLLM's log and metrics take the counts."""
        return CacheStats(data=dict(data or {}))

    @classmethod
    def build_prom_metrics(cls, *args: Any) -> CacheProm:
        """The form in which vLLM's /metrics takes them."""
        return CacheProm(*args)

    def counters(self) -> dict[str, int]:
        """What this side has counted since the start, with the client's own counts."""
        side = self._scheduler.counters if self._scheduler else self._worker.snapshot() if self._worker else {}
        return {**{f"client_{name}": count for name, count in dict(self._client.counters).items()}, **dict(side)}

    @never_raises(lambda: None)
    def get_kv_connector_stats(self) -> CacheStats | None:
        """Counts since the last step."""
        return self._stats.report(self.counters(), self._worker.take_times() if self._worker else {})

    # ------------------------------------------------------------------ scheduler side
    @never_raises(lambda: None)
    def on_new_request(self, request: Any) -> None:
        """Begin to identify the request's content."""
        assert self._scheduler is not None
        self._scheduler.new_request(request)

    @never_raises(lambda: (0, False))
    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens that can be loaded beyond those computed; None: ask again in the next step."""
        assert self._scheduler is not None
        return self._scheduler.matched(request, num_computed_tokens)

    @never_raises(lambda: None)
    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Plan the load for which the engine has made room."""
        assert self._scheduler is not None
        if request.mm_features and (num_external_tokens or self._engine.workers == 1):
            self._media[request.request_id] = request.mm_features
        self._scheduler.allocated(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> StepJobs:
        """This step's loads, and saves of the blocks it completes."""
        assert self._scheduler is not None
        loads = self._scheduler.take_loads()  # promised: they must reach the workers, whatever else fails
        self._send_media(scheduler_output.scheduled_new_reqs)
        return StepJobs(loads, self._plan_saves(scheduler_output))

    @never_raises(lambda: None)
    def _send_media(self, new_requests: Sequence[Any]) -> None:
        """Have workers get what they must encode once blocks are gone that held it: a synchronous load failed, or the
        request was preempted and neither the engine nor the cache has them any more.

        vLLM leaves out what a hit covers, once and for all, and ends when it is needed after all (0.32:
        multimodal/utils.py, strip_covered_mm_data). It costs a copy to each worker, but for a single one, so with
        several it is done only where the hit was ours.
        """
        for new in new_requests:
            if whole := self._media.pop(new.req_id, None):
                new.mm_features = list(whole)

    @never_raises(list)
    def _plan_saves(self, scheduler_output: Any) -> list[Job]:
        assert self._scheduler is not None
        scheduled, cached = scheduler_output.num_scheduled_tokens, scheduler_output.scheduled_cached_reqs
        before = {one.req_id: one.num_computed_tokens for one in scheduler_output.scheduled_new_reqs}
        before |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        after = [(req_id, computed + scheduled[req_id]) for req_id, computed in before.items() if req_id in scheduled]
        return self._scheduler.plan_saves(after, self._block_ids)

    @never_raises(lambda: None)
    def update_connector_output(self, connector_output: Any) -> None:
        """Note which loads have ended and which failed."""
        assert self._scheduler is not None
        dropped = connector_output.kv_connector_worker_meta
        self._scheduler.worker_output(
            connector_output.finished_recving or (),
            connector_output.failed_recving or (),
            connector_output.invalid_block_ids or set(),
            dropped.first if isinstance(dropped, Dropped) else {},
            self._block_ids,
        )

    @never_raises(lambda: (False, None))
    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """The request's blocks may be freed at once: what is saved of them has been copied. With what the response says
        of the cache."""
        return False, self._finished(request)

    @never_raises(lambda: (False, None))
    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """As `request_finished_all_groups`, for an engine without the hybrid manager."""
        return False, self._finished(request)

    def _finished(self, request: Any) -> dict[str, Any] | None:
        assert self._scheduler is not None
        self._media.pop(request.request_id, None)
        told = self._scheduler.finished(request.request_id)
        if request in _TOLD:
            return None
        _TOLD.add(request)
        return told

    @never_raises(lambda: None)
    def set_xfer_handshake_metadata_pp_aware(self, metadata: dict[tuple[int, int], WorkerFacts]) -> None:
        """Every worker's facts."""
        self._facts.set_worker_facts([report.facts for report in metadata.values()])

    @never_raises(lambda: False)
    def reset_cache(self) -> bool:
        """Weights were changed in place: what was stored before is not found again, by this engine. False if blocks of
        the old weights are still in use: then nothing is cached until a reset finds none."""
        if self._scheduler is None:
            return True
        assert self._kv_cache_manager is not None
        pool = self._kv_cache_manager.block_pool
        clean = bool(pool.num_gpu_blocks - pool.get_num_free_blocks() == 1)  # the null block: as vLLM itself asks
        self._facts.new_epoch(clean=clean)
        self._scheduler.reset()
        return clean

    def _evict(self, block_ids: set[int]) -> None:
        assert self._kv_cache_manager is not None
        self._kv_cache_manager.evict_blocks(block_ids)

    def _block_ids(self, request_id: str) -> Sequence[Sequence[int]]:
        assert self._kv_cache_manager is not None
        return self._kv_cache_manager.get_block_ids(request_id)  # type: ignore[no-any-return]

    # ------------------------------------------------------------------ worker side
    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """At start: take hold of the paged memory. Raises for a memory layout that cannot be served."""
        tp_rank, pp_rank = get_tp_group().rank_in_group, get_pp_group().rank_in_group
        memory = []
        for group in self._engine.groups:
            layers = [kv_caches[name] for name in group.layer_names if name in kv_caches]
            paged = PagedGroup(layers, num_blocks=self._engine.num_blocks, block_tokens=self._engine.block_tokens)
            memory.append(GroupMemory(paged, *self._engine.part_of(group, tp_rank, pp_rank)))
            if len(self._engine.groups) == 1:  # of several, loads are asynchronous
                held = [name for name in group.layer_names if name in kv_caches]
                self._layer_numbers = {name: number for number, name in enumerate(held)}
        self._worker = WorkerSide(self._settings, self._client, memory)
        self._worker_facts = worker_facts(self._vllm_config, list(kv_caches))
        atexit.register(self.shutdown)

    def get_handshake_metadata(self) -> WorkerFacts | None:
        """What this worker computes blocks with, for the namespace."""
        return None if self._worker_facts is None else WorkerFacts(self._worker_facts)

    @never_raises(lambda: None)
    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Start this step's loads; synchronous ones are done on return."""
        self._idle_step = forward_context.attn_metadata is None
        if self._worker is not None and self.has_connector_metadata():
            self._worker.start_loads(self._get_connector_metadata().loads, asynchronous=self._load_async)

    @never_raises(lambda: None)
    def wait_for_layer_load(self, layer_name: str) -> None:
        """Have the engine's device wait for this layer of synchronous loads; others have ended before."""
        if self._worker is not None and layer_name in self._layer_numbers:
            self._worker.pass_layer(self._layer_numbers[layer_name])

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: whole blocks of all layers are copied once the step is computed."""

    @never_raises(lambda: None)
    def wait_for_save(self) -> None:
        """Copy the blocks this step completed out of the paged memory; they are stored in the background."""
        if self._worker is not None and self.has_connector_metadata():
            self._worker.end_layers()
            self._worker.save(self._get_connector_metadata().saves)

    @never_raises(KVConnectorTransferResults)
    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Loads that have ended since the last step."""
        if self._worker is None:
            return KVConnectorTransferResults()
        received, failed = self._worker.take_results(idle=self._idle_step)
        return KVConnectorTransferResults(finished_recving=received, failed_recving=failed)

    @never_raises(lambda: None)
    def build_connector_worker_meta(self) -> Dropped | None:
        """What found no room on its way out, so that it is tried again."""
        dropped = self._worker.take_dropped() if self._worker is not None else {}
        return Dropped(dropped) if dropped else None

    @never_raises(set)
    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks that hold nothing valid."""
        return self._worker.take_invalid() if self._worker is not None else set()

    @never_raises(lambda: None)
    def shutdown(self) -> None:
        """Store what waits to be stored, for a few seconds at most, and close."""
        atexit.unregister(self.shutdown)
        if self._worker is not None and not self._worker.flush(FLUSH_S):
            log.warning("mmcache: some blocks could not be stored within %.0f s of shutdown", FLUSH_S)
        if self._scheduler is not None:
            self._scheduler.close(self._settings.lookup_s)
        self._client.close()


# vLLM's MultiConnector looks the classes of its connectors' counts up by name, and the engine ends if it finds none.
with contextlib.suppress(ValueError):  # registered before
    KVConnectorFactory.register_connector("MMCacheKVConnector", "mmcache_connectors.vllm", "MMCacheKVConnector")


def _load_async(settings: Settings, engine: Engine) -> bool:
    """Synchronous loads are safe only where the one worker that sees a failure is the one that would save its results,
    and where the failure is known before the next step begins; elsewhere loads are asynchronous."""
    if settings.load_mode == "async":
        return True
    if engine.workers == 1 and len(engine.groups) == 1 and engine.one_step_at_a_time:
        return False
    log.warning(
        "mmcache: load_mode=sync needs one worker, one KV group and --no-async-scheduling; loads are asynchronous here"
    )
    return True
