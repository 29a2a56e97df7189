"""The scheduler's side of the encoder cache: which items' embeddings are known, what to load and what to store.

Runs on vLLM's scheduler thread: a request with media is put off while background threads identify its items and fetch
what is known of them, for `deadline_s` at most; vLLM goes on with others. What is then promised lies in host memory
(shelf.py): the worker's step only maps it. That is done here and not by the workers because vLLM's V1 runner does not
call an encoder-cache connector in a step without tokens, and such steps are all there is while every request waits.
Nothing of vLLM is imported: requests are read by their attributes.
"""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from mmcache.client.blocking import Client
from mmcache_connectors.vllm.background import Background, Ticket
from mmcache_connectors.vllm.ec_items import Named, passes_through
from mmcache_connectors.vllm.ec_messages import Load, Save, StepItems
from mmcache_connectors.vllm.ec_names import Namer
from mmcache_connectors.vllm.settings import EncoderSettings
from mmcache_connectors.vllm.shelf import Fetched, Shelf

log = logging.getLogger("mmcache.vllm")
THREADS: Final = 4


@dataclass(slots=True)
class Item:
    """What is known of one item of one request."""

    name: Named
    stored: bool
    fetched: Fetched | None = None
    audit: bool = False

    @property
    def loads(self) -> bool:
        """Whether the engine need not encode it."""
        return self.stored and not self.audit


@dataclass(slots=True)
class _Asked:
    """One request's items. `settled`: every item that ends after so many tokens has been looked up, or given up."""

    settled: int | None = None
    started_s: float = 0.0
    ticket: Ticket[list[Item]] | None = None
    waiting: set[str] = field(default_factory=set)  # identifiers the ticket is about
    items: dict[str, Item] = field(default_factory=dict)


class EncoderScheduler:
    """Answers vLLM's scheduler. `counters` count since the start.

    `reads`: embeddings are loaded. Without it the engine only encodes: then what is stored already need not be encoded
    again. `steps_in_flight`: how many steps vLLM may plan before it has the first one's result.
    """

    def __init__(
        self, settings: EncoderSettings, namer: Namer, client: Client, shelf: Shelf, *,
        reads: bool, writes: bool, steps_in_flight: int,
    ) -> None:  # fmt: skip
        self._settings, self._namer, self._client, self._shelf = settings, namer, client, shelf
        self._reads, self._writes, self._steps_in_flight = reads, writes, steps_in_flight
        self._background = Background("mmcache-encoder-lookup", THREADS)
        self._asked: dict[str, _Asked] = {}
        self._current: _Asked | None = None  # vLLM asks `has` about the request it asked `available` about last
        self._engine_has: set[str] = set()  # identifiers in the engine's own encoder cache, as far as this can tell
        self._next = StepItems()
        self._loading: list[tuple[int, Fetched]] = []  # in which step a worker maps it
        self._waited_s = 0.0
        self.counters: Counter[str] = Counter()

    # ------------------------------------------------------------------ what is known
    def available(self, request: Any, computed_tokens: int) -> bool:
        """False: some items the request needs are still being looked for; ask again in the next step."""
        asked = self._asked.get(request.request_id)
        if asked is None:
            asked = self._asked[request.request_id] = _Asked()
        self._current = asked
        if asked.settled is not None and asked.settled <= computed_tokens:
            return True
        if asked.ticket is None and not self._look_up(request, asked, computed_tokens):
            asked.settled = computed_tokens
            return True
        if not self._ended(asked):
            return False
        asked.settled = computed_tokens
        return True

    def _look_up(self, request: Any, asked: _Asked, computed_tokens: int) -> bool:
        """Begin to look for the items after `computed_tokens`; False if there is nothing to look for."""
        wanted = [
            index
            for index, feature in enumerate(request.mm_features)
            if feature.mm_position.offset + feature.mm_position.length > computed_tokens
            and feature.identifier not in self._engine_has
            and feature.identifier not in asked.items
            and not passes_through(feature)
        ]
        if not wanted:
            return False
        asked.started_s = time.monotonic()
        asked.waiting = {request.mm_features[index].identifier for index in wanted}
        asked.ticket = self._background.submit(lambda: self._find(request, wanted))
        return True

    def _find(self, request: Any, wanted: Sequence[int]) -> list[Item]:
        """In the background: name the items, and fetch what is stored of them."""
        names = self._namer.names(request, wanted)
        if not names:
            return []
        if not self._reads:
            stored = self._client.contains([name.key for name in names])
            return [Item(name, known) for name, known in zip(names, stored, strict=True)]
        fetched = self._shelf.fetch(names, self._settings.deadline_s)
        return [Item(name, one is not None, one) for name, one in zip(names, fetched, strict=True)]

    def _ended(self, asked: _Asked) -> bool:
        """Whether the items under way are known by now, or it has taken too long. Waits a moment for it."""
        ticket = asked.ticket
        assert ticket is not None
        began_s = time.monotonic()
        left_s = self._settings.lookup_wait_ms / 1000 - self._waited_s
        done = ticket.wait(left_s)
        self._waited_s += time.monotonic() - began_s
        if not done and time.monotonic() < asked.started_s + self._settings.deadline_s:
            return False
        asked.ticket = None
        if done:
            for item in ticket.result or ():
                item.audit = item.stored and random.random() < self._settings.audit_share
                asked.items[item.name.identifier] = item
        else:
            self.counters["lookup_timeouts"] += 1
            self._give_back_later(ticket)
        self.counters["items_unnamed"] += len(asked.waiting - asked.items.keys())
        asked.waiting = set()
        return True

    def has(self, identifier: str) -> bool:
        """Whether this item of the request that was asked about last need not be encoded."""
        if identifier in self._engine_has:  # vLLM would not ask: its cache was reset
            self._engine_has.clear()
        item = self._current.items.get(identifier) if self._current is not None else None
        return item is not None and item.loads

    # ------------------------------------------------------------------ what a step does
    def allocated(self, request: Any, index: int) -> None:
        """The engine has made room for an item, which this step loads or encodes."""
        identifier = request.mm_features[index].identifier
        self._engine_has.add(identifier)
        asked = self._asked.get(request.request_id)
        item = asked.items.pop(identifier, None) if asked is not None else None
        if item is None:
            return
        self.counters["items_hit" if item.loads else "items_missed"] += 1
        fetched = item.fetched
        if item.loads and fetched is not None and fetched.memory is not None:
            self._next.loads.append(Load(identifier, fetched.memory.place, item.name.form))
            self._loading.append((self._next.step, fetched))
        elif fetched is not None:
            self._shelf.give_back([fetched])
        wanted = item.audit or (self._writes and not item.stored)
        if wanted and self._namer.adapter_kept(request):
            self._next.saves[identifier] = Save(item.name, item.audit)

    def take_step(self, freed: Iterable[str]) -> StepItems:
        """What the step that is being planned loads and stores. `freed`: what the engine has dropped before it."""
        self._engine_has.difference_update(freed)
        self._waited_s = 0.0
        self._current = None
        this, self._next = self._next, StepItems(self._next.step + 1)
        self._mapped(this.step - self._steps_in_flight - 1)
        return this

    def step_done(self, step: int, counts: dict[str, int]) -> None:
        """The workers have run this step, and mapped what it loads."""
        self._mapped(step)
        self.counters.update(counts)

    def _mapped(self, step: int) -> None:
        self._shelf.give_back([fetched for number, fetched in self._loading if number <= step])
        self._loading = [(number, fetched) for number, fetched in self._loading if number > step]

    # ------------------------------------------------------------------ ends
    def finished(self, request_id: str) -> None:
        """The request ended; loads that are planned for it stay."""
        asked = self._asked.pop(request_id, None)
        if asked is None:
            return
        if asked.ticket is not None:
            self._give_back_later(asked.ticket)
        self._shelf.give_back([item.fetched for item in asked.items.values() if item.fetched is not None])

    def _give_back_later(self, ticket: Ticket[list[Item]]) -> None:
        """Nobody wants any more what is still on its way."""

        def give_back() -> None:
            if ticket.wait(2 * self._settings.deadline_s):
                self._shelf.give_back([item.fetched for item in ticket.result or () if item.fetched is not None])

        self._background.submit(give_back)

    def snapshot(self) -> dict[str, int]:
        """All counters."""
        return {**self._shelf.snapshot(), **self.counters}

    def close(self, timeout_s: float) -> None:
        """Wait a moment for what is under way."""
        self._background.flush(timeout_s)
