"""What the connectors of one engine would each compute: which weights it has, which items and adapters it was shown.

Both read the same files and the same features, and what an identifier has stood for is one question for the engine.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any

from mmcache_connectors.vllm.adapters import AdapterIdentities
from mmcache_connectors.vllm.items import ItemIdentities
from mmcache_connectors.vllm.weights import WeightsIdentity

_LOCK = threading.Lock()
_SHARED: dict[int, tuple[weakref.ref[Any], Identities]] = {}  # by the id of the engine's model_config


class Identities:
    """One engine's. Thread-safe; what is asked for in two ways (by other settings) is kept for each."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._weights: dict[str, WeightsIdentity] = {}
        self._items: dict[bool, ItemIdentities] = {}
        self.adapters = AdapterIdentities()
        self.epoch = ""  # of the weights; '' until they were updated in place

    def weights(self, vllm_config: Any, name: str) -> WeightsIdentity:
        """The weights' identity, being computed; `name` is the operator's own for them, '' for none."""
        with self._lock:
            if name not in self._weights:
                self._weights[name] = WeightsIdentity(vllm_config, name or None)
            return self._weights[name]

    def items(self, *, trust_uuids: bool) -> ItemIdentities:
        """What identifiers stand for; see ItemIdentities."""
        with self._lock:
            return self._items.setdefault(trust_uuids, ItemIdentities(trust_uuids=trust_uuids))

    def new_epoch(self) -> str:
        """The weights were updated in place: nothing of the old ones is found from now on."""
        self.epoch = os.urandom(16).hex()
        return self.epoch


def shared_identities(vllm_config: Any) -> Identities:
    """The one of the engine with this configuration, made when first asked for. Of the configuration itself a connector
    inside vLLM's MultiConnector is given a copy; the model's, which is in it, is one object."""
    model, place = vllm_config.model_config, id(vllm_config.model_config)
    with _LOCK:
        known = _SHARED.get(place)
        if known is None or known[0]() is not model:
            known = (weakref.ref(model, lambda gone: _SHARED.pop(place, None)), Identities())
            _SHARED[place] = known
        return known[1]
