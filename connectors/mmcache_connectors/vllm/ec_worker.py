"""A worker's side of the encoder cache: puts fetched embeddings into the engine, and stores what the encoder computed.

A load maps host memory that is complete and verified. A save is a copy of the encoder's output, made in the step and
stored after it; at most `save_buffer_mib` of copies wait, further ones are dropped and counted. Nothing of vLLM is
imported.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter
from typing import Any, Final

import torch

from mmcache.client.blocking import Client
from mmcache.errors import MMCacheError
from mmcache.transport.base import Outcome
from mmcache_connectors.audit import Likeness, compare
from mmcache_connectors.vllm.background import Background
from mmcache_connectors.vllm.ec_items import Load, Save
from mmcache_connectors.vllm.settings import EncoderSettings
from mmcache_connectors.vllm.shelf import mapped

log = logging.getLogger("mmcache.vllm")
ROOM_AGAIN: Final = 0.5  # of save_buffer_mib free


class EncoderWorker:
    """Loads and saves for one worker. `stores`: of workers that compute the same embeddings, one stores them."""

    def __init__(self, settings: EncoderSettings, client: Client, device: torch.device, *, stores: bool) -> None:
        self._client, self._device, self._stores = client, device, stores
        self._limit_nbytes = settings.save_buffer_mib << 20
        self._saver = Background("mmcache-encoder-save", 1)
        self._lock = threading.Lock()
        self._waiting_nbytes = 0
        self._dropping = self._odd = self._differed = False
        self.counters: Counter[str] = Counter()

    def load(self, loads: list[Load], encoder_cache: dict[str, torch.Tensor]) -> None:
        """Put embeddings where the engine looks for its encoder's outputs."""
        for one in loads:
            found = self._fetched(one)
            if self._device.type == "cuda":
                encoder_cache[one.name.identifier] = found.pin_memory().to(self._device, non_blocking=True)
            else:
                encoder_cache[one.name.identifier] = found.to(self._device, copy=True)

    def _fetched(self, load: Load) -> torch.Tensor:
        """What the scheduler's side fetched; should the system not let this process map it, what the cache has."""
        try:
            return mapped(load.place, load.name.form)
        except (OSError, ValueError):
            self._count(loads_unmapped=1)
            log.exception("mmcache: a worker cannot map what its scheduler fetched; it asks the cache itself")
        form = load.name.form
        own = torch.empty(form.shape, dtype=getattr(torch, form.dtype))
        (result,) = self._client.get_into([load.name.key], [own])
        if not result:
            raise RuntimeError(f"an embedding that was promised cannot be had: {result.reason or result.outcome}")
        return own

    def save(self, save: Save, output: torch.Tensor) -> None:
        """Copy what the encoder computed for one item, to be stored in the background."""
        if not self._stores:
            return
        form = save.name.form
        if tuple(output.shape) != form.shape or str(output.dtype) != f"torch.{form.dtype}":
            self._count(saves_odd=1)
            if not self._odd:
                self._odd = True
                log.warning(
                    "mmcache: the encoder's output is %s %s, where %s was expected: it is not stored",
                    output.dtype, tuple(output.shape), form,
                )  # fmt: skip
            return
        if not self._client.answering or not self._take_room(form.nbytes):
            self._count(saves_dropped=1)
            return
        copy, copied = self._copy(output)
        try:
            self._saver.submit(lambda: self._store(save, copy, copied))
        except RuntimeError:  # no more threads
            self._give_room(form.nbytes)
            self._count(saves_dropped=1)

    def _copy(self, output: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """(the host copy, an event after which it is complete, or None)."""
        if output.device.type != "cuda":
            return output.detach().to("cpu", copy=True).contiguous(), None
        copy = torch.empty(output.shape, dtype=output.dtype, pin_memory=True)
        copy.copy_(output.detach(), non_blocking=True)  # on the engine's stream: before anything may change the output
        return copy, torch.cuda.current_stream(output.device).record_event()

    def _store(self, save: Save, copy: torch.Tensor, copied: Any) -> None:
        try:
            if copied is not None:
                copied.synchronize()
            if save.audit:
                self._audit(save, copy)
            began_s = time.monotonic()
            (result,) = self._client.put([save.name.key], [copy], media=save.name.media)
            took_us = int((time.monotonic() - began_s) * 1e6)
            stored, present = result.outcome is Outcome.STORED, result.outcome is Outcome.PRESENT
            self._count(
                items_saved=int(stored), items_present=int(present), saves_refused=int(not result), save_us=took_us,
                saved_nbytes=save.name.form.nbytes if stored else 0,
            )  # fmt: skip
        finally:
            self._give_room(save.name.form.nbytes)

    def _audit(self, save: Save, computed: torch.Tensor) -> None:
        """Compare with what is stored, and drop that if it is another value; what was computed is stored then."""
        stored = torch.empty_like(computed, pin_memory=False)
        (result,) = self._client.get_into([save.name.key], [stored])
        if not result:
            return
        found = compare(stored[None], computed[None])
        differs = found.likeness is Likeness.DIFFERENT
        self._count(audits=1, audit_differences=int(differs))
        if not differs:
            return
        if not self._differed:
            self._differed = True
            log.warning(
                "mmcache: a stored embedding is not what the encoder computed (relative error %.2g): it is dropped, as "
                "are further ones without a word (audit_differences)", found.error,
            )  # fmt: skip
        with contextlib.suppress(MMCacheError):
            self._client.delete([save.name.key])

    def _take_room(self, nbytes: int) -> bool:
        with self._lock:
            room = self._waiting_nbytes + nbytes <= self._limit_nbytes
            self._waiting_nbytes += nbytes if room else 0
            half_free = self._waiting_nbytes <= ROOM_AGAIN * self._limit_nbytes
        if not room and not self._dropping:
            self._dropping = True
            log.warning(
                "mmcache: %d MiB of embeddings wait to be stored; further ones are dropped until there is room "
                "(save_buffer_mib)", self._limit_nbytes >> 20,
            )  # fmt: skip
        elif room and self._dropping and half_free:
            self._dropping = False
            log.warning("mmcache: embeddings are stored again")
        return room

    def _give_room(self, nbytes: int) -> None:
        with self._lock:
            self._waiting_nbytes -= nbytes

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything queued is stored; False if it took longer."""
        return self._saver.flush(timeout_s)

    def _count(self, **amounts: int) -> None:
        with self._lock:
            self.counters.update(amounts)

    def snapshot(self) -> dict[str, int]:
        """A copy of the counters."""
        with self._lock:
            return dict(self.counters)
