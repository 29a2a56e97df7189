"""The engine this connector runs in: its groups, its parts, its facts, as the rest of the connector wants them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Final

from vllm.distributed.utils import get_pp_indices

from mmcache.errors import ConfigError
from mmcache.keyset import Part
from mmcache_connectors.vllm.facts import config_facts
from mmcache_connectors.vllm.groups import Group, Parts, all_parts, groups_fact, rank_part, read_groups
from mmcache_connectors.vllm.identities import shared_identities
from mmcache_connectors.vllm.settings import Settings

log = logging.getLogger("mmcache.vllm")
START_WAIT_S: Final = 2.0  # for the weights' digest; a larger model's is ready later, and nothing is cached until then


class Engine:
    """Read once at start. Raises ConfigError, with the remedy, for what cannot be cached."""

    def __init__(self, vllm_config: Any, kv_cache_config: Any) -> None:
        parallel = vllm_config.parallel_config
        if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
            raise ConfigError(
                "context parallelism cuts a block's tokens over ranks, which this connector does not store yet; start "
                "without it, or without --kv-transfer-config"
            )
        self.tp_size: int = parallel.tensor_parallel_size
        self.pp_size: int = parallel.pipeline_parallel_size
        self.block_tokens: int = vllm_config.cache_config.block_size
        self._layers_total: int = vllm_config.model_config.get_total_num_hidden_layers()
        heads = vllm_config.model_config.get_total_num_kv_heads()
        self.groups: tuple[Group, ...] = read_groups(kv_cache_config, self.block_tokens, self.tp_size, heads)
        if self.pp_size > 1 and len(self.groups) > 1:
            raise ConfigError(
                "several KV groups over pipeline stages are not stored yet; start with --pipeline-parallel-size 1, or "
                "without --kv-transfer-config"
            )
        self.specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
        self.num_blocks: int = kv_cache_config.num_blocks
        layers = [len(group.layer_names) for group in self.groups]
        pages = [spec.page_size_bytes * count for spec, count in zip(self.specs, layers, strict=True)]
        self.block_nbytes: int = sum(pages)  # of all groups, in one worker
        self.one_step_at_a_time = vllm_config.max_concurrent_batches == 1
        self.workers: int = self.tp_size * self.pp_size

    def parts(self) -> Parts:
        """Every part of a block, over all ranks."""
        return all_parts(self.groups, self.tp_size, [self._stage(rank) for rank in range(self.pp_size)])

    def part_of(self, group: Group, tp_rank: int, pp_rank: int) -> tuple[Part, bool]:
        """(the part of a block of `group` that one rank holds, whether it stores it)."""
        return rank_part(group, len(self.groups), tp_rank, self.tp_size, self._stage(pp_rank))

    def _stage(self, pp_rank: int) -> tuple[int, int, int] | None:
        if self.pp_size == 1:
            return None
        first, stop = get_pp_indices(self._layers_total, pp_rank, self.pp_size)
        return first, stop, self._layers_total


class EngineFacts:
    """Everything but content that decides a block's bytes, as namespace facts: see facts.py, weights.py and groups.py.

    Complete once the workers have said what they compute with, and the weights have a digest.
    """

    def __init__(self, vllm_config: Any, engine: Engine, settings: Settings) -> None:
        self._config = config_facts(vllm_config)
        self._groups = groups_fact(engine.groups, engine.specs)
        self._dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
        self._extra = {f"user.{name}": text for name, text in settings.extra_facts.items()}
        self._epoch = settings.weights_epoch
        self._named_epoch = bool(settings.weights_epoch)
        self._worker: Mapping[str, str] | None = None
        self._said_why = self._suspended = False
        self._shared = shared_identities(vllm_config)
        self._weights = self._shared.weights(vllm_config, settings.model_identity)
        self._weights.ready(START_WAIT_S)

    def set_worker_facts(self, reports: list[Mapping[str, str]]) -> None:
        """What the workers reported: pipeline stages may add to each other. Nothing is cached if they do not agree."""
        merged = {name: text for report in reports for name, text in report.items()}
        odd = sorted({name for report in reports for name, text in report.items() if merged[name] != text})
        if odd:
            log.warning("mmcache: the workers compute blocks in different ways (%s): nothing is cached", ", ".join(odd))
        elif reports:
            self._worker = merged

    def new_epoch(self, *, clean: bool) -> None:
        """The weights were updated in place; an epoch that the operator named stays as it is. Unless the engine is
        `clean` of blocks of the old weights, nothing is cached until it was reset when it was."""
        if not self._named_epoch:
            self._epoch = self._shared.new_epoch()
        self._suspended = not clean
        if self._suspended:
            log.warning(
                "mmcache: the cache was reset while blocks of the old weights are in use: nothing is cached from now "
                "on; reset again when no request runs"
            )

    def get(self) -> Mapping[str, object] | None:
        """The facts, or None, with the reason logged once, while they are not complete."""
        weights = self._weights.ready(0.0)
        if self._suspended:
            return None
        if weights is None or self._worker is None:
            if not self._said_why:
                self._said_why = True
                reading = self._weights.error or "the model's files are still being read"
                why = "the workers have not reported what they compute with" if weights else reading
                log.warning("mmcache: nothing is cached yet: %s", why)
            return None
        facts: dict[str, object] = {"engine": "vllm", "model": weights, "dtype": self._dtype, "kv_groups": self._groups}
        facts |= {**self._config, **self._worker, **self._extra}
        return facts | ({"weights_epoch": self._epoch} if self._epoch else {})
