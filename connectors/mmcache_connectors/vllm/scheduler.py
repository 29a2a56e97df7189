"""The scheduler's side: what of each request is stored, what to load for it, what to save of it.

Runs on vLLM's scheduler thread, so nothing here waits longer than `lookup_wait_ms` a step: identities, hashing and
lookups are done by background threads, and a question without an answer yet is "ask again" until its time is up. What
was promised to the engine is loaded, or reported as failed, whatever happens here. Nothing of vLLM is imported:
requests and outputs are read by their attributes.
"""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from mmcache.client.blocking import Client
from mmcache_connectors.vllm import misses
from mmcache_connectors.vllm.background import Background, Ticket
from mmcache_connectors.vllm.groups import Parts
from mmcache_connectors.vllm.identities import Identities
from mmcache_connectors.vllm.lookup import Identifier, Namespaces, query
from mmcache_connectors.vllm.misses import Misses, transfer_params
from mmcache_connectors.vllm.plan import Job, blocks_to_load, blocks_to_save, savable_blocks
from mmcache_connectors.vllm.requests import Admitted, Answer, Chain, Tracked
from mmcache_connectors.vllm.settings import Settings

log = logging.getLogger("mmcache.vllm")
BlockIds = Callable[[str], Sequence[Sequence[int]]]  # of a request, one list a KV group
ANSWER_LASTS_S: Final = 10.0  # a lookup older than this is made again; below half the server's lease time
THREADS: Final = 2


class SchedulerSide:
    """Answers vLLM's scheduler. `counters` count since the start.

    `evict` takes blocks out of the engine's own prefix cache; `save_blocks_per_step` bounds what one step copies;
    `draw` gives a number from 0 to 1 for each request with a hit: below `audit_share` it is audited.
    """

    def __init__(
        self, settings: Settings, parts: Parts, namespaces: Namespaces, identities: Identities, client: Client, *,
        block_tokens: int, reads: bool, writes: bool, load_async: bool, save_blocks_per_step: int,
        evict: Callable[[set[int]], object], draw: Callable[[], float] | None = None,
    ) -> None:  # fmt: skip
        self._draw = draw or random.Random().random  # not from the engine's own, which it seeds
        self._settings, self._parts, self._client, self._block_tokens = settings, parts, client, block_tokens
        self._reads, self._writes, self._load_async = reads, writes, load_async
        self._save_blocks_per_step, self._evict = save_blocks_per_step, evict
        self._namespaces = namespaces
        items = identities.items(trust_uuids=settings.trust_media_uuids)
        self._identifier = Identifier(namespaces, block_tokens, items, identities.adapters)
        # Apart, so that neither a slow cache nor a large adapter keeps pictures from being identified.
        self._identify = Background("mmcache-identify", THREADS)
        self._lookup = Background("mmcache-lookup", THREADS)
        self._release = Background("mmcache-release", 1)
        self._misses = Misses(settings, client, parts, self._identifier.recorded)
        self._tracked: dict[str, Tracked] = {}
        self._loading: dict[bytes, str] = {}  # digest of a block being loaded -> request; others wait for it
        self._loads: list[Job] = []
        self._lost_blocks = False  # in this step the engine has blocks that nothing will fill
        self._ending: list[str] = []  # synchronous loads that end with the step under way
        self._waited_s = 0.0  # in this step
        self.counters: Counter[str] = Counter()

    # ------------------------------------------------------------------ what is stored
    def new_request(self, request: Any) -> None:
        """Begin to identify a request's content. Resumable sessions rewrite their tokens: they are not cached, but what
        they show the engine is looked at all the same."""
        identifier = self._identifier
        if request.resumable:
            self._identify.submit(lambda: identifier.chain(request))
        else:
            tracked = self._tracked[request.request_id] = Tracked(request)
            tracked.identified = self._identify.submit(lambda: identifier.chain(request))

    def matched(self, request: Any, local_tokens: int) -> tuple[int | None, bool]:
        """(tokens to load beyond `local_tokens`, whether between steps); None: ask again."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            return 0, False
        tracked.local = local = local_tokens // self._block_tokens
        if not self._load_async and local and self._shares(tracked, local):
            return None, False  # it would compute on blocks that this step only begins to load
        if not self._reads or tracked.off or request.skip_reading_prefix_cache:
            if not tracked.off:
                tracked.missed = misses.NOT_WANTED if self._reads else misses.ONLY_STORES
            return (None if self._wait_for_items(tracked) else 0), False
        enough = local >= (request.num_tokens - 1) // self._block_tokens
        hit = self._hit(tracked, wait=not enough)
        if hit is None:
            tracked.saved = max(tracked.saved, local if enough else 0)  # this engine's own, which it saved
            return (0 if enough else None), False
        if hit > local and self._audited(tracked):
            tracked.saved, tracked.audit_stop = max(tracked.saved, local), hit
            return 0, False
        tracked.saved = max(tracked.saved, hit)
        if hit <= local or tracked.chain is None:
            return 0, False
        if self._waits_for_same(tracked, tracked.chain.keys(local, local + 1).digests[0]):
            return None, False
        return hit * self._block_tokens - local_tokens, self._load_async

    def _audited(self, tracked: Tracked) -> bool:
        """Whether this request's hit is computed anew, to be compared when it is saved. Drawn once."""
        if tracked.audit is None:
            tracked.audit = self._writes and self._draw() < self._settings.audit_share
            self.counters["audit_requests"] += tracked.audit
            tracked.missed = misses.AUDIT if tracked.audit else tracked.missed
        return tracked.audit

    def _shares(self, tracked: Tracked, local: int) -> bool:
        """Whether some of the first `local` blocks are being loaded for another request; True if that is unknown."""
        if not self._loading or self._lost_blocks:
            return self._lost_blocks
        if not self._identified(tracked) or tracked.chain is None:
            return True
        return any(digest in self._loading for digest in tracked.chain.keys(0, local).digests)

    def _waits_for_same(self, tracked: Tracked, digest: bytes) -> bool:
        """Whether another request loads this very block, so that waiting saves a load. Should that one fail, this one's
        would too: see `worker_output`."""
        if self._loading.get(digest, tracked.request.request_id) == tracked.request.request_id:
            tracked.waiting_for = b""
            return False
        self.counters["waits_for_same_load"] += tracked.waiting_for != digest
        tracked.waiting_for = digest
        return True

    def _wait_for_items(self, tracked: Tracked) -> bool:
        """Whether a request that reads nothing should wait all the same, until its media are identified: see
        ItemIdentities. No longer than a lookup may take."""
        ticket = tracked.identified
        if ticket is None or not tracked.request.mm_features or self._done(ticket):
            return False
        return time.monotonic() - ticket.started_s < self._settings.lookup_s

    def _hit(self, tracked: Tracked, *, wait: bool) -> int | None:
        """Leading blocks that are a hit; None: not known yet; 0, for good, when finding out took too long."""
        now = time.monotonic()
        if not tracked.asked_s or (tracked.answer and tracked.answer.done() and self._old(tracked.answer)):
            self._let_go(tracked)
            tracked.asked_s = now
        if not self._done(tracked.identified, wait=wait):
            return self._not_yet(tracked, now) if wait else None
        self._identified(tracked)
        if tracked.chain is None:
            tracked.missed = misses.UNIDENTIFIED
            return 0
        answer = tracked.answer or self._ask(tracked, tracked.chain)
        if not self._done(answer, wait=wait):
            return self._not_yet(tracked, now) if wait else None
        if answer.result is None:
            tracked.missed = misses.NO_ANSWER
            return 0
        if not tracked.audit:
            tracked.missed = answer.result.missed
        return answer.result.hit

    def _not_yet(self, tracked: Tracked, now: float) -> int | None:
        if now - tracked.asked_s < self._settings.lookup_s:
            return None
        tracked.off, tracked.missed = True, misses.TOO_SLOW
        self.counters["lookup_timeouts"] += 1
        return 0

    def _old(self, answer: Ticket[Any]) -> bool:
        return time.monotonic() - answer.started_s > ANSWER_LASTS_S

    def _identified(self, tracked: Tracked) -> bool:
        if tracked.identified is not None and tracked.identified.done():
            tracked.chain, tracked.identified = tracked.identified.result, None
            self.counters["requests_not_cacheable"] += tracked.chain is None
        return tracked.identified is None

    def _ask(self, tracked: Tracked, chain: Chain) -> Ticket[Answer]:
        chain.extend(tracked.request.all_token_ids)
        # The engine must compute at least one token.
        wanted = (tracked.request.num_tokens - 1) // self._block_tokens
        keys = chain.keys(0, min(chain.limit_blocks, wanted))
        client, parts, block_tokens = self._client, self._parts, self._block_tokens
        request, local, whole = tracked.request, tracked.local, len(keys) == wanted

        def look_up() -> Answer:
            hit, pinned = query(client, parts, keys, block_tokens)
            return Answer(hit, pinned, self._misses.explain(request, keys, hit, local, whole=whole))

        self.counters["lookups"] += len(keys) > 0  # of none nobody is asked
        tracked.answer = self._lookup.submit(look_up)
        return tracked.answer

    def _done(self, ticket: Ticket[Any] | None, *, wait: bool = True) -> bool:
        """As `ticket.done()`, after waiting for it as long as this step may still wait. None is done."""
        if ticket is None or ticket.done():
            return True
        started = time.monotonic()
        done = wait and ticket.wait(self._settings.lookup_wait_ms / 1e3 - self._waited_s)
        self._waited_s += time.monotonic() - started
        return done

    # ------------------------------------------------------------------ what to load
    def allocated(self, request: Any, block_ids: Sequence[Sequence[int]], external_tokens: int) -> None:
        """The engine has memory for the request, which runs now: load what it counts on."""
        tracked = self._tracked.get(request.request_id)
        try:
            if tracked is not None:
                local_tokens = tracked.local * self._block_tokens
                tracked.admitted = tracked.admitted or Admitted(local_tokens, external_tokens, tracked.missed)
                if external_tokens > 0:
                    self._loads.append(self._load(tracked, block_ids, external_tokens))
                else:
                    self._let_go(tracked)
                tracked.asked_s = 0.0
        except Exception:
            log.exception("mmcache: a load could not be planned; the engine computes these blocks")
            if tracked is not None:
                tracked.off = True
            self._lost_blocks = True
            lost = tuple(block_id for ids in block_ids for block_id in ids if block_id > 0)
            self._loads.append(Job(request.request_id, (), lost))
        self._runs(request, tracked)

    def _load(self, tracked: Tracked, block_ids: Sequence[Sequence[int]], external_tokens: int) -> Job:
        assert tracked.chain is not None
        hit = tracked.local + external_tokens // self._block_tokens
        keys_of = tracked.chain.keys
        blocks = blocks_to_load(self._parts.groups, keys_of, block_ids, tracked.local, hit, self._block_tokens)
        tracked.loading = tuple(keys_of(tracked.local, hit).digests)
        tracked.loading_ids = frozenset(block_id for one in blocks for block_id in one.block_ids)
        for digest in tracked.loading:
            self._loading.setdefault(digest, tracked.request.request_id)
        self.counters["tokens_promised"] += external_tokens
        return Job(tracked.request.request_id, blocks)

    def _runs(self, request: Any, tracked: Tracked | None) -> None:
        try:
            self._identifier.runs(request)
            if tracked is not None and request.lora_request is not None:
                identifier = self._identifier
                tracked.adapter_kept = self._identify.submit(lambda: identifier.adapter_kept(request))
        except Exception:
            log.exception("mmcache: a request could not be looked at; nothing is stored of it")
            if tracked is not None:
                tracked.chain = tracked.identified = None

    def take_loads(self) -> list[Job]:
        """The loads of the step that is being planned. To be called once a step, before `plan_saves`."""
        self._waited_s = 0.0
        self._lost_blocks = False
        for request_id in self._ending:
            self._end_load(request_id)
        loads, self._loads = self._loads, []
        self._ending = [] if self._load_async else [job.request_id for job in loads]
        return loads

    # ------------------------------------------------------------------ what to save
    def plan_saves(self, scheduled: Iterable[tuple[str, int]], block_ids_of: BlockIds) -> list[Job]:
        """The saves of this step. `scheduled`: request id, tokens computed once the step has run."""
        saves: list[Job] = []
        left = self._save_blocks_per_step if self._writes else 0
        for request_id, computed in scheduled:
            tracked = self._tracked.get(request_id)
            if tracked is None or left <= 0:
                continue
            try:
                before = tracked.saved
                saves += self._save(tracked, computed, left, block_ids_of)
                left -= tracked.saved - before
            except Exception:
                log.exception("mmcache: the blocks of a request could not be named; nothing more is stored of it")
                tracked.chain = tracked.identified = None
        return saves

    def _save(self, tracked: Tracked, computed: int, most: int, block_ids_of: BlockIds) -> list[Job]:
        if not self._identified(tracked) or (chain := tracked.chain) is None:
            return []
        request = tracked.request
        prompt = None if self._settings.save_decode_blocks else request.num_prompt_tokens
        stop = savable_blocks(computed, request.num_tokens, prompt, chain.limit_blocks, self._block_tokens)
        if stop <= tracked.saved:
            return []
        if request.lora_request is not None:
            if not self._done(tracked.adapter_kept):
                return []  # in the next step
            if tracked.adapter_kept is None or not tracked.adapter_kept.result:
                chain.limit_blocks = 0
        chain.limit_blocks = min(chain.limit_blocks, self._identifier.limit_blocks(request))
        stop = min(stop, chain.limit_blocks, tracked.saved + most)
        if stop <= tracked.saved:
            return []
        if stop > len(chain):
            chain.extend(request.all_token_ids)
        block_ids = block_ids_of(request.request_id)
        border = min(max(tracked.saved, tracked.audit_stop), stop)
        runs = [(tracked.saved, border, True), (border, stop, False)]
        groups = self._parts.groups
        jobs = [
            Job(request.request_id, blocks_to_save(groups, chain.keys, block_ids, first, end), audit=audit)
            for first, end, audit in runs
            if first < end
        ]
        tracked.saved = stop
        return [job for job in jobs if job.blocks]

    # ------------------------------------------------------------------ what became of it
    def worker_output(
        self, received: Iterable[str], failed: Iterable[str], invalid: set[int], dropped: Mapping[str, int],
        block_ids_of: BlockIds,
    ) -> None:  # fmt: skip
        """Loads that ended, loads that failed as a whole, blocks that hold nothing valid, and, by request, the first
        block that found no room on its way out."""
        for request_id, first in dropped.items():
            if tracked := self._tracked.get(request_id):
                tracked.saved = min(tracked.saved, first)
        failed = set(failed)
        if invalid or failed:
            self._loads_failed(failed, invalid)
        if invalid and not self._load_async:
            self._evict_spoilt(invalid, block_ids_of)
        for request_id in received:
            self._end_load(request_id)

    def _loads_failed(self, failed: set[str], invalid: set[int]) -> None:
        lost: set[bytes] = set()
        for request_id, tracked in self._tracked.items():
            if not tracked.off and (request_id in failed or (tracked.loading_ids & invalid)):
                tracked.off, tracked.saved = True, 0
                tracked.missed = misses.LOAD_FAILED
                if tracked.admitted is not None:
                    tracked.admitted = Admitted(tracked.admitted.local, 0, misses.LOAD_FAILED)
                lost.update(tracked.loading)
                self.counters["loads_failed"] += 1
        for tracked in self._tracked.values():
            if tracked.waiting_for in lost:
                tracked.off, tracked.missed = True, misses.LOAD_FAILED

    def _evict_spoilt(self, invalid: set[int], block_ids_of: BlockIds) -> None:
        """The engine knows blocks by their hash from when it made room for them, filled or not, and other requests
        would find them; with them goes all that this step computed after them."""
        spoilt = set(invalid)
        for request_id, tracked in self._tracked.items():
            ids = next(iter(block_ids_of(request_id)), ())
            bad = next((row for row, block_id in enumerate(ids) if block_id in invalid), len(ids))
            tracked.saved = min(tracked.saved, bad)
            spoilt |= set(ids[bad:])
        self._evict({block_id for block_id in spoilt if block_id > 0})

    def _end_load(self, request_id: str) -> None:
        tracked = self._tracked.get(request_id)
        if tracked is not None:
            self._forget_load(tracked, arrived=not tracked.off)

    def _forget_load(self, tracked: Tracked, *, arrived: bool) -> None:
        if arrived and tracked.loading:
            path = "shared_memory" if self._client.maps_memory else "network"
            self.counters[f"hit_tokens_{path}"] += len(tracked.loading) * self._block_tokens
        for digest in tracked.loading:
            if self._loading.get(digest) == tracked.request.request_id:
                del self._loading[digest]
        tracked.loading, tracked.loading_ids = (), frozenset()
        self._let_go(tracked)

    def _let_go(self, tracked: Tracked) -> None:
        """Give back what is pinned for this request, or will be once the question under way is answered."""
        answer, tracked.answer = tracked.answer, None
        if answer is not None:
            limit_s = self._settings.lookup_s
            self._release.submit(lambda: answer.wait(limit_s) and answer.result and answer.result.pinned.release())

    def finished(self, request_id: str) -> dict[str, Any] | None:
        """The request ended. A load under way goes on in the worker, which reports it; its memory is held till then.
        Returns what the response says of the cache: see `transfer_params`."""
        tracked = self._tracked.pop(request_id, None)
        if tracked is None:
            return None
        self._forget_load(tracked, arrived=not self._load_async and not tracked.off)
        if tracked.admitted is None:
            return None
        local, cached, missed = tracked.admitted
        reusable = (tracked.request.num_prompt_tokens - 1) // self._block_tokens * self._block_tokens
        return transfer_params(cached, reusable - local - cached, missed)

    def reset(self) -> None:
        """The weights changed: nothing stored before is looked up again, nothing under way is saved."""
        self._namespaces.forget()
        for tracked in self._tracked.values():
            tracked.off, tracked.chain, tracked.identified, tracked.missed = True, None, None, misses.RESET

    def close(self, timeout_s: float) -> None:
        """Wait a moment for questions under way."""
        for background in (self._identify, self._lookup, self._release, self._misses):
            background.flush(timeout_s)
