"""An engine small enough to check every byte: paged memory, chunked prefill, decoding, preemption, no model.

It drives the vLLM connector's two sides as vLLM's scheduler and workers do (0.32, v1/core/sched/scheduler.py). What a
token's KV holds follows from all tokens up to it, so before each step the engine can look whether everything that
attention would read is right: `wrong` counts what is not. A real vLLM is asked in tests/engines.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import blake3
import numpy as np
import torch

import mmcache
from mmcache_connectors.paged import PagedGroup
from mmcache_connectors.vllm.groups import Group, all_parts, rank_part
from mmcache_connectors.vllm.lookup import Namespaces
from mmcache_connectors.vllm.scheduler import SchedulerSide
from mmcache_connectors.vllm.settings import Settings
from mmcache_connectors.vllm.worker import GroupMemory, WorkerSide

BLOCK = 4
LAYERS, HEADS, CONTENT = 2, 2, 8
FACTS = {"model": "toy", "dtype": "uint8"}


@dataclass
class Request:
    """What the connector reads of a vLLM request, and what this engine keeps of it."""

    request_id: str
    all_token_ids: list[int]
    outputs: int = 1
    cache_salt: str | None = None
    lora_request: Any = None
    mm_features: Sequence[Any] = ()
    prompt_embeds: Any = None
    prompt_is_token_ids: Any = None
    resumable: bool = False
    skip_reading_prefix_cache: bool = False
    state: str = "waiting"
    computed: int = 0
    external: int = 0  # tokens that came from the cache, at the last admission
    asked: int = 0
    blocks: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.all_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)


def content(tokens: Sequence[int], group: int, salt: str | None) -> bytes:
    """The KV of the last of these tokens, over layers and all heads."""
    told = repr((list(tokens), group, salt)).encode()
    return blake3.blake3(told).digest(LAYERS * HEADS * CONTENT)


OPEN: list[ToyEngine] = []  # to be closed by `close_all` at the end of a test, however it ends


def close_all() -> None:
    while OPEN:
        OPEN.pop().close()


class ToyEngine:
    """`groups` are KV groups, `tp` the ranks that share the heads. `step` is one engine step."""

    def __init__(
        self, url: str, groups: Sequence[Group], *, tp: int = 1, load_async: bool = True, num_blocks: int = 64,
        chunk_tokens: int = 1000, **settings: Any,
    ) -> None:  # fmt: skip
        self.settings = Settings(url=url, **{"deadline_s": 2.0, **settings})
        self.groups, self.tp, self.load_async, self.chunk_tokens = groups, tp, load_async, chunk_tokens
        self.client = mmcache.connect(url, deadline_s=self.settings.load_s, lazy=True)
        facts: dict[str, object] = {**FACTS, **self.settings.extra_facts}
        self.facts: Callable[[], dict[str, object] | None] = lambda: facts
        self.namespaces = Namespaces(lambda: self.facts(), BLOCK)
        self.scheduler = SchedulerSide(
            self.settings, all_parts(groups, tp, [None]), self.namespaces, self.client, block_tokens=BLOCK, reads=True,
            writes=True, load_async=load_async,
        )  # fmt: skip
        self.memory: list[list[torch.Tensor]] = []  # [rank][group]: blocks, layers, heads, tokens, content
        self.workers = []
        for rank in range(tp):
            ours, memories = [], []
            for group in groups:
                pages = torch.full((num_blocks, LAYERS, group.heads, BLOCK, CONTENT), 255, dtype=torch.uint8)
                paged = PagedGroup(
                    [pages[:, layer] for layer in range(LAYERS)], num_blocks=num_blocks, block_tokens=BLOCK
                )
                part, stores = rank_part(group, len(groups), rank, tp, None)
                memories.append(GroupMemory(paged, part, stores))
                ours.append(pages)
            self.memory.append(ours)
            self.workers.append(WorkerSide(self.settings, self.client, memories))
        self.free = [list(range(1, num_blocks)) for _ in groups]
        self.requests: dict[str, Request] = {}
        self.wrong = 0
        OPEN.append(self)
        self._pending: dict[str, int] = {}  # loads that some ranks have ended
        self._failed: set[str] = set()
        self._invalid: set[int] = set()

    def close(self) -> None:
        for worker in self.workers:
            worker.flush(5.0)
        self.client.close()

    # ------------------------------------------------------------------ requests
    def add(self, request: Request) -> Request:
        self.requests[request.request_id] = request
        self.scheduler.new_request(request)
        return request

    def end(self, request: Request) -> None:
        """Finished or aborted. Blocks that a load may still fill are held until it has ended."""
        self.scheduler.finished(request.request_id)
        if request.state == "loading":
            request.state = "aborted"
        else:
            self._release(request)
            self.requests.pop(request.request_id)

    def preempt(self, request: Request) -> None:
        self._release(request)
        request.state, request.computed = "waiting", 0

    def run(self, *requests: Request, steps: int = 3000) -> None:
        """Step until these have ended."""
        for _ in range(steps):
            if all(request.request_id not in self.requests for request in requests):
                return
            self.step()
            time.sleep(0 if any(one.state == "running" for one in self.requests.values()) else 0.001)
        raise AssertionError(f"still there after {steps} steps: {[(r.request_id, r.state) for r in requests]}")

    # ------------------------------------------------------------------ one step
    def step(self) -> None:
        for request in [one for one in self.requests.values() if one.state == "waiting"]:
            self._admit(request)
        scheduled = {}
        for request in [one for one in self.requests.values() if one.state == "running"]:
            count = min(self.chunk_tokens, request.num_tokens - request.computed)
            if not self._grow(request, request.computed + count):
                self.preempt(request)
                continue
            scheduled[request.request_id] = count
        after = [(request_id, self.requests[request_id].computed + count) for request_id, count in scheduled.items()]
        loads, saves = self.scheduler.plan_step(after, lambda request_id: self.requests[request_id].blocks)
        if not self.load_async:
            self._start(loads)
        bad_now = {request_id for request_id in scheduled if not self._sound(self.requests[request_id])}
        for request_id, count in scheduled.items():
            self._compute(self.requests[request_id], count, garbage=request_id in bad_now)
        if self.load_async:
            self._start(loads)
        for worker in self.workers:
            worker.save(saves)
        failed = self._collect()
        self.wrong += len(bad_now - failed)
        for request_id, count in scheduled.items():
            if request_id not in failed and request_id in self.requests:
                self._advance(self.requests[request_id], count)

    def _start(self, loads: Any) -> None:
        for worker in self.workers:
            worker.start_loads(loads, asynchronous=self.load_async)

    def _admit(self, request: Request) -> None:
        if request.computed == 0:
            request.asked += 1
            tokens, is_async = self.scheduler.matched(request, 0)
            if tokens is None:
                return
            if not self._allocate(request, tokens or min(request.num_tokens, self.chunk_tokens), tokens):
                return
            request.external = tokens
            self.scheduler.allocated(request, request.blocks, tokens)
            request.computed = tokens
            request.state = "loading" if is_async else "running"
        else:
            self.scheduler.allocated(request, request.blocks, 0)
            request.state = "running"

    def _allocate(self, request: Request, tokens: int, external: int) -> bool:
        count = -(-tokens // BLOCK)
        if any(len(free) < count for free in self.free):
            return False
        request.blocks = []
        for group, free in zip(self.groups, self.free, strict=True):
            gone = group.first_needed_token(external) // BLOCK if external else 0
            request.blocks.append([0] * gone + [free.pop() for _ in range(count - gone)])
        return True

    def _grow(self, request: Request, tokens: int) -> bool:
        for group, free, blocks in zip(self.groups, self.free, request.blocks, strict=True):
            for row in range(group.first_needed_token(request.computed) // BLOCK):
                if blocks[row]:
                    free.append(blocks[row])
                    blocks[row] = 0
            while len(blocks) * BLOCK < tokens:
                if not free:
                    return False
                blocks.append(free.pop())
        return True

    def _release(self, request: Request) -> None:
        for free, blocks in zip(self.free, request.blocks, strict=False):
            free += [block for block in blocks if block]
        request.blocks = []

    # ------------------------------------------------------------------ memory
    def _places(self, request: Request, group: Group, position: int) -> list[tuple[torch.Tensor, slice]]:
        block = request.blocks[group.index][position // BLOCK]
        copies = self.tp // group.shards
        places = []
        for rank in range(self.tp):
            shard = rank // copies
            heads = slice(shard * group.heads, (shard + 1) * group.heads)
            places.append((self.memory[rank][group.index][block, :, :, position % BLOCK], heads))
        return places

    def _expected(self, request: Request, group: Group, position: int) -> torch.Tensor:
        raw = content(request.all_token_ids[: position + 1], group.index, request.cache_salt)
        return torch.from_numpy(np.frombuffer(raw, np.uint8).copy()).view(LAYERS, HEADS, CONTENT)

    def _sound(self, request: Request) -> bool:
        """Whether everything attention reads for the next token is right."""
        for group in self.groups:
            for position in range(group.first_needed_token(request.computed), request.computed):
                value = self._expected(request, group, position)
                for place, heads in self._places(request, group, position):
                    if not torch.equal(place, value[:, heads]):
                        return False
        return True

    def _compute(self, request: Request, count: int, *, garbage: bool) -> None:
        for group in self.groups:
            for position in range(request.computed, request.computed + count):
                value = self._expected(request, group, position)
                for place, heads in self._places(request, group, position):
                    place.copy_(torch.full_like(place, 77) if garbage else value[:, heads])

    def _advance(self, request: Request, count: int) -> None:
        request.computed += count
        if request.computed == request.num_tokens:
            request.outputs -= 1
            if request.outputs <= 0:
                self.end(request)
            else:
                request.all_token_ids.append(sum(request.all_token_ids) % 97)

    def _collect(self) -> set[str]:
        """What the workers report, aggregated as vLLM does; the requests whose step does not count."""
        results = [worker.take_results() for worker in self.workers]
        invalid = set().union(*(worker.take_invalid() for worker in self.workers))
        failed = set().union(*(failed for _, failed in results))
        received = set()
        for request_id in (one for finished, _ in results for one in finished):
            self._pending[request_id] = self._pending.get(request_id, 0) + 1
            if self._pending[request_id] == self.tp:
                received.add(request_id)
                del self._pending[request_id]
        self._failed |= failed
        self._invalid |= invalid
        undone = self._spoil(received)
        self.scheduler.worker_output(
            received, self._failed & received, invalid, lambda request_id: self.requests[request_id].blocks
        )
        self._failed -= received
        for request_id in received:
            request = self.requests[request_id]
            if request.state == "aborted":
                self._release(request)
                del self.requests[request_id]
            else:
                request.state = "waiting"
                if request.computed == 0:
                    self._release(request)
        return undone

    def _spoil(self, received: set[str]) -> set[str]:
        """Take back what failed loads had promised."""
        undone = set()
        for request_id, request in self.requests.items():
            if request_id in self._failed & received:
                request.computed = 0
            bad = [
                row for row, block in enumerate(request.blocks[0] if request.blocks else []) if block in self._invalid
            ]
            if bad and bad[0] * BLOCK < request.computed and (request.state == "running" or request_id in received):
                request.computed = bad[0] * BLOCK
                undone.add(request_id)
                self._invalid -= set(request.blocks[0])
        if not self.load_async:
            self._invalid = set()
        return undone
