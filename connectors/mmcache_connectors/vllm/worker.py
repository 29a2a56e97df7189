"""A worker's side: moves blocks between the engine's paged memory and the cache, on threads of its own.

Loads fill blocks that the engine does not read yet; saves are copied out of the paged memory before the step ends, so
that the engine may reuse a block at once, and are stored afterwards. Memory for both is bounded: what does not fit is
not saved, and counted. A load that fails, or takes too long, names the blocks that hold nothing valid. Nothing of vLLM
is imported.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from mmcache.client.blocking import Client
from mmcache.errors import MMCacheError
from mmcache.keyset import Keys, Part
from mmcache.transport.base import Outcome, Result
from mmcache_connectors.buffers import BufferPool
from mmcache_connectors.device import Copy
from mmcache_connectors.fill import Filler, LayerGate, as_blocks, leading
from mmcache_connectors.paged import PagedGroup
from mmcache_connectors.vllm.auditor import Auditor
from mmcache_connectors.vllm.background import Background
from mmcache_connectors.vllm.plan import Blocks, Job
from mmcache_connectors.vllm.settings import Settings

log = logging.getLogger("mmcache.vllm")
LOAD_THREADS: Final = 2
LOAD_BUFFER_NBYTES: Final = 16 << 20
SPLIT_NBYTES: Final = 4 << 20  # a load of less is one thread's
SAVE_BUFFER_NBYTES: Final = 4 << 20
DEVICE_SAVE_NBYTES: Final = 16 << 20  # a launch and a copy for each
IDLE_WAIT_S: Final = 0.005
ROOM_AGAIN: Final = 0.5  # of the save buffers free
MOST_TIMES: Final = 4096  # kept until they are asked for
LEAST_LOAD_RATE: Final = 200e6  # bytes a second: a cache slower than this is not waited for


@dataclass(frozen=True, slots=True)
class GroupMemory:
    """One KV group in this worker: its paged memory, the part of each block it is, and whether this worker stores it
    (workers whose heads are copies of another's only read)."""

    paged: PagedGroup
    part: Part
    stores: bool


@dataclass(slots=True)
class _Load:
    """One request's load under way."""

    request_id: str
    open_pieces: int
    started_s: float
    after: list[Any]  # by group: what the engine had started on its device by then
    gate: LayerGate | None = None
    loaded: int = 0
    nbytes: int = 0
    invalid: set[int] = field(default_factory=set)  # blocks that hold nothing valid


class WorkerSide:
    """Loads and saves for one worker. Methods are called on the engine's thread; `counters` count since the start."""

    def __init__(self, settings: Settings, client: Client, groups: Sequence[GroupMemory]) -> None:
        self._settings, self._client, self._groups = settings, client, groups
        self._several_groups = len(groups) > 1
        on_device = any(group.paged.on_device for group in groups)
        largest = max(group.paged.spec().nbytes for group in groups)
        load_nbytes = max(largest, LOAD_BUFFER_NBYTES)
        load_buffers = BufferPool(load_nbytes, LOAD_THREADS, "wanted" if groups[0].paged.pins else "no")
        self._load_buffers, self._filler = load_buffers, Filler(client, load_buffers)
        self._gate: LayerGate | None = None  # of this step's synchronous loads into a device
        save_nbytes = max(largest, DEVICE_SAVE_NBYTES if on_device else SAVE_BUFFER_NBYTES)
        save_count = max(1, (settings.save_buffer_mib << 20) // save_nbytes)
        self._save_buffers = BufferPool(save_nbytes, save_count, "must" if groups[0].paged.pins else "no")
        self._loader = Background("mmcache-load", LOAD_THREADS)
        self._saver, self._auditor = Background("mmcache-save", 1), Auditor(client)
        self._lock = threading.Lock()
        self._one_ended = threading.Condition(self._lock)
        self._open_loads = 0
        self._ended: list[tuple[str, set[int]]] = []  # loads: request, blocks that hold nothing valid
        self._spoilt = False  # a synchronous load failed: what this step computes is not to be kept
        self._invalid: set[int] = set()  # to be reported with this step
        self._dropped: dict[str, int] = {}
        self._dropping = self._corrupt = self._gather_failed = False
        self.counters: Counter[str] = Counter()
        self.took: dict[str, deque[float]] = {name: deque(maxlen=MOST_TIMES) for name in ("load", "save")}  # seconds

    # ------------------------------------------------------------------ loading
    def start_loads(self, jobs: Iterable[Job], *, asynchronous: bool) -> None:
        """Begin to fill blocks; without `asynchronous` they are filled, or reported invalid, on return. On a device
        they may be on their way then, layer by layer: see `pass_layer`."""
        self._spoilt = False
        self.end_layers()
        jobs = list(jobs)
        if not jobs:
            return
        after = self._marks()
        if not asynchronous and any(group.paged.on_device for group in self._groups):
            self._gate = LayerGate(self._load_buffers)
        for job in jobs:
            self._begin(job, after, None if asynchronous else self._gate)
        if asynchronous:
            return
        with self._one_ended:
            # Bounded by the client's deadlines. Not cut short: a thread that still wrote would do so behind the engine.
            self._one_ended.wait_for(lambda: not self._open_loads)
            ended, self._ended = self._ended, []
        self._invalid = set().union(*(invalid for _, invalid in ended))
        self._spoilt = bool(self._invalid)

    def _marks(self) -> list[Any] | None:
        """By group, what the engine has started on its device; None if it does not say: nothing may be loaded then."""
        try:
            return [group.paged.mark() for group in self._groups]
        except Exception:
            log.exception("mmcache: loads cannot be put in order with the engine; it computes these blocks")
            return None

    def pass_layer(self, layer: int) -> None:
        """The engine computes with this layer now: have it wait, on its device, for what is loaded into it."""
        if self._gate is not None:
            self._gate.pass_layer(layer)

    def end_layers(self) -> None:
        """The step is started: buffers that still feed its layers are given back when they have."""
        gate, self._gate = self._gate, None
        if gate is not None:
            gate.pass_all()
            self._loader.submit(gate.give_back_all)

    def _begin(self, job: Job, after: list[Any] | None, gate: LayerGate | None) -> None:
        """Cut a load into pieces for all loading threads, so that one receives while another scatters."""
        pieces = [piece for blocks in job.blocks for piece in self._pieces(blocks)] if after is not None else []
        load = _Load(job.request_id, len(pieces), time.monotonic(), after or [], gate)
        load.invalid |= set(job.lost)
        if after is None:
            load.invalid |= {block_id for blocks in job.blocks for block_id in blocks.block_ids}
        with self._lock:
            self._open_loads += 1
        if not pieces:
            self._end(load)
        for piece in pieces:
            try:
                self._loader.submit(lambda piece=piece: self._load_piece(load, piece))  # type: ignore[misc]
            except RuntimeError:  # no more threads: what was promised is reported as failed
                log.exception("mmcache: a load could not be started; the engine computes these blocks")
                self._piece_done(load, piece, 0)

    def _pieces(self, blocks: Blocks) -> list[Blocks]:
        count = len(blocks.block_ids)
        nbytes = count * self._groups[blocks.group].paged.spec().nbytes
        whole = nbytes < SPLIT_NBYTES or self._filler.copied_nbytes(self._groups[blocks.group].paged) > 0
        size = count if whole else -(-count // LOAD_THREADS)
        return [
            Blocks(blocks.group, blocks.keys[start : start + size], blocks.block_ids[start : start + size])
            for start in range(0, count, size)
        ]

    def _load_piece(self, load: _Load, blocks: Blocks) -> None:
        done = 0
        try:
            done = self._load_group(blocks, load)
        finally:
            self._piece_done(load, blocks, done)

    def _piece_done(self, load: _Load, blocks: Blocks, done: int) -> None:
        with self._lock:
            load.loaded += done
            load.nbytes += done * self._groups[blocks.group].paged.spec().nbytes
            load.invalid |= set(blocks.block_ids[done:])
            load.open_pieces -= 1
            last = not load.open_pieces
        if last:
            self._end(load)

    def _end(self, load: _Load) -> None:
        self.took["load"].append(time.monotonic() - load.started_s)
        self._count(blocks_loaded=load.loaded, load_failures=int(bool(load.invalid)))
        self._count_bytes("load", load.nbytes)
        with self._one_ended:
            self._open_loads -= 1
            self._ended.append((load.request_id, load.invalid))
            self._one_ended.notify_all()

    def _load_group(self, blocks: Blocks, load: _Load) -> int:
        """How many leading blocks were filled. It may take as long as a cache that stopped answering may delay a
        request, and longer as far as the cache delivers."""
        give_up_s = time.monotonic() + self._settings.load_s
        group = self._groups[blocks.group]
        nbytes = group.paged.spec().nbytes
        keys = blocks.keys.for_part(group.part)
        most = max(LOAD_BUFFER_NBYTES, self._filler.copied_nbytes(group.paged))
        size = max(1, min(most, int(LEAST_LOAD_RATE * self._settings.load_s / 2)) // nbytes)
        for start in range(0, len(keys), size):
            if time.monotonic() >= give_up_s:
                self._count(load_timeouts=1)
                return start
            some = keys[start : start + size]
            ids = blocks.block_ids[start : start + size]
            results = self._filler.fill(group.paged, some, ids, load.after[blocks.group], load.gate)
            good = leading(results)
            if good < len(some):
                self._note_failure(some[good : len(results)], results[good:])
                return start + good
            give_up_s += len(some) * nbytes / LEAST_LOAD_RATE
        return len(keys)

    def _note_failure(self, keys: Keys, results: Sequence[Result]) -> None:
        """Count; and drop entries of another form than this engine's under its keys, which would fail every time. (The
        client has the server check, and drop, those whose bytes are bad.)"""
        outcomes = Counter(str(result.outcome) for result in results)
        odd = [key for key, result in zip(keys, results, strict=True) if result.outcome is Outcome.MISMATCH]
        corrupt = outcomes[str(Outcome.CORRUPT)] + len(odd)
        self._count(verify_failures=corrupt, **{f"load_{name}": count for name, count in outcomes.items()})
        if corrupt and not self._corrupt:
            log.warning("mmcache: a stored block failed its checks and was not used (%s)", results[0].reason)
        self._corrupt = bool(corrupt)
        if odd:
            with contextlib.suppress(MMCacheError):
                self._client.delete(odd)

    def take_results(self, *, idle: bool = False) -> tuple[set[str], set[str]]:
        """(requests whose loads ended, those of them that failed as a whole); invalid blocks are then ready.

        With several groups block ids are ambiguous, so a failed load fails as a whole. In an `idle` step, which has
        nothing to compute, wait a moment for a load under way: an engine that only asks again and again keeps the
        interpreter from the threads it waits for.
        """
        with self._one_ended:
            if idle and self._open_loads:
                self._one_ended.wait_for(lambda: self._ended, IDLE_WAIT_S)
            ended, self._ended = self._ended, []
        failed = {request_id for request_id, invalid in ended if invalid} if self._several_groups else set()
        if not self._several_groups:
            for _, invalid in ended:
                self._invalid |= invalid
        return {request_id for request_id, _ in ended}, failed

    def take_invalid(self) -> set[int]:
        """Blocks to be reported as invalid in this step."""
        invalid, self._invalid = self._invalid, set()
        return invalid

    # ------------------------------------------------------------------ saving
    def save(self, jobs: Iterable[Job]) -> None:
        """Copy finished blocks out of the paged memory and queue them to be stored.

        What finds no room is dropped and reported by `take_dropped`, so that it can be tried again while it is there.
        Where a load of this step failed, or the cache does not answer, nothing is copied.
        """
        per_group: dict[tuple[int, bool], list[tuple[str, Blocks]]] = {}
        for job in jobs:
            for blocks in job.blocks:
                if self._groups[blocks.group].stores:
                    per_group.setdefault((blocks.group, job.audit), []).append((job.request_id, blocks))
        if self._spoilt or not self._client.answering:
            for several in per_group.values():
                self._count(saves_dropped=sum(len(blocks.keys) for _, blocks in several))
                if self._spoilt:
                    self._note_dropped(several, 0)  # what is sound of them is tried again
            return
        for (index, audit), several in per_group.items():
            keys = several[0][1].keys
            if len(several) > 1:
                keys = Keys.of([key for _, blocks in several for key in blocks.keys])
            ids = [one for _, blocks in several for one in blocks.block_ids]
            stored = self._save_group(self._groups[index], keys, ids, audit=audit)
            self._note_dropped(several, stored)

    def _note_dropped(self, several: Iterable[tuple[str, Blocks]], stored: int) -> None:
        """Of these blocks in a row, only the first `stored` found room."""
        for request_id, blocks in several:
            if stored < len(blocks.keys):
                first = blocks.keys.indices[max(0, stored)]
                self._dropped[request_id] = min(first, self._dropped.get(request_id, first))
            stored -= len(blocks.keys)

    def take_dropped(self) -> dict[str, int]:
        """By request, the first block that found no room since this was asked last."""
        dropped, self._dropped = self._dropped, {}
        return dropped

    def _save_group(self, group: GroupMemory, keys: Keys, block_ids: Sequence[int], *, audit: bool) -> int:
        """How many of these blocks, from the first on, are on their way, with `audit` to be compared first."""
        size = max(1, self._save_buffers.nbytes // group.paged.spec().nbytes)
        for start in range(0, len(keys), size):
            buffer = self._save_buffers.take()
            self._note_room(buffer is not None)
            if buffer is None:
                self._count(saves_dropped=len(keys) - start)
                return start
            ids = block_ids[start : start + size]
            staged = as_blocks(buffer, len(ids), group.paged)
            copy = self._gather(group.paged, ids, staged)
            if copy is None:
                self._save_buffers.give_back(buffer)
                self._count(saves_dropped=len(keys) - start)
                return start
            store = self._storing(group, keys[start : start + size], staged, buffer, copy, audit=audit)
            try:
                self._saver.submit(store)
            except RuntimeError:  # no more threads
                log.exception("mmcache: blocks could not be handed on to be stored")
                copy.synchronize()  # the one wait on this thread: nobody else is there to give the buffer back
                self._save_buffers.give_back(buffer)
                self._count(saves_dropped=len(keys) - start)
                return start
        return len(keys)

    def _gather(self, paged: PagedGroup, block_ids: Sequence[int], staged: torch.Tensor) -> Copy | None:
        """None if the link to the host is behind, or the device has no memory for it."""
        try:
            return paged.gather(block_ids, staged)
        except Exception:
            if not self._gather_failed:
                self._gather_failed = True
                log.exception("mmcache: blocks could not be copied out of the paged memory; they are not stored")
            return None

    def _storing(
        self, group: GroupMemory, keys: Keys, staged: torch.Tensor, buffer: torch.Tensor, copy: Copy, *, audit: bool
    ) -> Callable[[], None]:
        def store() -> None:
            try:
                copy.synchronize()
                parts = keys.for_part(group.part)
                if audit:
                    self._count(**self._auditor.check(group.paged, parts, staged))
                started_s = time.monotonic()
                results = self._client.put(parts, group.paged.rows(staged))
                self.took["save"].append(time.monotonic() - started_s)
                outcomes = Counter(result.outcome for result in results)
                stored = outcomes[Outcome.STORED]
                present = outcomes[Outcome.PRESENT]
                self._count(blocks_saved=stored, blocks_present=present, saves_refused=len(results) - stored - present)
                self._count_bytes("save", stored * group.paged.spec().nbytes)
            finally:
                self._save_buffers.give_back(buffer)

        return store

    def _note_room(self, found: bool) -> None:
        """Say when blocks begin to be dropped, and when half of the room is free again: not each time in between."""
        if not found and not self._dropping:
            self._dropping = True
            log.warning(
                "mmcache: %d MiB of blocks wait to be stored; further blocks are dropped until there is room "
                "(save_buffer_mib)", self._settings.save_buffer_mib,
            )  # fmt: skip
        elif found and self._dropping and self._save_buffers.free_share() >= ROOM_AGAIN:
            self._dropping = False
            log.warning("mmcache: blocks are stored again")

    # ------------------------------------------------------------------ the rest
    def flush(self, timeout_s: float) -> bool:
        """Wait until everything queued is loaded and stored; False if it took longer."""
        until = time.monotonic() + timeout_s
        return self._loader.flush(timeout_s) and self._saver.flush(max(0.0, until - time.monotonic()))

    def _count(self, **amounts: int) -> None:
        with self._lock:
            for name, amount in amounts.items():
                self.counters[name] += amount

    def _count_bytes(self, direction: str, nbytes: int) -> None:
        path = "shared_memory" if self._client.maps_memory else "network"
        self._count(**{f"{direction}_bytes_{path}": nbytes})

    def take_times(self) -> dict[str, list[float]]:
        """Seconds that each load (one a request) and each batch of saves took, of those not asked for yet."""
        return {f"{name}_seconds": [took.popleft() for _ in range(len(took))] for name, took in self.took.items()}

    def snapshot(self) -> Mapping[str, int]:
        """A copy of the counters."""
        with self._lock:
            return dict(self.counters)
