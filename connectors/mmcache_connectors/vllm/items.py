"""What a vLLM request shows the model beside its tokens: media items and prompt embeddings, as mmcache spans.

vLLM names an item by an identifier that a client may set as it likes, and keeps encoder outputs and its own KV blocks
under that name. So an item's identity here is the identifier together with a digest of the processed features, which
hold all that the model will see (pixels after any max_pixels, frames after any fps, timestamps, grids), and an
identifier that stood for two different things is not trusted again. Feature classes: vllm/multimodal/inputs.py, 0.32.
Every digest is made by the functions of docs/keys.md, over canonical encodings.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, Final

import numpy as np
import torch

from mmcache import PlaceholderSpan, item_digest, media_digest
from mmcache.encoding import canonical
from mmcache.errors import KeyInputError

log = logging.getLogger("mmcache.vllm")

REMEMBERED: Final = 65536  # identifiers; at most some 20 MB. More than an engine's own caches hold items
MAX_WARNINGS: Final = 16
_SHM_FIELDS: Final = frozenset({"address", "monotonic_id", "signature"})  # where the features lie, not what they are
_UNTRUSTED: Final = b""


class ItemIdentities:
    """The media items of one engine's requests, and what each identifier has stood for. Any thread may call.

    Features are vLLM's MultiModalFeatureSpec: `identifier`, `modality`, `mm_position` (`offset`, `length`, `is_embed`)
    and `data` (field name -> element with `data`), or None where an engine process was not sent them again.

    Every request of the engine with media must be given to `distrust` before it runs, cached or not: whatever it leaves
    in vLLM's encoder and prefix caches answers later requests that use the same identifiers.
    """

    def __init__(self, *, trust_uuids: bool) -> None:
        """With `trust_uuids` an identifier is believed: no features are hashed, and a client can name what it likes."""
        self._trust_uuids = trust_uuids
        self._lock = threading.Lock()
        self._warned: set[str] = set()
        self._known: OrderedDict[str, bytes] = OrderedDict()  # identifier -> features' digest or _UNTRUSTED
        # id of a data object -> (the object, weakly; its digest): an engine gives the same object again for an item it
        # holds. Weak, as a strong reference would keep every picture in memory; the reference tells a reused id apart.
        self._digests: dict[int, tuple[weakref.ref[Any], bytes]] = {}
        self._unhashed: dict[str, weakref.ref[Any]] = {}  # identifier -> features that ran before they were hashed

    def spans(self, features: Sequence[Any]) -> tuple[list[PlaceholderSpan], int | None]:
        """The spans of a request's items, sorted and disjoint, and how many leading tokens may be cached (None: all).

        The limit is where the first item begins whose identity is unknown: its features are not here and never were,
        they have no canonical form, or its identifier is not trusted; no span at or past it is given. Items at the same
        positions (a video and its sound) make one span. A new item costs a hash of its features (milliseconds), the
        same again some microseconds: ask again before blocks are saved, as an identifier may have lost its trust
        since. Never raises.
        """
        places = []
        for feature in features:
            position = feature.mm_position
            try:
                content = self._content(feature)
                item = None if content is None else _item(content, _mask(position.is_embed))
            except Exception as error:  # whatever a processor made: it costs this item's caching, nothing else
                self._warn(f"{feature.modality} items like this one are not cached, as they have no identity: {error}")
                item = None
            places.append((int(position.offset), int(position.length), item))
        return _joined(places)

    def shown(self, feature: Any) -> bytes | None:
        """The item's digest by what an encoder is shown of it, whatever it is called; None if that is not here.

        An encoder's output depends on nothing else. With `trust_uuids` it goes by the identifier. Never raises.
        """
        try:
            if self._trust_uuids:
                return item_digest(_named(feature.modality, feature.identifier))
            digest = self._features_digest(feature.data)
            return None if digest is None else item_digest(_named(feature.modality, digest))
        except Exception as error:
            self._warn(f"{feature.modality} items like this one are not cached, as they have no identity: {error}")
            return None

    def distrust(self, features: Sequence[Any]) -> None:
        """A request is about to run: what `spans` has not identified in it makes its identifier unknown; until it has,
        if the features are here, for good if not.

        Nothing is hashed, and nothing happens to items that were identified: microseconds.
        """
        for feature in features:
            here = _fields(feature.data) is not None
            digest = self._hashed(feature.data)
            with self._lock:
                known = self._known.get(feature.identifier)
                if here and digest is None and known != _UNTRUSTED:
                    self._run_unhashed(feature)
                elif known is None or (here and digest != known):
                    self._set(feature.identifier, _UNTRUSTED)

    def _run_unhashed(self, feature: Any) -> None:
        """Its features are still to be hashed, by a thread that was too slow: doubtful until they are."""
        before = self._unhashed.get(feature.identifier)
        if before is not None and before() is not feature.data:
            self._set(feature.identifier, _UNTRUSTED)
        elif len(self._unhashed) < REMEMBERED:
            self._unhashed[feature.identifier] = weakref.ref(feature.data)
        else:
            self._set(feature.identifier, _UNTRUSTED)

    def _content(self, feature: Any) -> bytes | None:
        """32 bytes for what the feature is, apart from where it stands; None if that is unknown."""
        if self._trust_uuids:
            return _named(feature.modality, feature.identifier)
        digest = self._features_digest(feature.data)
        with self._lock:
            known = self._known.get(feature.identifier)
            unhashed = self._unhashed.get(feature.identifier)
            if unhashed is not None and unhashed() is not feature.data:
                if unhashed() is not None:
                    return None  # until what ran under this identifier is known
                known = _UNTRUSTED  # it never will be
            self._unhashed.pop(feature.identifier, None)
            if known is not None and digest is not None and digest != known != _UNTRUSTED:
                self._warn(
                    "two different items came under one identifier; items under such identifiers are not cached from "
                    "now on: a client that sets uuids must not use one for two things"
                )
                known = _UNTRUSTED
            elif known is None:
                known = digest
            if known is None:
                return None
            self._set(feature.identifier, known)
        return _named(feature.modality, feature.identifier, known) if known != _UNTRUSTED else None

    def _set(self, identifier: str, digest: bytes) -> None:
        self._known[identifier] = digest
        self._known.move_to_end(identifier)
        if len(self._known) > REMEMBERED:
            self._known.popitem(last=False)

    def _features_digest(self, data: Any) -> bytes | None:
        """32 bytes over every field of the processed features, once for each object; None if they are not here."""
        digest = self._hashed(data)
        fields = _fields(data)
        if digest is not None or fields is None:
            return digest
        structure = {name: _described(value, name) for name, value in fields.items()}
        digest = media_digest(canonical(structure, "features"), "vllm_features")
        self._remember(data, digest)
        return digest

    def _hashed(self, data: Any) -> bytes | None:
        memo = self._digests.get(id(data))
        return memo[1] if memo is not None and memo[0]() is data else None

    def _remember(self, data: Any, digest: bytes) -> None:
        place, digests = id(data), self._digests

        def forget(gone: weakref.ref[Any]) -> None:  # runs wherever the object dies: it may not lock
            memo = digests.get(place)
            if memo is not None and memo[0] is gone:
                digests.pop(place, None)

        digests[place] = (weakref.ref(data, forget), digest)

    def _warn(self, message: str) -> None:
        """Once for each message: a client that does it on purpose must not fill the log."""
        if message not in self._warned and len(self._warned) < MAX_WARNINGS:
            self._warned.add(message)
            log.warning("%s", message)


def embed_spans(
    prompt_embeds: torch.Tensor, is_token_ids: Sequence[bool] | None, block_size: int
) -> list[PlaceholderSpan]:
    """Spans for a prompt of embeddings, `[tokens, hidden]`: one for each piece of a block whose rows are embeddings.

    `is_token_ids` says which positions are tokens instead; None: none of them. vLLM gives the other positions a token
    id that means nothing (0), so their identity is the rows' own bytes. Pieces end at block borders, which is why
    prompts that begin alike share blocks. Raises ValueError if the two do not have one length.
    """
    count = len(prompt_embeds)
    embeds = np.ones(count, np.bool_) if is_token_ids is None else ~np.asarray(is_token_ids, np.bool_)
    if embeds.shape != (count,):
        raise ValueError(f"{count} rows of prompt embeddings, but {embeds.size} marks of what is a token")
    borders = np.flatnonzero(np.diff(embeds, prepend=False, append=False)).tolist()
    rows = prompt_embeds.detach().cpu()
    spans = []
    for begin, end in zip(borders[::2], borders[1::2], strict=True):
        while begin < end:
            stop = min(end, (begin // block_size + 1) * block_size)
            content = media_digest(canonical(_described(rows[begin:stop], "prompt_embeds"), "rows"), "vllm_embeds")
            spans.append(PlaceholderSpan(begin, stop - begin, item_digest(content)))
            begin = stop
    return spans


def _fields(data: Any) -> dict[str, Any] | None:
    """The processed features by name; None if they are not here: left out, or put into shared memory by address."""
    fields = {name: element.data for name, element in data.items()} if data is not None else {}
    missing = not fields or fields.keys() >= _SHM_FIELDS or any(value is None for value in fields.values())
    return None if missing else fields


def _described(value: Any, path: str) -> list[Any]:
    """Processed features as a plain value: a tensor by dtype, shape and digest, a list or tuple by its elements."""
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided or value.is_meta or value.is_quantized:
            raise KeyInputError(
                f"{path}: a {value.layout} tensor on {value.device} has no plain bytes; use a dense one"
            )
        dense = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
        flat = dense.as_strided((dense.numel(),), (1,))  # a size of 1 may have any stride; reshape would keep it
        data = flat.view(torch.uint8).numpy().data if flat.numel() else b""
        return ["tensor", str(value.dtype), list(value.shape), media_digest(data, "tensor")]
    if isinstance(value, (list, tuple)):
        return ["list", [_described(element, f"{path}[{place}]") for place, element in enumerate(value)]]
    return ["value", value]


def _named(*facts: object) -> bytes:
    return media_digest(canonical(list(facts), "item"), "vllm_item")


def _mask(is_embed: Any) -> bytes | None:
    return None if is_embed is None else is_embed.to(torch.bool).cpu().numpy().tobytes()


@lru_cache(maxsize=1024)
def _item(content: bytes, mask: bytes | None) -> bytes:
    return item_digest(content, is_embed=None if mask is None else list(map(bool, mask)))


def _joined(places: Iterable[tuple[int, int, bytes | None]]) -> tuple[list[PlaceholderSpan], int | None]:
    """Disjoint spans of (offset, length, item) in order, items that overlap as one, and where the first unknown is."""
    groups: list[list[tuple[int, int, bytes | None]]] = []
    end = 0
    for place in sorted(places, key=lambda place: place[:2]):
        if groups and place[0] < end:
            groups[-1].append(place)
        else:
            groups.append([place])
        end = max(end, place[0] + place[1])
    spans: list[PlaceholderSpan] = []
    for group in groups:
        offset = group[0][0]
        length = max(start + size for start, size, _ in group) - offset
        known = [(start - offset, size, item) for start, size, item in group if item is not None]
        if len(known) < len(group) or length < 1:
            return spans, offset
        item = known[0][2] if len(group) == 1 else item_digest(_named("together", sorted(known)))
        spans.append(PlaceholderSpan(offset, length, item))
    return spans, None
