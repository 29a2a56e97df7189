"""How items are named in SGLang's encoder process: by what each is, not by 64 bits of its bytes.

SGLang 0.5.23 knows an embedding, in the host memory of its own and in the store behind it, by a hash of 64 bits over
feature bytes alone: a row and a column of the same tiles are one item to it. Sound that is not the first of its request
it takes for empty, so all such are one item. And whoever sends a request may give the hashes. Two methods of its
encoder are changed when the store is made, so that both tiers use the names from here. Nothing of SGLang is imported
until then.

What has no name here is not cached, as its embedding might be wrong:
- items of one request for which the processor gives something together, as one mask for all sounds. When only some of
  them are to be encoded SGLang shows the model the whole of it all the same, and rows of one may become another's;
- films of which a rank has decoded its own share of frames.
"""

from __future__ import annotations

import functools
import inspect
import logging
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Final

from mmcache.encoding import canonical, digest
from mmcache_connectors.sglang.media import Unidentified, item_identity

log = logging.getLogger("mmcache.sglang")
DOMAIN: Final = "mmcache.sglang.embedding.1"
TIMES: Final = frozenset({"second_per_grid_ts", "video_timestamps"})  # of all films together, and no encoder reads them
MOST_SAID: Final = 20
_NAME: Final = re.compile(r"(image|video|audio)-([0-9a-f]{64})")
_SHARED_NAME: Final = re.compile(r"image-shared-([0-9a-f]{64})")  # as other kinds of engines name the picture
# The methods that are changed, and the parameters they are known by.
KNOWN: Final[Mapping[str, tuple[str, ...]]] = {
    "_calculate_hashes_from_features": ("self", "mm_feature", "grid_thw", "modality", "mm_inputs"),
    "_prepare_encode_context": ("self", "requests", "modality", "use_global_cache", "is_health_check"),
    "_build_model_mm_items": ("self", "mm_feature", "preprocess_result", "indices", "modality"),
}
Picture = Callable[[Any, list[Any]], bytes | None]  # of an encoder and an item as its model is shown it
_said: set[str] = set()
_shared: list[Picture] = []  # one, where names are shared


def item_names(encoder: Any, feature: Any, grids: Sequence[Any], modality: Any, inputs: Any = None) -> list[str]:
    """For each item its modality and 64 hexadecimal digits over all that the encoder's model is shown of it.

    An item that has no name gets one that nobody will ask for again, so that nothing is found for it or stored.
    """
    layout = SimpleNamespace(mm_inputs=inputs, grid_thw=grids)
    return [_name(encoder, feature, layout, place, modality) for place in range(len(grids))]


def digest_of(name: str) -> bytes | None:
    """The item's 32 bytes, of a name made here; None for any other."""
    found = _NAME.fullmatch(name) if isinstance(name, str) else None
    return bytes.fromhex(found[2]) if found else None


def modality_of(name: str) -> str:
    """The item's modality, of a name that has a digest: "image", "video" or "audio"."""
    return name.partition("-")[0]


def shared_digest_of(name: str) -> bytes | None:
    """The picture's 32 bytes, of a name made here that other kinds of engines use too; None for any other."""
    found = _SHARED_NAME.fullmatch(name) if isinstance(name, str) else None
    return bytes.fromhex(found[1]) if found else None


def _name(encoder: Any, feature: Any, layout: Any, place: int, modality: Any) -> str:
    try:
        for picture in _shared if modality.name == "IMAGE" else ():
            made = encoder._build_model_mm_items(feature, layout, [place], modality)
            if (shared := picture(encoder, made)) is not None:
                return f"image-shared-{shared.hex()}"
        return f"{modality.name.lower()}-{_identity(encoder, feature, layout, place, modality).hex()}"
    except Exception as error:
        said = str(error) if isinstance(error, Unidentified) else repr(error)
        if said not in _said and len(_said) < MOST_SAID:
            _said.add(said)
            log.warning("mmcache: such items are not cached: %s", said)
        return f"once-{uuid.uuid4().hex}"


def _identity(encoder: Any, feature: Any, layout: Any, place: int, modality: Any) -> bytes:
    from sglang.srt.disaggregation.encoder.preprocessor import _mm_grid_attrs
    from sglang.srt.multimodal.encoder_preprocessing import get_encoder_preprocessed_items

    if modality.name == "VIDEO" and _in_shares():
        raise Unidentified("films of which each rank decodes its share (--mm-enable-dp-encoder)")
    made = encoder._build_model_mm_items(feature, layout, [place], modality)
    together: set[str] = set()
    if get_encoder_preprocessed_items(layout.mm_inputs) is None:
        together = {name for item in made for name in item.model_specific_data} - {*_mm_grid_attrs[modality]}
    if len(layout.grid_thw) > 1 and together - TIMES:
        raise Unidentified(f"several items of {modality.name} with {', '.join(sorted(together - TIMES))} in common")
    fields = [["int", place] if together else None, [item_identity(item) for item in made]]
    return digest(DOMAIN, canonical(fields, "item"))


def _in_shares() -> bool:
    from sglang.srt.runtime_context import get_mm, get_parallel

    return bool(get_mm().mm_enable_dp_encoder) and get_parallel().attn_tp_size > 1


def share(picture: Picture) -> None:
    """From now on give items shared names; `picture` has 32 bytes for one that has such a name, None for others."""
    _shared[:] = [picture]


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
