"""One media item's embedding: its form, its key, and how much there is of the item.

Pure: no clock, no I/O, nothing of vLLM.
In vLLM 0.32 an encoder's output is one tensor `[embeddings, width]` an item, whatever the model: what DeepStack adds
stands in further columns (v1/worker/utils.py, sanity_check_mm_encoder_outputs).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

from mmcache.frame import DTYPES
from mmcache.keyset import Key
from mmcache.media import Media

FEATURE_S: Final = 0.01  # of sound, one frame of Whisper's features, which most audio encoders take


@dataclass(frozen=True, slots=True)
class Form:
    """The tensor of one item's embedding: `[rows, width]` of `dtype`. `measured`: the width was seen, not reckoned."""

    rows: int
    width: int
    dtype: str
    measured: bool

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, width)."""
        return self.rows, self.width

    @property
    def nbytes(self) -> int:
        """Of the tensor."""
        return self.rows * self.width * DTYPES[self.dtype][1]


@dataclass(frozen=True, slots=True)
class Named:
    """One item whose embedding has a key."""

    identifier: str
    key: Key
    form: Form
    media: Media | None


@dataclass(frozen=True, slots=True)
class Place:
    """Where another process of this machine and user finds the memory: an open file of a process, and its size."""

    pid: int
    fd: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Load:
    """An embedding to be put into the engine's encoder cache, and where it lies by now."""

    name: Named
    place: Place


@dataclass(frozen=True, slots=True)
class Save:
    """An embedding to be stored, or, for an audit, to be compared with what is stored."""

    name: Named
    audit: bool = False


def passes_through(feature: Any) -> bool:
    """Whether the item is an embedding already: its tensor came with the request, and no encoder runs for it."""
    embeds = (feature.data or {}).get(f"{feature.modality}_embeds")
    return feature.modality == "prompt_embeds" or (embeds is not None and embeds.data is not None)


def is_bare(feature: Any, placeholder_fields: Collection[str]) -> bool:
    """Whether the item is a place in the prompt and no more: its embedding was left out of the request, which vLLM
    allows where a connector may have it. `placeholder_fields`: what tells a place's size, as vLLM has it."""
    return feature.data is None or (len(feature.data) > 0 and set(feature.data) <= set(placeholder_fields))


def media_of(modality: str, fields: Mapping[str, Any], patch_size: int | None) -> Media:
    """How much there is of an item, where its processed features tell: pixels, frames or seconds.

    `patch_size` in pixels, for models that give a grid of patches (t, h, w).
    """
    measure: Callable[..., Any] = {"image": _pixels, "video": _frames, "audio": _audio_s}.get(modality, lambda *_: {})
    try:
        return Media(modality, **measure(fields, patch_size))
    except (TypeError, ValueError, IndexError, AttributeError, RuntimeError):  # features of another kind
        return Media(modality)


def _pixels(fields: Mapping[str, Any], patch_size: int | None) -> dict[str, int]:
    if "image_grid_thw" in fields and patch_size:
        _, high, wide = fields["image_grid_thw"].reshape(-1).tolist()
        return {"pixels": high * wide * patch_size**2}
    shape = tuple(fields["pixel_values"].shape) if "pixel_values" in fields else ()
    return {"pixels": int(shape[-1] * shape[-2]) * (shape[0] if len(shape) > 3 else 1)} if len(shape) > 2 else {}


def _frames(fields: Mapping[str, Any], _: int | None) -> dict[str, int]:
    if "video_grid_thw" in fields:
        return {"frames": 2 * int(fields["video_grid_thw"].reshape(-1)[0])}
    shape = tuple(fields["pixel_values_videos"].shape) if "pixel_values_videos" in fields else ()
    return {"frames": int(shape[-4])} if len(shape) > 3 else {}


def _audio_s(fields: Mapping[str, Any], _: int | None) -> dict[str, float]:
    for name in ("feature_attention_mask", "input_features_mask", "audio_attention_mask"):
        if name in fields:
            return {"audio_s": FEATURE_S * int(fields[name].sum())}
    return {}
