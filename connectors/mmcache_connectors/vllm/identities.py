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
_SHARED: dict[int, tuple[weakref.ref[Any], Identities]] = {}  # by the id of the engine's configuration


class Identities:
    """One engine's. Thread-safe; what is asked for in two ways (by other settings) is kept for each."""

    def __init__(self, vllm_config: Any) -> None:
        self._config = weakref.ref(vllm_config)
        self._lock = threading.Lock()
        self._weights: dict[str, WeightsIdentity] = {}
        self._items: dict[bool, ItemIdentities] = {}
        self.adapters = AdapterIdentities()
        self.epoch = ""  # of the weights; '' until they were updated in place

    def weights(self, name: str) -> WeightsIdentity:
        """The weights' identity, being computed; `name` is the operator's own for them, '' for none."""
        with self._lock:
            if name not in self._weights:
                self._weights[name] = WeightsIdentity(self._config(), name or None)
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
    """The one of the engine with this configuration, made when first asked for."""
    with _LOCK:
        known = _SHARED.get(id(vllm_config))
        if known is None or known[0]() is not vllm_config:
            place = id(vllm_config)
            known = (weakref.ref(vllm_config, lambda gone: _SHARED.pop(place, None)), Identities(vllm_config))
            _SHARED[place] = known
        return known[1]
