"""MMCacheECConnector: what vLLM calls for its encoder cache. Every method hands on to the scheduler's or worker's side.

As for KV (connector.py): no exception leaves here once the engine has started, and what fails is a miss. What is wrong
with the settings is an error at start.
"""

from __future__ import annotations

import atexit
import logging
from typing import Any, Final

import torch
from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorBase, ECConnectorRole
from vllm.distributed.ec_transfer.ec_connector.utils import PlaceholderMetadataResolver
from vllm.distributed.parallel_state import get_tp_group

import mmcache
from mmcache_connectors.vllm.ec_facts import EncoderFacts
from mmcache_connectors.vllm.ec_messages import EncoderMetrics, EncoderStats, StepItems, WorkerReport
from mmcache_connectors.vllm.ec_names import Namer
from mmcache_connectors.vllm.ec_scheduler import EncoderScheduler
from mmcache_connectors.vllm.ec_shared import SharedNames
from mmcache_connectors.vllm.ec_worker import EncoderWorker
from mmcache_connectors.vllm.guard import log_as_vllm_does, never_raises
from mmcache_connectors.vllm.identities import shared_identities
from mmcache_connectors.vllm.metrics import StatsReporter
from mmcache_connectors.vllm.settings import EncoderSettings, parse_settings
from mmcache_connectors.vllm.shelf import Shelf

log = logging.getLogger("mmcache.vllm")
FLUSH_S: Final = 10.0  # at shutdown, for embeddings that wait to be stored
LOCAL: Final = ("uni", "mp", None)  # executors whose workers all run on the scheduler's machine


class MMCacheECConnector(ECConnectorBase):  # type: ignore[misc]
    """Encoder outputs by content, shared by every engine that reaches the same cache. Settings: settings.py."""

    def __init__(self, vllm_config: Any, role: ECConnectorRole) -> None:
        super().__init__(vllm_config, role)
        log_as_vllm_does()
        config = vllm_config.ec_transfer_config
        self._settings = parse_settings(config.ec_connector_extra_config, EncoderSettings)
        self._stats = StatsReporter()
        self._scheduler: EncoderScheduler | None = None
        self._worker: EncoderWorker | None = None
        self._client = mmcache.connect(self._settings.url, deadline_s=self._settings.deadline_s, lazy=True)
        self._client.announces = role == ECConnectorRole.SCHEDULER
        if vllm_config.model_config.is_encoder_decoder:
            log.warning("mmcache: vLLM has no encoder cache for encoder-decoder models: nothing of this one is cached")
        elif role == ECConnectorRole.SCHEDULER:
            self._start_scheduler(vllm_config)

    def _start_scheduler(self, vllm_config: Any) -> None:
        facts = EncoderFacts(vllm_config, self._settings)
        identities = shared_identities(vllm_config)
        items = identities.items(trust_uuids=self._settings.trust_media_uuids)
        vision = getattr(vllm_config.model_config.hf_config, "vision_config", None)
        shared = SharedNames(vllm_config, facts) if self._settings.shared_embeddings else None
        namer = Namer(facts, items, identities.adapters, getattr(vision, "patch_size", None), shared)
        self._scheduler = EncoderScheduler(
            self._settings,
            namer,
            self._client,
            Shelf(self._client, self._settings.load_buffer_mib << 20),
            reads=self.is_consumer and _workers_here(vllm_config.parallel_config),
            writes=self.is_producer,
            encodes_only=not self.is_consumer,
            steps_in_flight=vllm_config.max_concurrent_batches,
            placeholder_fields=PlaceholderMetadataResolver(vllm_config.model_config).fields_for,
        )

    @classmethod
    def build_ec_connector_stats(cls, data: dict[str, Any] | None = None) -> EncoderStats:
        """The form in which vLLM's log and metrics take the counts."""
        return EncoderStats(data=data or {})

    @classmethod
    def build_prom_metrics(cls, *arguments: Any) -> EncoderMetrics:
        """vllm:mmcache_encoder_..._total."""
        return EncoderMetrics(*arguments)

    def counters(self) -> dict[str, int]:
        """What this side has counted since the start; the scheduler's has the workers' as well."""
        side = self._scheduler or self._worker
        return side.snapshot() if side is not None else {}

    @never_raises(lambda: None)
    def get_ec_connector_stats(self) -> EncoderStats | None:
        """Counts since the last step, of the scheduler's side: a worker's come to it with its reports, as the V1 runner
        asks no worker for any."""
        stats = self._stats.report(self.counters(), {}) if self._scheduler is not None else None
        return EncoderStats(data=stats.data) if stats is not None else None

    # ------------------------------------------------------------------ scheduler side
    @never_raises(lambda: True)
    def ensure_cache_available(self, request: Any, num_computed_tokens: int) -> bool:
        """False while the request's items are being looked for: vLLM puts it off, and asks again in the next step."""
        return self._scheduler is None or self._scheduler.available(request, num_computed_tokens)

    @never_raises(lambda: False)
    def has_cache_item(self, identifier: str) -> bool:
        """Whether an item of the request asked about last need not be encoded."""
        return self._scheduler is not None and self._scheduler.has(identifier)

    @never_raises(set)
    def take_unavailable_requests(self) -> set[str]:
        """Requests that came without an embedding, as vLLM lets a client do here, and whose the cache does not have."""
        return self._scheduler.take_hopeless() if self._scheduler is not None else set()

    @never_raises(lambda: None)
    def update_state_after_alloc(self, request: Any, index: int) -> None:
        """The engine has made room for the item: load it, or store it once it is encoded."""
        if self._scheduler is not None:
            self._scheduler.allocated(request, index)

    @never_raises(lambda: None)
    def update_state_after_free(self, request: Any, index: int) -> None:
        """The engine is past the item: it may be dropped."""
        if self._scheduler is not None:
            self._scheduler.freed(request, index)

    @never_raises(StepItems)
    def build_connector_meta(self, scheduler_output: Any) -> StepItems:
        """This step's loads and saves."""
        return StepItems() if self._scheduler is None else StepItems(*self._scheduler.take_step())

    @never_raises(lambda: None)
    def update_connector_output(self, connector_output: Any) -> None:
        """A step has run."""
        report = connector_output.ec_connector_worker_meta
        if self._scheduler is not None and isinstance(report, WorkerReport):
            self._scheduler.step_done(report.step, report.counts)

    @never_raises(lambda: (False, None))
    def request_finished(self, request: Any) -> tuple[bool, dict[str, Any] | None]:
        """The request's embeddings may be freed at once: what is stored of them has been copied."""
        if self._scheduler is not None:
            self._scheduler.finished(request.request_id)
        return False, None

    # ------------------------------------------------------------------ worker side
    def _side(self) -> EncoderWorker | None:
        """The worker's side, made when first used: the engine's device is known by then."""
        if self._worker is None and self._connector_metadata is not None:
            rank = get_tp_group().rank_in_group
            device = get_tp_group().device
            self._worker = EncoderWorker(self._settings, self._client, device, stores=rank == 0)
            atexit.register(self.shutdown)
        return self._worker

    def start_load_caches(self, encoder_cache: dict[str, torch.Tensor], **kwargs: Any) -> None:
        """Put this step's embeddings into the engine's encoder cache."""
        side = self._side()
        if side is not None and isinstance(self._connector_metadata, StepItems):
            side.load(self._connector_metadata.loads, encoder_cache)

    @never_raises(lambda: None)
    def save_caches(self, encoder_cache: dict[str, torch.Tensor], mm_hash: str, **kwargs: Any) -> None:
        """Copy one item's embedding, if it is to be stored; it is stored in the background."""
        side = self._side()
        if side is not None and isinstance(self._connector_metadata, StepItems):
            save = self._connector_metadata.saves.get(mm_hash)
            if save is not None:
                side.save(save, encoder_cache[mm_hash])

    @never_raises(lambda: None)
    def build_connector_worker_meta(self) -> WorkerReport | None:
        """Which step has run, and what was counted since the last one."""
        if not isinstance(self._connector_metadata, StepItems):
            return None
        stats = self._stats.report(self._worker.snapshot() if self._worker is not None else {}, {})
        return WorkerReport(self._connector_metadata.step, stats.data if stats is not None else {})

    @never_raises(lambda: None)
    def shutdown(self) -> None:
        """Store what waits to be stored, for a few seconds at most, and close."""
        atexit.unregister(self.shutdown)
        if self._worker is not None and not self._worker.flush(FLUSH_S):
            log.warning("mmcache: some embeddings could not be stored within %.0f s of shutdown", FLUSH_S)
        if self._scheduler is not None:
            self._scheduler.close(self._settings.deadline_s)
        self._client.close()


def _workers_here(parallel: Any) -> bool:
    here = getattr(parallel, "nnodes", 1) == 1 and parallel.distributed_executor_backend in LOCAL
    if not here:
        log.warning(
            "mmcache: embeddings reach workers through memory of the scheduler's machine, and not all of these need be "
            "on it: none is loaded. Use --distributed-executor-backend mp on one node"
        )
    return here
