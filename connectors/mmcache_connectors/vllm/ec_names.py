"""From the media items of a vLLM request to the keys of their embeddings.

Nothing of vLLM is imported: features are read by their attributes (vllm/multimodal/inputs.py, 0.32).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mmcache.keys import embedding_key
from mmcache.media import MODALITIES, Media
from mmcache_connectors.vllm.adapters import AdapterIdentities
from mmcache_connectors.vllm.ec_facts import EncoderFacts
from mmcache_connectors.vllm.ec_items import Named, media_of
from mmcache_connectors.vllm.items import ItemIdentities
from mmcache_connectors.vllm.lookup import Namespaces


class Namer:
    """Names items. Thread-safe; a new item costs a hash of its features."""

    def __init__(
        self, facts: EncoderFacts, items: ItemIdentities, adapters: AdapterIdentities, patch_size: int | None
    ) -> None:
        self._facts, self._items, self._adapters = facts, items, adapters
        self._patch_size = patch_size
        self._epoch = facts.epoch
        self._namespaces = Namespaces(facts.get, kind="embedding")

    def names(self, request: Any, indices: Iterable[int]) -> list[Named]:
        """Those of the request's items that have an identity and are worth a place in the cache, once each."""
        if self._epoch != self._facts.epoch:
            self._epoch = self._facts.epoch
            self._namespaces.forget()
        adapter = self._adapters.of_request(request) if self._facts.adapters_count else ""
        if adapter is None:
            return []
        namespace = self._namespaces.get(adapter, request.cache_salt or "")
        if namespace is None:
            return []
        found: dict[str, Named] = {}
        for index in indices:
            feature = request.mm_features[index]
            item = self._items.shown(feature) if feature.identifier not in found else None
            if item is not None:
                form = self._facts.form(feature.modality, feature.mm_position.get_num_embeds())
                key = embedding_key(namespace, item)
                found[feature.identifier] = Named(feature.identifier, key, form, self._media(feature))
        return list(found.values())

    def adapter_kept(self, request: Any) -> bool:
        """Whether the adapter the items were named for is still that one. Looks at the disk."""
        counts = self._facts.adapters_count and request.lora_request is not None
        return not counts or self._adapters.unchanged(request.lora_request.lora_int_id)

    def _media(self, feature: Any) -> Media | None:
        if feature.modality not in MODALITIES:
            return None
        fields = {name: one.data for name, one in (feature.data or {}).items()}
        return media_of(feature.modality, fields, self._patch_size)
