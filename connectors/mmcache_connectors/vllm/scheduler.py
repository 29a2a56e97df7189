"""The scheduler's side: what of each request is stored, what to load for it, what to save of it.

Runs on vLLM's scheduler thread, so nothing here waits: identities, hashing and lookups are done by background threads,
and a question without an answer yet is "ask again" until its time is up. Every method is safe to call for a request
that is unknown. Nothing of vLLM is imported: requests and outputs are read by their attributes.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from mmcache.client.blocking import Client
from mmcache.client.pin import Pinned
from mmcache_connectors.vllm.background import Background, Ticket
from mmcache_connectors.vllm.groups import Parts
from mmcache_connectors.vllm.lookup import Chain, Identifier, Namespaces, query
from mmcache_connectors.vllm.plan import Job, blocks_to_load, blocks_to_save, savable_blocks
from mmcache_connectors.vllm.settings import Settings

log = logging.getLogger("mmcache.vllm")
ANSWER_LASTS_S: Final = 10.0  # a lookup older than this is made again; below half the server's lease time
LOOKUP_THREADS: Final = 2


class _Tracked:
    """What is known of one request."""

    __slots__ = (
        "answer", "asked_s", "chain", "identified", "job_ids", "loading_key", "local", "off", "pinned", "request",
        "saved", "spent",
    )  # fmt: skip

    def __init__(self, request: Any) -> None:
        self.request = request
        self.identified: Ticket[Chain | None] | None = None
        self.chain: Chain | None = None
        self.answer: Ticket[tuple[int, Pinned]] | None = None
        self.asked_s: float | None = None  # when the question that is open now was first asked
        self.spent = False  # the answer was used or given up: the next question is a new one
        self.local = 0  # blocks the engine itself held when the answer was given
        self.pinned: Pinned | None = None
        self.loading_key: bytes | None = None
        self.job_ids: frozenset[int] = frozenset()  # the blocks being loaded
        self.off = False  # a load failed: this request is computed
        self.saved = 0  # leading blocks known to be stored, or on their way


class SchedulerSide:
    """Answers vLLM's scheduler. `counters` count since the start."""

    def __init__(
        self, settings: Settings, parts: Parts, namespaces: Namespaces, client: Client, *, block_tokens: int,
        reads: bool, writes: bool, load_async: bool,
    ) -> None:  # fmt: skip
        self._settings, self._parts, self._client, self._block_tokens = settings, parts, client, block_tokens
        self._reads, self._writes, self._load_async = reads, writes, load_async
        self._namespaces = namespaces
        self._identifier = Identifier(namespaces, block_tokens, settings.trust_media_uuids)
        self._background = Background("mmcache-lookup", LOOKUP_THREADS)
        self._tracked: dict[str, _Tracked] = {}
        self._loading: dict[bytes, str] = {}  # first block being loaded -> request; others wait for it
        self._loads: list[Job] = []
        self._ending: list[str] = []  # loads that end with the step under way
        self._waited_s = 0.0  # in this step
        self.counters: Counter[str] = Counter()

    # ------------------------------------------------------------------ what is stored
    def new_request(self, request: Any) -> None:
        """Begin to identify a request's content. Resumable sessions rewrite their tokens: they are not cached."""
        if not request.resumable:
            self._track(request)

    def matched(self, request: Any, local_tokens: int) -> tuple[int | None, bool]:
        """(tokens to load beyond `local_tokens`, whether between steps); None: ask again."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            return 0, False
        if not self._reads or tracked.off or request.skip_reading_prefix_cache:
            return (None if self._wait_for_items(tracked) else 0), False
        hit = self._answer(tracked)
        if hit is None:
            return None, False
        tracked.saved = max(tracked.saved, hit)
        tokens = hit * self._block_tokens - local_tokens
        if tokens <= 0 or tracked.chain is None:
            return 0, False
        tracked.local = local_tokens // self._block_tokens
        first = tracked.chain.keys.digests[tracked.local]
        if self._loading.get(first, request.request_id) != request.request_id:
            self.counters["waits_for_same_load"] += 1
            return None, False  # another request is loading these very blocks
        return tokens, self._load_async

    def _track(self, request: Any) -> None:
        tracked = self._tracked[request.request_id] = _Tracked(request)
        identifier = self._identifier
        tracked.identified = self._background.submit(lambda: identifier.chain(request))

    def _answer(self, tracked: _Tracked) -> int | None:
        """Leading blocks that are a hit, 0 when it took too long, None when it is not known yet."""
        now = time.monotonic()
        old = tracked.answer is not None and now - tracked.answer.started_s > ANSWER_LASTS_S
        if tracked.asked_s is None or tracked.spent or (old and tracked.answer and tracked.answer.done()):
            self._let_go(tracked)
            tracked.asked_s, tracked.spent = now, False
        waiting = tracked.answer if self._identified(tracked) else tracked.identified
        if waiting is None:  # identified, not asked yet
            if tracked.chain is None:
                return 0
            waiting = self._ask(tracked, tracked.chain)
        if not self._done(waiting):
            if now - tracked.asked_s < self._settings.lookup_s:
                return None
            tracked.off = True
            self.counters["lookup_timeouts"] += 1
            return 0
        if waiting is not tracked.answer:
            return self._answer(tracked) if self._identified(tracked) else 0
        if tracked.answer.result is None:
            return 0
        hit, tracked.pinned = tracked.answer.result
        return hit

    def _wait_for_items(self, tracked: _Tracked) -> bool:
        """Whether a request that reads nothing should wait all the same, until its media are identified: see
        ItemIdentities. No longer than a lookup may take."""
        ticket = tracked.identified
        if ticket is None or not tracked.request.mm_features or self._done(ticket):
            return False
        return time.monotonic() - ticket.started_s < self._settings.lookup_s

    def _identified(self, tracked: _Tracked) -> bool:
        if tracked.identified is not None and tracked.identified.done():
            tracked.chain, tracked.identified = tracked.identified.result, None
            self.counters["requests_not_cacheable"] += tracked.chain is None
        return tracked.identified is None

    def _ask(self, tracked: _Tracked, chain: Chain) -> Ticket[tuple[int, Pinned]]:
        chain.extend(tracked.request.all_token_ids)
        # The engine must compute at least one token.
        count = min(chain.limit_blocks, (tracked.request.num_tokens - 1) // self._block_tokens)
        keys, client, parts, block_tokens = chain.keys[:count], self._client, self._parts, self._block_tokens
        self.counters["lookups"] += 1
        tracked.answer = self._background.submit(lambda: query(client, parts, keys, block_tokens))
        return tracked.answer

    def _done(self, ticket: Ticket[Any]) -> bool:
        """As `ticket.done()`, after waiting for it as long as this step may still wait."""
        if ticket.done():
            return True
        left_s = self._settings.lookup_wait_ms / 1e3 - self._waited_s
        started = time.monotonic()
        done = ticket.wait(left_s)
        self._waited_s += time.monotonic() - started
        return done

    # ------------------------------------------------------------------ what to load and save
    def allocated(self, request: Any, block_ids: Sequence[Sequence[int]], external_tokens: int) -> None:
        """The engine has memory for the request, which runs now: load what it counts on."""
        self._identifier.runs(request)
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            return
        tracked.spent = True
        if external_tokens <= 0 or tracked.chain is None:
            self._let_go(tracked)
            return
        hit = tracked.local + external_tokens // self._block_tokens
        keys = tracked.chain.keys
        blocks = blocks_to_load(self._parts.groups, keys, block_ids, tracked.local, hit, self._block_tokens)
        self._loads.append(Job(request.request_id, blocks))
        tracked.loading_key = keys.digests[tracked.local]
        tracked.job_ids = frozenset(block_id for one in blocks for block_id in one.block_ids)
        self._loading[tracked.loading_key] = request.request_id
        self.counters["tokens_loaded"] += external_tokens

    def plan_step(
        self, scheduled: Iterable[tuple[str, int]], block_ids_of: Callable[[str], Sequence[Sequence[int]]]
    ) -> tuple[list[Job], list[Job]]:
        """(loads, saves) of this step. `scheduled`: request id, tokens computed once the step has run."""
        self._waited_s = 0.0
        for request_id in self._ending:
            self._loaded(request_id)
        self._ending.clear()
        loads, self._loads = self._loads, []
        saves = [job for one in scheduled if (job := self._save(*one, block_ids_of))] if self._writes else []
        if not self._load_async:
            self._ending += [job.request_id for job in loads]  # they are loaded once this step has run
        return loads, saves

    def _save(
        self, request_id: str, computed: int, block_ids_of: Callable[[str], Sequence[Sequence[int]]]
    ) -> Job | None:
        tracked = self._tracked.get(request_id)
        if tracked is None or not self._identified(tracked) or (chain := tracked.chain) is None:
            return None
        request = tracked.request
        prompt = None if self._settings.save_decode_blocks else request.num_prompt_tokens
        stop = savable_blocks(computed, request.num_tokens, prompt, chain.limit_blocks, self._block_tokens)
        if stop <= tracked.saved:
            return None
        stop = min(stop, self._identifier.limit_blocks(request))
        if stop > len(chain.keys):
            chain.extend(request.all_token_ids)
        blocks = blocks_to_save(self._parts.groups, chain.keys, block_ids_of(request_id), tracked.saved, stop)
        tracked.saved = max(tracked.saved, stop)
        return Job(request_id, blocks) if blocks else None

    # ------------------------------------------------------------------ what became of it
    def worker_output(
        self, received: Iterable[str], failed: Iterable[str], invalid: set[int],
        block_ids_of: Callable[[str], Sequence[Sequence[int]]],
    ) -> None:  # fmt: skip
        """Loads that ended, loads that failed as a whole, and blocks that hold nothing valid."""
        failed = set(failed)
        for request_id, tracked in self._tracked.items() if invalid or failed else ():
            if request_id in failed or (tracked.job_ids & invalid):
                tracked.off, tracked.saved = True, 0
                self.counters["loads_failed"] += 1
            elif invalid:  # shares blocks that another request was loading
                ids = next(iter(block_ids_of(request_id)), ())
                bad = next((row for row, block_id in enumerate(ids) if block_id in invalid), len(ids))
                tracked.saved = min(tracked.saved, bad)
        for request_id in received:
            self._loaded(request_id)

    def _loaded(self, request_id: str) -> None:
        tracked = self._tracked.get(request_id)
        if tracked is not None:
            self._end_load(tracked, request_id)

    def _end_load(self, tracked: _Tracked, request_id: str) -> None:
        if tracked.loading_key is not None and self._loading.get(tracked.loading_key) == request_id:
            del self._loading[tracked.loading_key]
        tracked.loading_key = None
        if self._load_async:
            tracked.job_ids = frozenset()
        self._let_go(tracked)

    def _let_go(self, tracked: _Tracked) -> None:
        """Give back what is pinned for this request, or will be when the question under way is answered."""
        if tracked.answer is not None and tracked.pinned is None:
            answer, limit_s = tracked.answer, self._settings.lookup_s
            self._background.submit(lambda: answer.wait(limit_s) and answer.result and answer.result[1].release())
        elif tracked.pinned is not None:
            self._background.submit(tracked.pinned.release)
        tracked.answer = tracked.pinned = None

    def finished(self, request_id: str) -> None:
        """The request ended. A load under way goes on in the worker, which reports it; its memory is held till then."""
        tracked = self._tracked.pop(request_id, None)
        if tracked is None:
            return
        self._end_load(tracked, request_id)

    def reset(self) -> None:
        """The weights changed: nothing stored before is looked up again, nothing under way is saved."""
        self._namespaces.forget()
        for tracked in self._tracked.values():
            tracked.off, tracked.chain, tracked.identified = True, None, None
