"""From the media items of a vLLM request to the keys of their embeddings.

Nothing of vLLM is imported: features are read by their attributes (vllm/multimodal/inputs.py, 0.32).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mmcache.keys import embedding_key
from mmcache.keyset import Key
from mmcache.media import MODALITIES, Media
from mmcache_connectors.vllm.adapters import AdapterIdentities
from mmcache_connectors.vllm.ec_facts import EncoderFacts
from mmcache_connectors.vllm.ec_items import Named, media_of, passes_through
from mmcache_connectors.vllm.ec_shared import SharedNames
from mmcache_connectors.vllm.items import ItemIdentities
from mmcache_connectors.vllm.lookup import Namespaces


class Namer:
    """Names items. Thread-safe; a new item costs a hash of its features."""

    def __init__(
        self, facts: EncoderFacts, items: ItemIdentities, adapters: AdapterIdentities, patch_size: int | None,
        shared: SharedNames | None = None,
    ) -> None:  # fmt: skip
        self._facts, self._items, self._adapters = facts, items, adapters
        self._patch_size = patch_size
        self._shared = shared
        self._epoch = facts.epoch
        self._namespaces = Namespaces(facts.get, kind="embedding")

    def names(self, request: Any, indices: Iterable[int]) -> list[Named]:
        """Those of the request's items that have an identity and are worth a place in the cache, once each."""
        epoch = self.epoch
        if self._epoch != epoch:
            self._namespaces.forget()
            if self._shared is not None:
                self._shared.namespaces.forget()
            self._epoch = epoch
        adapter = self._adapters.of_request(request) if self._facts.adapters_count else ""
        if adapter is None:
            return []
        namespace = self._namespaces.get(adapter, request.cache_salt or "")
        if namespace is None:
            return []
        found: dict[str, Named] = {}
        for feature in [request.mm_features[index] for index in indices]:
            item = self._item(request, feature) if feature.identifier not in found else None
            if item is not None:
                form = self._facts.form(feature.modality, feature.mm_position.get_num_embeds())
                key = self._shared_key(feature, item, request.cache_salt or "") or embedding_key(namespace, item)
                found[feature.identifier] = Named(feature.identifier, key, form, self._media(feature))
        return list(found.values())

    def _shared_key(self, feature: Any, item: bytes, salt: str) -> Key | None:
        if self._shared is None or (namespace := self._shared.namespaces.get("", salt)) is None:
            return None
        picture = self._shared.item(feature, item)
        return None if picture is None else embedding_key(namespace, picture)

    @property
    def epoch(self) -> str:
        """Of the weights: what was named in another one is not to be used."""
        return self._facts.epoch

    def _item(self, request: Any, feature: Any) -> bytes | None:
        """The item's digest; None if it has none, or if the request calls something else by the same name. vLLM has one
        embedding for the name then, of the one or the other: an encoder's output of this, or a tensor of a client's."""
        named = [one for one in request.mm_features if one.identifier == feature.identifier]
        if any(passes_through(one) for one in named):
            return None
        digests = {self._items.shown(one) for one in named}
        return digests.pop() if len(digests) == 1 else None

    def adapter_kept(self, request: Any) -> bool:
        """Whether the adapter the items were named for is still that one. Looks at the disk."""
        counts = self._facts.adapters_count and request.lora_request is not None
        return not counts or self._adapters.unchanged(request.lora_request.lora_int_id)

    def _media(self, feature: Any) -> Media | None:
        if feature.modality not in MODALITIES:
            return None
        fields = {name: one.data for name, one in (feature.data or {}).items()}
        return media_of(feature.modality, fields, self._patch_size)
