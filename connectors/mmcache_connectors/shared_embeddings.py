"""One name for a picture's embedding, whichever engine made it.

vLLM and SGLang make the same tensor of the same picture, to the rounding of its dtype and in the same order of tokens,
where their vision towers are shown the same pixels: benchmarks/cross_engine_embeddings.py measures it, and
docs/cross-engine.md says what was found. So a name is made of what both towers see, never of what an engine calls it,
and only where it was measured. Everything else has no shared name, and keeps that of its engine.

What the towers see comes in two forms. vLLM hands over patches of bytes, and its tower normalises them; SGLang hands
over normalised floats. Normalising makes another float of each of a byte's 256 values, so the bytes can be had back
exactly: those, with the normalisation, are what a picture is here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple, Self

import torch

from mmcache.encoding import canonical
from mmcache.keys import item_digest
from mmcache.media import media_digest

# The architectures whose embeddings were compared, and how a tower's output is laid out: one row a token, of patches
# merged 2 x 2, row after row of the picture; levels of DeepStack in further columns.
MEASURED: Final[Mapping[str, str]] = {
    "Qwen2VLForConditionalGeneration": "tokens",
    "Qwen2_5_VLForConditionalGeneration": "tokens",
    "Qwen3VLForConditionalGeneration": "tokens, levels in columns",
}
VERSIONS: Final[Mapping[str, str]] = {"vllm": "0.32.0", "sglang": "0.5.23"}  # that were compared
SCHEME: Final = "1"  # of this module's names
PATCHES: Final = 64  # at a time: they stay in a core's cache
NEAR: Final = 1e-5  # of a normalised value and its byte's
APART: Final = 1e-3  # at least, of values of neighbouring bytes; some 1e-2 as a rule


class Normalisation(NamedTuple):
    """A picture's bytes become `byte * weight + bias`, per channel; floats of 32 bits."""

    weight: tuple[float, ...]
    bias: tuple[float, ...]

    @classmethod
    def of(cls, mean: Sequence[float], std: Sequence[float], rescale: float) -> Self:
        """Of `(byte * rescale - mean) / std`, computed as vLLM does."""
        deviation = torch.tensor(std, dtype=torch.float32)
        bias = -torch.tensor(mean, dtype=torch.float32) / deviation
        return cls(tuple((rescale / deviation).tolist()), tuple(bias.tolist()))

    @classmethod
    def of_processor(cls, settings: Mapping[str, Any]) -> Self | None:
        """Of a Hugging Face image processor's settings; None if it does not do both steps, or does not say how."""
        mean, std, rescale = (settings.get(name) for name in ("image_mean", "image_std", "rescale_factor"))
        steps = settings.get("do_rescale") and settings.get("do_normalize")
        if not (steps and rescale and isinstance(mean, (list, tuple)) and isinstance(std, (list, tuple))):
            return None
        if not std or len(mean) != len(std) or not all(std):
            return None
        return cls.of(mean, std, rescale)


class Tower(NamedTuple):
    """What makes an engine's embeddings, apart from the picture. `model` names the weights by content; `device` is
    "cpu" or "cuda"; `narrower` are further facts that keep engines apart."""

    architecture: str
    model: str
    dtype: str
    device: str
    narrower: Mapping[str, str] = {}


def why_not(engine: str, version: str, architecture: str) -> str | None:
    """Why such an engine's embeddings have no shared names; None if they were measured."""
    if architecture not in MEASURED:
        return f"of {architecture} nobody has measured whether engines make the same embeddings"
    if version.partition("+")[0] != VERSIONS[engine]:
        return f"{engine} {version} was not measured, {VERSIONS[engine]} was"
    return None


def shared_facts(tower: Tower) -> dict[str, Any]:
    """The facts of the namespace (kind "embedding") of all engines with such a tower. It must have been measured."""
    return {
        "shared": SCHEME,
        "layout": MEASURED[tower.architecture],
        "architecture": tower.architecture,
        "model": tower.model,
        "dtype": tower.dtype,
        "device": tower.device,
        **tower.narrower,
    }


def shared_item(values: torch.Tensor, grid: Sequence[int], norm: Normalisation) -> bytes | None:
    """32 bytes that say which picture a tower is shown; None if its values are no normalised bytes.

    `values` are the patches `[patches, channels * patch]`: uint8, or float32 as normalised by `norm`. `grid` counts
    them: frames, rows, columns. Costs a hash of the bytes, for floats also some passes over them.
    """
    frames, rows, columns = grid
    pixels = pixels_of(values, norm)
    if pixels is None or frames * rows * columns != len(pixels):
        return None
    data = memoryview(pixels.contiguous().reshape(-1).numpy())
    facts = [list(pixels.shape), media_digest(data, "pixels"), list(norm.weight), list(norm.bias)]
    content = media_digest(canonical(facts, "picture"), "shared_picture")
    return item_digest(content, grid=[frames, rows, columns])


def pixels_of(values: torch.Tensor, norm: Normalisation) -> torch.Tensor | None:
    """The bytes `[patches, channels * patch]` that `norm` made these values of; uint8 as it is. None if it did not."""
    channels = len(norm.weight)
    if values.dim() != 2 or values.shape[1] % channels or not values.numel():
        return None
    if min(map(abs, norm.weight)) < APART:  # nearly every value would be some byte's
        return None
    held = values.detach().cpu()
    if held.dtype is torch.uint8:
        return held
    if held.dtype is not torch.float32:
        return None
    by_channel = held.reshape(len(held), channels, -1)
    weight, bias = (torch.tensor(one, dtype=torch.float32).view(1, channels, 1) for one in norm)
    pixels = torch.empty(by_channel.shape, dtype=torch.uint8)
    for part, found in zip(by_channel.split(PATCHES), pixels.split(PATCHES), strict=True):
        found.copy_(part.sub(bias).div_(weight).round_())
        apart = (found * weight).add_(bias).sub_(part).abs_().amax()  # what no byte stands for is far from any
        if not apart <= NEAR:  # or no number
            return None
    return pixels.reshape(held.shape)
