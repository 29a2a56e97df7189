"""Off the scheduler's thread: what a request's blocks are called, and which of them the cache holds."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Final

from mmcache.chain import PlaceholderSpan
from mmcache.client.blocking import Client
from mmcache.client.pin import Pinned
from mmcache.explain import Item, Recorded, record
from mmcache.keys import Namespace
from mmcache.keyset import Keys, woven
from mmcache_connectors.vllm.adapters import AdapterIdentities
from mmcache_connectors.vllm.groups import FULL, Parts, longest_hit
from mmcache_connectors.vllm.items import ItemIdentities, embed_spans
from mmcache_connectors.vllm.requests import Chain

NO_LIMIT: Final = 1 << 62
MAX_NAMESPACES: Final = 4096
STORED_LAYOUT: Final = "LHNC"  # layers, heads, tokens, K then V: what paged.py makes of every physical layout


class Namespaces:
    """The engine's namespaces: one per adapter and cache_salt, all from the same facts. Thread-safe.

    `facts` gives the engine's facts, or None while the weights or the workers are not known yet.
    """

    def __init__(self, facts: Callable[[], Mapping[str, object] | None], **fixed: Any) -> None:
        """`fixed`: what every namespace has besides the facts: its kind, and what that kind wants."""
        self._facts, self._fixed = facts, fixed
        self._made: OrderedDict[tuple[str, str], Namespace] = OrderedDict()
        self._lock = threading.Lock()
        self._generation = 0

    def get(self, adapter: str, salt: str) -> Namespace | None:
        """The namespace for an adapter's identity and a salt ('' for none); None while it cannot be known."""
        with self._lock:
            found = self._made.get((adapter, salt))
            if found is not None:
                self._made.move_to_end((adapter, salt))
                return found
            generation = self._generation
        facts = self._facts()
        if facts is None:
            return None
        narrow = {name: text for name, text in (("adapter", adapter), ("cache_salt", salt)) if text}
        made = Namespace(**{**self._fixed, **facts, **narrow})
        with self._lock:
            if generation != self._generation:
                return None
            self._made[(adapter, salt)] = made
            if len(self._made) > MAX_NAMESPACES:
                self._made.popitem(last=False)
        return made

    def forget(self) -> None:
        """The facts changed: weights were updated."""
        with self._lock:
            self._generation += 1
            self._made.clear()


class Identifier:
    """From a vLLM request to its Chain."""

    def __init__(
        self, namespaces: Namespaces, block_tokens: int, items: ItemIdentities, adapters: AdapterIdentities
    ) -> None:
        self._namespaces, self._block_tokens = namespaces, block_tokens
        self._items, self._adapters = items, adapters

    def chain(self, request: Any) -> Chain | None:
        """The chain over the tokens the request has now; None if it must not be cached."""
        content = self._content(request)
        if content is None:
            return None
        namespace, spans, limit_tokens = content
        token_ids = list(request.all_token_ids)
        hasher = namespace.hasher()
        keys = hasher.extend(token_ids, spans)
        return Chain(hasher, keys, len(token_ids), self._limit_blocks(limit_tokens))

    def recorded(self, request: Any) -> Recorded | None:
        """What its prompt's keys are made of, to be kept; None if it must not be cached."""
        content = self._content(request)
        if content is None:
            return None
        namespace, spans, _ = content
        features = {int(one.mm_position.offset): one for one in reversed(request.mm_features)}
        about = [
            {"modality": features[span.offset].modality, "identifier": features[span.offset].identifier}
            if span.offset in features
            else {}
            for span in spans
        ]
        token_ids = request.all_token_ids[: request.num_prompt_tokens]
        return record(namespace, token_ids, map(Item, spans, about))

    def _content(self, request: Any) -> tuple[Namespace, list[PlaceholderSpan], int | None] | None:
        """(namespace, spans, the leading tokens that may be cached); None if it must not be."""
        spans, limit_tokens = self._items.spans(request.mm_features)
        adapter = self._adapters.of_request(request)
        if adapter is None:
            return None
        namespace = self._namespaces.get(adapter, request.cache_salt or "")
        if namespace is None:
            return None
        if request.prompt_embeds is not None:
            spans += embed_spans(request.prompt_embeds, request.prompt_is_token_ids, self._block_tokens)
        return namespace, spans, limit_tokens

    def limit_blocks(self, request: Any) -> int:
        """As the chain's, now: what an identifier stands for may have become doubtful since."""
        return self._limit_blocks(self._items.spans(request.mm_features)[1]) if request.mm_features else NO_LIMIT

    def adapter_kept(self, request: Any) -> bool:
        """Whether the adapter the chain was made for is still that one, in files and by name. Looks at the disk."""
        return self._adapters.unchanged(request.lora_request.lora_int_id)

    def runs(self, request: Any) -> None:
        """A request runs now. Items it brings that nobody identified may answer later requests, under their names, from
        the engine's own caches: those names are not trusted again. Does nothing for items that are identified."""
        if request.mm_features:
            self._items.distrust(request.mm_features)

    def _limit_blocks(self, limit_tokens: int | None) -> int:
        return NO_LIMIT if limit_tokens is None else limit_tokens // self._block_tokens


def query(client: Client, parts: Parts, keys: Keys, block_tokens: int) -> tuple[int, Pinned]:
    """(how many leading blocks of `keys` are a hit in every group, what is pinned for it).

    Blocks under full attention are pinned as far as the server allows. Others may leave in between: a failed load.
    """
    full = [group.index for group in parts.groups if group.kind == FULL]
    columns = [keys.for_part(part) for index in full for part in parts.of_group[index]]
    pinned, limit = Pinned(0), len(keys)
    if columns:
        pinned = client.pin_prefix(woven(columns))
        limit = pinned.count // len(columns)
    present = [[True] * limit for _ in parts.groups]
    for group in parts.groups:
        if group.kind != FULL and limit:
            flags = [client.contains(keys[:limit].for_part(part)) for part in parts.of_group[group.index]]
            present[group.index] = [all(row) for row in zip(*flags, strict=True)]
    return longest_hit(parts.groups, present, limit, block_tokens), pinned
