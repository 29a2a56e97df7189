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
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from mmcache.client.blocking import Client
from mmcache_connectors.vllm.background import Background, Ticket
from mmcache_connectors.vllm.ec_items import Load, Named, Save, is_bare, passes_through
from mmcache_connectors.vllm.ec_names import Namer
from mmcache_connectors.vllm.settings import EncoderSettings
from mmcache_connectors.vllm.shelf import Fetched, Lack, Shelf

log = logging.getLogger("mmcache.vllm")
THREADS: Final = 4


@dataclass(slots=True)
class Item:
    """What is known of one item of one request."""

    name: Named
    stored: bool
    fetched: Fetched | None = None
    no_room: bool = False
    audit: bool = False

    @property
    def loads(self) -> bool:
        """Whether the engine need not encode it."""
        return self.stored and not self.audit


@dataclass(slots=True)
class _Asked:
    """One request's items. `settled`: every item that ends after so many tokens has been looked up, or given up, in
    this `run` of it: preempted, it begins anew, and vLLM may have dropped what it had; a session is given more items.
    """

    epoch: str  # of the weights they were named in
    run: tuple[int, int]  # preemptions, items
    settled: int | None = None
    started_s: float = 0.0
    ticket: Ticket[list[Item]] | None = None
    waiting: set[str] = field(default_factory=set)  # identifiers the ticket is about
    items: dict[str, Item] = field(default_factory=dict)
    retried: bool = False  # what found no room


class EncoderScheduler:
    """Answers vLLM's scheduler. `counters` count since the start.

    `reads`: embeddings are loaded. `encodes_only`: the engine runs no language model, so what is stored need not be
    there at all. `steps_in_flight`: how many steps vLLM may plan before it has the first one's result.
    `placeholder_fields`: of a modality, the features that tell the size of an item's place, and nothing of the item.
    """

    def __init__(
        self, settings: EncoderSettings, namer: Namer, client: Client, shelf: Shelf, *,
        reads: bool, writes: bool, encodes_only: bool, steps_in_flight: int,
        placeholder_fields: Callable[[str], Collection[str]],
    ) -> None:  # fmt: skip
        self._settings, self._namer, self._client, self._shelf = settings, namer, client, shelf
        self._reads, self._writes, self._encodes_only = reads, writes, encodes_only
        self._steps_in_flight = steps_in_flight
        self._placeholder_fields = placeholder_fields
        self._background = Background("mmcache-encoder-lookup", THREADS)
        self._asked: dict[str, _Asked] = {}
        self._current: _Asked | None = None  # vLLM asks `has` about the request it asked `available` about last
        self._step = 0  # that is being planned
        self._loads: list[Load] = []
        self._saves: dict[str, Save] = {}
        self._hopeless: set[str] = set()  # requests that lack an embedding which only the cache could have had
        self._loading: list[tuple[int, Fetched]] = []  # in which step a worker maps it
        self._unwanted: list[Ticket[list[Item]]] = []  # on their way to nobody
        self._waited_s = 0.0
        self.counters: Counter[str] = Counter()

    # ------------------------------------------------------------------ what is known
    def available(self, request: Any, computed_tokens: int) -> bool:
        """False: some items the request needs are still being looked for; ask again in the next step."""
        asked = self._current = self._known(request)
        if asked.settled is not None and asked.settled <= computed_tokens:
            asked.settled = computed_tokens
            if asked.items:
                self._drop_passed(asked, request, computed_tokens)
            return True
        looking = asked.ticket is not None or self._look_up(request, asked, computed_tokens)
        if looking and not self._ended(asked):
            return False
        if self._may_retry(asked):
            return False
        if any(self._lacks(asked, feature, computed_tokens) for feature in request.mm_features):
            self._hopeless.add(request.request_id)
            return False
        asked.settled = computed_tokens
        return True

    def _known(self, request: Any) -> _Asked:
        """What is known of the request's items, of this run of it and under these weights."""
        asked, epoch = self._asked.get(request.request_id), self._namer.epoch
        if asked is not None and asked.epoch != epoch:
            self.finished(request.request_id)
            asked = None
        run = (request.num_preemptions, len(request.mm_features))
        if asked is None:
            asked = self._asked[request.request_id] = _Asked(epoch, run)
        elif asked.run != run:
            asked.run, asked.settled = run, None
        return asked

    def _may_retry(self, asked: _Asked) -> bool:
        """Once, for what found no room: steps have made some since, and it may be long ago, as vLLM asks again when it
        could run the request."""
        full = [identifier for identifier, item in asked.items.items() if item.no_room]
        if asked.retried or not full:
            return False
        asked.retried = True
        for identifier in full:
            del asked.items[identifier]
        return True

    def _lacks(self, asked: _Asked, feature: Any, computed_tokens: int) -> bool:
        """Whether the item can neither be loaded nor encoded: to run it would end vLLM's engine."""
        if _ends(feature) <= computed_tokens:
            return False
        item = asked.items.get(feature.identifier)
        if item is not None and item.fetched is not None:
            item.audit = item.audit and not self._bare(feature)
            return False
        return self._bare(feature)

    def _bare(self, feature: Any) -> bool:
        return is_bare(feature, self._placeholder_fields(feature.modality))

    def _drop_passed(self, asked: _Asked, request: Any, computed_tokens: int) -> None:
        """The engine is past these items without having asked: it had their embeddings itself."""
        ahead = {feature.identifier for feature in request.mm_features if _ends(feature) > computed_tokens}
        gone = [asked.items.pop(identifier) for identifier in asked.items.keys() - ahead]
        self._shelf.give_back([item.fetched for item in gone if item.fetched is not None])

    def take_hopeless(self) -> set[str]:
        """Requests that vLLM must give up: they came without an embedding, and the cache has none."""
        hopeless, self._hopeless = self._hopeless, set()
        return hopeless

    def _look_up(self, request: Any, asked: _Asked, computed_tokens: int) -> bool:
        """Begin to look for the items after `computed_tokens`; False if there is nothing to look for."""
        wanted = [
            index
            for index, feature in enumerate(request.mm_features)
            if _ends(feature) > computed_tokens
            and feature.identifier not in asked.items
            and not passes_through(feature)
            and (self._settings.trust_media_uuids or not self._bare(feature))
        ]
        if not wanted or not (self._reads or self._writes):
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
            stored = self._client.contains([name.key for name in names]) if self._encodes_only else [False] * len(names)
            return [Item(name, known) for name, known in zip(names, stored, strict=True)]
        fetched = self._shelf.fetch(names, self._settings.deadline_s)
        return [
            Item(name, True, one) if isinstance(one, Fetched) else Item(name, False, no_room=one is Lack.NO_ROOM)
            for name, one in zip(names, fetched, strict=True)
        ]

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
            self._unwanted.append(ticket)
        self.counters["items_unnamed"] += len(asked.waiting - asked.items.keys())
        asked.waiting = set()
        return True

    def has(self, identifier: str) -> bool:
        """Whether this item of the request that was asked about last need not be encoded."""
        item = self._current.items.get(identifier) if self._current is not None else None
        return item is not None and item.loads

    # ------------------------------------------------------------------ what a step does
    def allocated(self, request: Any, index: int) -> None:
        """The engine has made room for an item, which this step loads or encodes."""
        identifier = request.mm_features[index].identifier
        asked = self._asked.get(request.request_id)
        item = asked.items.pop(identifier, None) if asked is not None else None
        if item is None:
            return
        self.counters["items_hit" if item.loads else "items_missed"] += 1
        fetched = item.fetched
        if item.loads and fetched is not None and fetched.memory is not None:
            self._loads.append(Load(item.name, fetched.memory.place))
            self._loading.append((self._step, fetched))
        elif fetched is not None:
            self._shelf.give_back([fetched])
        wanted = item.audit or (self._writes and not item.stored)
        if wanted and self._namer.adapter_kept(request):
            self._saves[identifier] = Save(item.name, item.audit)

    def freed(self, request: Any, index: int) -> None:
        """The engine is past an item, and may drop its embedding. One that came without, and stands in the prompt once
        more, is looked up again, as it could not be encoded."""
        feature, asked = request.mm_features[index], self._asked.get(request.request_id)
        again = any(one.identifier == feature.identifier for one in request.mm_features[index + 1 :])
        if asked is not None and again and self._bare(feature):
            asked.settled = None

    def take_step(self) -> tuple[int, list[Load], dict[str, Save]]:
        """(the number of the step that is being planned, what it loads, what it stores by identifier)."""
        self._waited_s = 0.0
        self._current = None
        step, loads, saves = self._step, self._loads, self._saves
        self._step, self._loads, self._saves = step + 1, [], {}
        self._mapped(step - self._steps_in_flight - 1)
        if self._unwanted:
            self._give_back_unwanted()
        return step, loads, saves

    def step_done(self, step: int, counts: dict[str, int]) -> None:
        """The workers have run this step, and mapped what it loads. One that could not had to ask the cache, which may
        fail: nothing more is promised to it."""
        self._mapped(step)
        self.counters.update(counts)
        if self._reads and counts.get("loads_unmapped"):
            self._reads = False
            log.warning("mmcache: as a worker cannot map what is fetched for it, embeddings are encoded from now on")

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
            self._unwanted.append(asked.ticket)
        self._shelf.give_back([item.fetched for item in asked.items.values() if item.fetched is not None])

    def _give_back_unwanted(self) -> None:
        """Of what nobody wants any more, that which has come by now."""
        unwanted, self._unwanted = self._unwanted, []
        for ticket in unwanted:
            if ticket.done():
                self._shelf.give_back([item.fetched for item in ticket.result or () if item.fetched is not None])
            else:
                self._unwanted.append(ticket)

    def snapshot(self) -> dict[str, int]:
        """All counters."""
        return {**self._shelf.snapshot(), **self.counters}

    def close(self, timeout_s: float) -> None:
        """Wait a moment for what is under way."""
        self._background.flush(timeout_s)


def _ends(feature: Any) -> int:
    """The first token after the item."""
    return int(feature.mm_position.offset + feature.mm_position.length)
