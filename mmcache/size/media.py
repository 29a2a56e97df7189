"""What a vision or audio tower puts out for one item: how many tokens, how wide, from the model's config.

The families are those whose rule is in the config; of any other it says that it does not know. Rules after vLLM 0.32.0
(model_executor/models/) and transformers' image processors. PURE: no clock, no randomness, no I/O.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from mmcache.errors import ConfigError
from mmcache.size.fields import Fields
from mmcache.size.kv import DEFAULTS, text_fields

MAX_SIDE: Final = 1 << 16
_AUDIO_S: Final = 30  # a window of Whisper's features: 3,000 frames


@dataclass(frozen=True, slots=True)
class Item:
    """One item's embedding: `[tokens, width]` in the model's dtype."""

    what: str
    tokens: int
    width: int


@dataclass(frozen=True, slots=True)
class Picture:
    """The size that is asked about, in pixels."""

    width: int
    height: int

    def __post_init__(self) -> None:
        if not (1 <= self.width <= MAX_SIDE and 1 <= self.height <= MAX_SIDE):
            raise ConfigError(f"an image of {self.width}x{self.height} pixels; use 1 to {MAX_SIDE} each way")

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


def items_of(config: Fields, processor: Fields | None, picture: Picture) -> tuple[list[Item], list[str]]:
    """(the embeddings of a picture, of video and of audio, as far as the config says; notes). Raises ConfigError."""
    kind = config.text("model_type")
    root = config.section("thinker_config") or config
    vision, audio = root.section("vision_config"), root.section("audio_config")
    if kind == "whisper":
        return [_whisper(config)], []
    items: list[Item] = []
    notes: list[str] = []
    if vision is not None:
        rule = _VISION.get(kind)
        if rule is None:
            notes.append(f"images: how many tokens {kind or 'this model'} makes of one is not known here")
        else:
            items += rule(config, vision, processor, picture, notes)
    if audio is not None:
        if kind == "qwen2_audio":
            items.append(_qwen2_audio(config, audio))
        else:
            notes.append(f"audio: how many tokens {kind or 'this model'} makes of it is not known here")
    return items, notes


def _text_width(config: Fields) -> int:
    text = text_fields(config)
    default = DEFAULTS.get(text.text("model_type"), {}).get("hidden_size")
    return text.need("hidden_size", "n_embd", "d_model", default=default)


def _qwen_vl(
    config: Fields, vision: Fields, processor: Fields | None, picture: Picture, notes: list[str]
) -> list[Item]:
    """Patches merged 2 by 2; Qwen3-VL adds a row for each deepstack level to every token's width."""
    kind = config.text("model_type")
    third = kind.startswith("qwen3")
    patch = vision.need("patch_size", "spatial_patch_size", default=16 if third else 14)
    merge = vision.need("spatial_merge_size", default=2)
    frames = vision.need("temporal_patch_size", default=2)
    levels = len(vision.items("deepstack_visual_indexes") or [])
    out = vision.need("out_hidden_size", default=_text_width(config)) if kind != "qwen2_vl" else _text_width(config)
    width = out * (1 + levels)
    side = patch * merge
    least, most = _pixel_limits(processor)
    if not most:
        notes.append("no preprocessor_config.json beside the config: images are not scaled to its pixel limits")
    image = _resized(picture, side, least, most)
    clip = _resized(picture, side, 0, 0)
    if third or clip != image:
        notes.append("video frames are counted unscaled; a video's processor has limits of its own")
    return [
        Item(f"image of {picture}", image[0] * image[1], width),
        Item(f"{frames} video frames of {picture}", clip[0] * clip[1], width),
    ]


def _pixel_limits(processor: Fields | None) -> tuple[int, int]:
    """(least, most) pixels of an image; 0 where the processor does not say."""
    if processor is None:
        return 0, 0
    size = processor.section("size") or processor
    found = []
    for plain, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        found.append(processor.number(plain, most=1 << 32) or size.number(plain, edge, most=1 << 32) or 0)
    return found[0], found[1]


def _resized(picture: Picture, side: int, least: int, most: int) -> tuple[int, int]:
    """(rows, columns) of `side` pixels, as transformers' `smart_resize` for Qwen2-VL finds them."""
    height, width = picture.height, picture.width
    rows, columns = max(1, round(height / side)), max(1, round(width / side))
    pixels = rows * columns * side * side
    if most and pixels > most:
        shrink = math.sqrt(height * width / most)
        return max(1, math.floor(height / shrink / side)), max(1, math.floor(width / shrink / side))
    if least and pixels < least:
        grow = math.sqrt(least / (height * width))
        return math.ceil(height * grow / side), math.ceil(width * grow / side)
    return rows, columns


def _llava(config: Fields, vision: Fields, processor: Fields | None, picture: Picture, notes: list[str]) -> list[Item]:
    """One token a patch of a picture of fixed size; or, with a Pixtral tower, of one that keeps its shape."""
    if vision.text("model_type") == "pixtral":
        return _pixtral(config, vision, processor, picture, notes)
    patches = (vision.need("image_size", default=336) // vision.need("patch_size", default=14)) ** 2
    full = config.text("vision_feature_select_strategy") == "full"
    if full and vision.text("model_type").startswith("clip"):
        patches += 1  # the class token
    return [Item("image of any size", patches, _text_width(config))]


def _pixtral(
    config: Fields, vision: Fields, processor: Fields | None, picture: Picture, notes: list[str]
) -> list[Item]:
    """One token for each patch (or merged patches) of the picture, scaled down to fit `image_size`."""
    side = vision.need("patch_size", default=16) * (config.number("spatial_merge_size") or 1)
    limit = vision.need("image_size", default=1024)
    shrink = max(picture.width / limit, picture.height / limit, 1.0)
    rows, columns = (math.ceil(int(length / shrink) / side) for length in (picture.height, picture.width))
    return [Item(f"image of {picture}", max(1, rows) * max(1, columns), _text_width(config))]


def _gemma3(config: Fields, vision: Fields, processor: Fields | None, picture: Picture, notes: list[str]) -> list[Item]:
    return [Item("image of any size", config.need("mm_tokens_per_image", default=256), _text_width(config))]


def _paligemma(
    config: Fields, vision: Fields, processor: Fields | None, picture: Picture, notes: list[str]
) -> list[Item]:
    patches = (vision.need("image_size", default=224) // vision.need("patch_size", default=14)) ** 2
    return [Item("image of any size", patches, _text_width(config))]


def _internvl(
    config: Fields, vision: Fields, processor: Fields | None, picture: Picture, notes: list[str]
) -> list[Item]:
    """A picture is cut into tiles; how many follows from its shape."""
    size = config.number("force_image_size", least=1) or _square(vision, "image_size", 448)
    patches = (size // _square(vision, "patch_size", 14)) ** 2
    tokens = int(patches * config.ratio("downsample_ratio", 0.5) ** 2)
    most = config.need("max_dynamic_patch", default=12)
    notes.append(
        f"an image is 1 to {most} tiles of {size}x{size}, after its shape, and a thumbnail where it is several"
    )
    return [Item(f"tile of {size}x{size}", tokens, _text_width(config))]


def _square(vision: Fields, name: str, default: int) -> int:
    """A side that is written as a number or as [height, width]."""
    try:
        return vision.need(name, default=default)
    except ConfigError:
        sides = vision.items(name) or []
        if len(sides) == 2 and sides[0] == sides[1] and isinstance(sides[0], int) and sides[0] > 0:
            return sides[0]
        raise


def _qwen2_audio(config: Fields, audio: Fields) -> Item:
    """Whisper's 1,500 positions for 30 s, pooled by two."""
    return Item(f"{_AUDIO_S} s of audio", audio.need("max_source_positions", default=1500) // 2, _text_width(config))


def _whisper(config: Fields) -> Item:
    return Item(f"{_AUDIO_S} s of audio", config.need("max_source_positions", default=1500), config.need("d_model"))


_Rule = Callable[[Fields, Fields, Fields | None, Picture, list[str]], list[Item]]
_VISION: Final[dict[str, _Rule]] = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"), _qwen_vl),
    "llava": _llava,
    "mistral3": _pixtral,
    "gemma3": _gemma3,
    "paligemma": _paligemma,
    "internvl_chat": _internvl,
    "internvl": _internvl,
}


def latent_of(vae: Fields, picture: Picture) -> Item:
    """The latent of a picture under an AutoencoderKL, `[channels x height / f, width / f]`: what diffusion works on.

    Raises ConfigError for other autoencoders.
    """
    kind = vae.text("_class_name")
    blocks = vae.items("block_out_channels")
    if kind != "AutoencoderKL" or not blocks:
        raise ConfigError(f"vae/config.json is of {kind or 'no class'}; only AutoencoderKL's latents are known here")
    if len(blocks) > 8:
        raise ConfigError(f"block_out_channels has {len(blocks)} entries; an AutoencoderKL has up to 8")
    factor = 1 << (len(blocks) - 1)
    rows, columns = picture.height // factor, picture.width // factor
    return Item(f"latent of {picture}", vae.need("latent_channels", default=4) * rows, max(1, columns))
