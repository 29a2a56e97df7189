"""An engine small enough to check every byte: paged memory, a prefix cache, chunked prefill, preemption, no model.

It drives the vLLM connector's two sides as vLLM's scheduler and workers do (0.32, v1/core/sched/scheduler.py), with the
same prefix cache (toy_blocks.py). What a token's KV holds follows from all tokens up to it, the salt, the adapter's
weights and the model's (toy_memory.py), so before each step the engine can look whether everything that attention would
read is right: `wrong` counts what is not. A real vLLM is asked in tests/engines.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import mmcache
from mmcache_connectors.vllm.groups import Group, all_parts, rank_part
from mmcache_connectors.vllm.identities import Identities
from mmcache_connectors.vllm.lookup import STORED_LAYOUT, Namespaces
from mmcache_connectors.vllm.scheduler import SchedulerSide
from mmcache_connectors.vllm.settings import LOOKUP_SHARE, Settings
from mmcache_connectors.vllm.worker import GroupMemory, WorkerSide
from tests.integration.toy_blocks import NULL_BLOCK, BlockPool, Request
from tests.integration.toy_memory import BLOCK, FACTS, GARBAGE, Memory, adapter_bytes, values

DEADLINE_S = 60.0
LOST_S = 0.9 * LOOKUP_SHARE * DEADLINE_S  # what takes so long does not come: the connector gives it up only later
OPEN: list[ToyEngine] = []  # to be closed by `close_all` at the end of a test, however it ends


def close_all() -> None:
    while OPEN:
        OPEN.pop().close()


class ToyEngine:
    """`groups` are KV groups, `tp` the ranks that share the heads. `step` is one engine step.

    `counts`: local_tokens and external_tokens found, loads_failed, preemptions, resets.
    """

    def __init__(
        self, url: str, groups: Sequence[Group], *, tp: int = 1, load_async: bool = True, num_blocks: int = 64,
        chunk_tokens: int = 1000, save_blocks_per_step: int = 10**6, mover: Any = None,
        draw: Callable[[], float] = random.random,
        **settings: Any,
    ) -> None:  # fmt: skip
        self.settings = Settings(url=url, **{"deadline_s": DEADLINE_S, **settings})
        self.groups, self.tp, self.load_async, self.chunk_tokens = groups, tp, load_async, chunk_tokens
        self.client = mmcache.connect(url, deadline_s=self.settings.load_s, lazy=True)
        self.lookup_client = mmcache.connect(url, deadline_s=self.settings.lookup_s, lazy=True)
        self.parts = all_parts(groups, tp, [None])
        self.pools = [BlockPool(num_blocks) for _ in groups]
        self.known = True  # whether the engine's facts are: not before its weights have a digest
        self.weights = self.epoch = 0
        self.epoch_weights = {0: 0}  # which weights an epoch's blocks were computed with
        self.loras: dict[int, bytes] = {}  # the adapters' weights, as they were when each was first run
        self.namespaces = Namespaces(self.facts, kind="kv", layout=STORED_LAYOUT, block_size=BLOCK)
        self.scheduler = SchedulerSide(
            self.settings, self.parts, self.namespaces, Identities(), self.lookup_client, block_tokens=BLOCK,
            reads=True, writes=True, load_async=load_async, save_blocks_per_step=save_blocks_per_step,
            evict=self.pools[0].evict, draw=draw,
        )  # fmt: skip
        self.memory = [Memory(groups, num_blocks, rank, tp, mover) for rank in range(tp)]
        self.workers = []
        for rank, memory in enumerate(self.memory):
            parts = [rank_part(group, len(groups), rank, tp, None) for group in groups]
            held = [GroupMemory(paged, *part) for paged, part in zip(memory.paged, parts, strict=True)]
            self.workers.append(WorkerSide(self.settings, self.client, held))
        self.requests: dict[str, Request] = {}
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        self.loading: list[Request] = []  # waiting, with blocks that are, or were, loaded
        self.wrong = 0
        self.counts: Counter[str] = Counter()
        self._pending: Counter[str] = Counter()  # loads that some ranks have ended
        self._failed: set[str] = set()
        OPEN.append(self)

    def close(self) -> None:
        for worker in self.workers:
            worker.flush(5.0)
        self.scheduler.close(1.0)
        self.client.close()
        self.lookup_client.close()

    def facts(self) -> dict[str, object] | None:
        """As EngineFacts.get."""
        return self.facts_of(self.epoch) if self.known else None

    def facts_of(self, epoch: int) -> dict[str, object]:
        """What was cached between two resets is named by."""
        return {**FACTS, **self.settings.extra_facts, **({"weights_epoch": str(epoch)} if epoch else {})}

    # ------------------------------------------------------------------ requests
    def add(self, request: Request) -> Request:
        self.requests[request.request_id] = request
        self.waiting.append(request)
        self.scheduler.new_request(request)
        return request

    def end(self, request: Request) -> None:
        """Finished or aborted. Blocks that a load may still fill are held until it has ended."""
        for queue in (self.running, self.waiting, self.loading):
            if request in queue:
                queue.remove(request)
        request.told = self.scheduler.finished(request.request_id)
        if request.state == "loading":
            request.state = "aborted"
        else:
            request.state = "ended"
            self._release(request)
            del self.requests[request.request_id]

    def preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._release(request)
        request.state, request.computed = "waiting", 0
        self.waiting.insert(0, request)
        self.counts["preemptions"] += 1

    def forget_local(self) -> bool:
        """Empty this engine's own prefix cache; False, and nothing happens, while blocks are in use."""
        clean = not any(any(pool.references) for pool in self.pools)
        for pool in self.pools if clean else ():
            pool.reset()
        return clean

    def reset(self, *, weights: int = 0, preempting: bool = False) -> bool:
        """New weights, and what Scheduler.reset_prefix_cache and the connector's reset_cache do then."""
        self.weights = weights
        for request in reversed(list(self.running)) if preempting else ():
            self.preempt(request)
        clean = self.forget_local()
        self.epoch += 1
        self.epoch_weights[self.epoch] = weights
        self.known = clean
        self.scheduler.reset()
        self.counts["resets"] += clean
        return clean

    def run(self, *requests: Request) -> None:
        """Step until these have ended. Not so many steps: while an answer is late, they cost nothing."""
        give_up_s = time.monotonic() + LOST_S
        while any(request.request_id in self.requests for request in requests):
            assert time.monotonic() < give_up_s, f"still there: {[(r.request_id, r.state) for r in requests]}"
            self.step()

    # ------------------------------------------------------------------ one step
    def step(self) -> None:
        scheduled = self._schedule()
        loads = self.scheduler.take_loads()
        after = [(request.request_id, request.computed + count) for request, count in scheduled.items()]
        saves = self.scheduler.plan_saves(after, self._block_ids)
        if not self.load_async:
            self._start(loads)
        unsound = {request for request, count in scheduled.items() if not self._compute(request, count)}
        if self.load_async:
            self._start(loads)
        for worker in self.workers:
            worker.save(saves)
        self._update(scheduled, unsound)

    def _start(self, loads: Any) -> None:
        for worker in self.workers:
            worker.start_loads(loads, asynchronous=self.load_async)

    def _block_ids(self, request_id: str) -> list[list[int]]:
        request = self.requests.get(request_id)
        return request.blocks if request is not None and request.blocks else [[] for _ in self.groups]

    def _schedule(self) -> dict[Request, int]:
        """Who computes how many tokens: those that run first, then, unless memory is short, those that wait."""
        scheduled: dict[Request, int] = {}
        preempted = False
        for request in list(self.running):
            count = min(self.chunk_tokens, request.num_tokens - request.computed)
            while request in self.running and not self._grow(request, count):
                self.preempt(self.running[-1])
                preempted = True
            if request not in self.running:
                break
            scheduled[request] = count
        for request in [] if preempted else [*self.loading, *self.waiting]:
            if request.state != "loading" and not self._admit(request, scheduled):
                break
        return scheduled

    def _admit(self, request: Request, scheduled: dict[Request, int]) -> bool:
        """False if there is no memory for it now."""
        if request.state == "loaded":
            self._promote(request)
        local: list[list[int]] = [[] for _ in self.groups]
        external, is_async = 0, False
        if request.computed == 0:
            request.asked += 1
            if not request.skip_reading_prefix_cache:
                local = self._local_hit(request)
            found, is_async = self.scheduler.matched(request, len(local[0]) * BLOCK)
            if found is None:
                return True
            external = 0 if request.skip_reading_prefix_cache else found
        total = request.computed + len(local[0]) * BLOCK + external
        count = 0 if is_async else min(self.chunk_tokens, request.num_tokens - total)
        if not self._allocate(request, local, total, count, is_async=is_async):
            return False
        if request.computed == 0:
            request.local, request.external = len(local[0]) * BLOCK, external
            self.counts.update(local_tokens=request.local, external_tokens=external)
        self.scheduler.allocated(request, request.blocks, external)
        request.computed = total
        (self.loading if request in self.loading else self.waiting).remove(request)
        request.state = "loading" if is_async else "running"
        (self.loading if is_async else self.running).append(request)
        if not is_async:
            scheduled[request] = count
        return True

    def _promote(self, request: Request) -> None:
        """Its load has ended: blocks get their hash only now; of a failed one those that hold something."""
        request.state = "waiting"
        if request.computed:
            self._hash(request, request.computed)
        else:
            self._release(request)
            self.loading.remove(request)
            self.waiting.insert(0, request)

    # ------------------------------------------------------------------ blocks
    def _local_hit(self, request: Request) -> list[list[int]]:
        """The blocks of the longest prefix that every group has what it must of; null where it needs none."""
        hashes = request.block_hashes()[: (request.num_tokens - 1) // BLOCK]
        found = [[pool.find(name) for name in hashes] for pool in self.pools]
        for count in range(len(hashes), 0, -1):
            firsts = [group.first_needed_token(count * BLOCK) // BLOCK for group in self.groups]
            if all(None not in rows[first:count] for rows, first in zip(found, firsts, strict=True)):
                return [
                    [NULL_BLOCK] * first + [block for block in rows[first:count] if block is not None]
                    for rows, first in zip(found, firsts, strict=True)
                ]
        return [[] for _ in self.groups]

    def _allocate(self, request: Request, local: list[list[int]], total: int, count: int, *, is_async: bool) -> bool:
        """Blocks for the `total` tokens it has and `count` more; those of an asynchronous load get no hash yet."""
        fresh = request.computed == 0
        reserved = self._reserved() if is_async else 0  # a load cannot be preempted
        plans = []
        for group, pool, hit in zip(self.groups, self.pools, local, strict=True):
            gone = group.first_needed_token(total) // BLOCK
            kept = [block for block in hit[gone:] if block != NULL_BLOCK]
            held = max(len(hit), gone) if fresh else len(request.blocks[group.index])
            need = max(0, -(-(total + count) // BLOCK) - held)
            if need + sum(not pool.references[block] for block in kept) > pool.free_count() - reserved:
                return False
            plans.append((gone, kept, need))
        if fresh:
            request.blocks, request.hashed = [[] for _ in self.groups], [len(hit) for hit in local]
        for pool, blocks, (gone, kept, need) in zip(self.pools, request.blocks, plans, strict=True):
            pool.touch(kept)
            blocks += ([NULL_BLOCK] * gone + kept if fresh else []) + pool.take(need)
        if not is_async:
            self._hash(request, min(total + count, request.num_tokens))
        return True

    def _reserved(self) -> int:
        """What requests that have begun still need to be computed to their end."""
        begun = [*self.loading, *(one for one in self.running if one.computed < one.num_prompt_tokens)]
        return sum(max(0, -(-one.num_tokens // BLOCK) - len(one.blocks[0])) for one in begun)

    def _grow(self, request: Request, count: int) -> bool:
        tokens = request.computed + count
        for group, pool, blocks in zip(self.groups, self.pools, request.blocks, strict=True):
            for row in range(group.first_needed_token(request.computed) // BLOCK - 1, -1, -1):
                if blocks[row] != NULL_BLOCK:
                    pool.release([blocks[row]])
                    blocks[row] = NULL_BLOCK
        needs = [max(0, -(-tokens // BLOCK) - len(blocks)) for blocks in request.blocks]
        if any(need > pool.free_count() for need, pool in zip(needs, self.pools, strict=True)):
            return False
        for need, pool, blocks in zip(needs, self.pools, request.blocks, strict=True):
            blocks += pool.take(need)
        self._hash(request, min(tokens, request.num_tokens))
        return True

    def _hash(self, request: Request, tokens: int) -> None:
        """Full blocks up to here can be hit from now on, though only the step that is planned may compute them."""
        hashes = request.block_hashes()
        for pool, blocks, index in zip(self.pools, request.blocks, range(len(self.groups)), strict=True):
            for row in range(request.hashed[index], tokens // BLOCK):
                if blocks[row] != NULL_BLOCK:
                    pool.cache(blocks[row], hashes[row])
            request.hashed[index] = max(request.hashed[index], tokens // BLOCK)

    def _release(self, request: Request) -> None:
        for pool, blocks in zip(self.pools, request.blocks, strict=False):
            pool.release([block for block in reversed(blocks) if block != NULL_BLOCK])
        request.blocks, request.hashed = [], []

    def _compute(self, request: Request, count: int) -> bool:
        """Write the KV of these tokens; False, and garbage, if anything that attention reads for them is not right."""
        adapter = b""
        if lora := request.lora_request:
            if lora.lora_int_id not in self.loras:
                self.loras[lora.lora_int_id] = adapter_bytes(lora.lora_path)
            adapter = self.loras[lora.lora_int_id]
        told, start, sound = (request.cache_salt or "", adapter, self.weights), request.computed, True
        for group, blocks in zip(self.groups, request.blocks, strict=True):
            first = group.first_needed_token(start)
            if first < start:
                value = values(request.all_token_ids[:start], first, group.index, told)
                sound = sound and all(rank.holds(group, blocks, first, value) for rank in self.memory)
        for group, blocks in zip(self.groups, request.blocks, strict=True):
            value = values(request.all_token_ids[: start + count], start, group.index, told)
            for rank in self.memory:
                rank.write(group, blocks, start, value if sound else np.full_like(value, GARBAGE))
        return sound

    # ------------------------------------------------------------------ what became of it
    def _update(self, scheduled: dict[Request, int], unsound: set[Request]) -> None:
        """As Scheduler.update_from_output, in its order."""
        results = [worker.take_results(idle=not scheduled) for worker in self.workers]
        invalid = set().union(*(worker.take_invalid() for worker in self.workers))
        dropped: dict[str, int] = {}
        for request_id, first in (one for worker in self.workers for one in worker.take_dropped().items()):
            dropped[request_id] = min(first, dropped.get(request_id, first))
        self._failed |= set().union(*(failed for _, failed in results))
        received = self._ended_on_all_ranks([one for ended, _ in results for one in ended])
        failed = self._failed & received
        self._failed -= received
        for request_id in failed:
            if self.requests[request_id].state == "loading":
                self.requests[request_id].computed = 0
        assert not invalid or len(self.groups) == 1
        self._cut([one for one in self.loading if one.state == "loading"], invalid)
        undone = self._cut(self.running, invalid)
        self.counts["loads_failed"] += bool(invalid or failed)
        self.wrong += len(unsound - undone)
        for request, count in scheduled.items():
            if request not in undone:
                self._advance(request, count)
        self.scheduler.worker_output(received, failed, invalid, dropped, self._block_ids)
        for request_id in received:
            waited = self.requests.get(request_id)
            if waited is not None and waited.state == "loading":
                waited.state = "loaded"
            elif waited is not None and waited.state == "aborted":
                self._release(waited)
                del self.requests[request_id]

    def _ended_on_all_ranks(self, ended: list[str]) -> set[str]:
        self._pending.update(ended)
        received = {request_id for request_id in ended if self._pending[request_id] == self.tp}
        for request_id in received:
            del self._pending[request_id]
        return received

    def _cut(self, requests: Sequence[Request], invalid: set[int]) -> set[Request]:
        """As Scheduler._update_requests_with_invalid_blocks: who is computed again, each from its first bad block that
        no other request computes again. Hashes stay, under the policy "recompute"."""
        affected, marked = set(), set()
        for request in requests:
            own = False
            for row, block in enumerate(request.blocks[0][: -(-request.computed // BLOCK)] if invalid else ()):
                if block in invalid:
                    affected.add(request)
                    if block not in marked and not own:
                        own, request.computed = True, row * BLOCK
                    marked.add(block)
        return affected

    def _advance(self, request: Request, count: int) -> None:
        request.computed += count
        if request.computed == request.num_tokens:
            request.outputs -= 1
            if request.outputs <= 0:
                self.end(request)
            else:
                request.all_token_ids.append(sum(request.all_token_ids) % 97)
