"""How items are named in SGLang's encoder process: by what each is, not by 64 bits of its bytes.

SGLang 0.5.23 knows an embedding, in the host memory of its own and in the store behind it, by a hash of 64 bits over
feature bytes alone: a row and a column of the same tiles are one item to it. Sound that is not the first of its request
it takes for empty, so all such are one item. And whoever sends a request may give the hashes. Two methods of its
encoder are changed when the store is made, so that both tiers use the names from here. Nothing of SGLang is imported
until then.
"""

from __future__ import annotations

import functools
import inspect
import logging
import re
import uuid
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Final

from mmcache.encoding import canonical, digest
from mmcache_connectors.sglang.media import item_identity

log = logging.getLogger("mmcache.sglang")
DOMAIN: Final = "mmcache.sglang.embedding.1"
_NAME: Final = re.compile(r"[0-9a-f]{64}")
# The methods that are changed, and the parameters they are known by.
KNOWN: Final[Mapping[str, tuple[str, ...]]] = {
    "_calculate_hashes_from_features": ("self", "mm_feature", "grid_thw", "modality", "mm_inputs"),
    "_prepare_encode_context": ("self", "requests", "modality", "use_global_cache", "is_health_check"),
    "_build_model_mm_items": ("self", "mm_feature", "preprocess_result", "indices", "modality"),
}
_said: set[str] = set()


def item_names(encoder: Any, feature: Any, grids: Sequence[Any], modality: Any, inputs: Any = None) -> list[str]:
    """For each item 64 hexadecimal digits over all that the encoder's model is shown of it.

    What a processor gives for all items together (sound comes with one mask) the model is shown with each: it is in the
    name then, with the item's place. An item that cannot be identified gets a name nobody will ask for again.
    """
    layout = SimpleNamespace(mm_inputs=inputs, grid_thw=grids)
    return [_name(encoder, feature, layout, place, modality) for place in range(len(grids))]


def item_digest(name: str) -> bytes | None:
    """The 32 bytes of a name made here; None for any other."""
    return bytes.fromhex(name) if isinstance(name, str) and _NAME.fullmatch(name) else None


def _name(encoder: Any, feature: Any, layout: Any, place: int, modality: Any) -> str:
    from sglang.srt.disaggregation.encoder.preprocessor import _mm_grid_attrs
    from sglang.srt.multimodal.encoder_preprocessing import get_encoder_preprocessed_items

    try:
        own = get_encoder_preprocessed_items(layout.mm_inputs) is not None
        made = encoder._build_model_mm_items(feature, layout, [place], modality)
        shared = not own and any(set(item.model_specific_data) - {*_mm_grid_attrs[modality]} for item in made)
        fields = [["int", place] if shared else None, [item_identity(item) for item in made]]
        return digest(DOMAIN, canonical(fields, "item")).hex()
    except Exception as error:
        if type(error).__name__ not in _said:
            _said.add(type(error).__name__)
            log.warning("mmcache: a media item cannot be identified (%s): such items are not cached", error)
        return f"once-{uuid.uuid4().hex}"


def install() -> None:
    """Change the encoder, once a process. Raises RuntimeError if this SGLang's is not the one that is known."""
    from sglang.srt.disaggregation.encoder.server import MMEncoder

    if MMEncoder._calculate_hashes_from_features is item_names:
        return
    for name, parameters in KNOWN.items():
        method = getattr(MMEncoder, name, None)
        if method is None or tuple(inspect.signature(method).parameters) != parameters:
            raise RuntimeError(
                f"this SGLang's MMEncoder has no {name}({', '.join(parameters)}); use a version named in docs/sglang.md"
            )
    prepare = MMEncoder._prepare_encode_context

    @functools.wraps(prepare)
    async def prepare_unhashed(self: Any, requests: list[dict[str, Any]], modality: Any, **more: Any) -> Any:
        return await prepare(self, [request | {"hashes": None} for request in requests], modality, **more)

    MMEncoder._calculate_hashes_from_features = item_names
    MMEncoder._prepare_encode_context = prepare_unhashed
