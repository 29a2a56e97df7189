"""Names that engines of several kinds give a picture: alike where their towers are shown the same, and only there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mmcache import Namespace
from mmcache_connectors.shared_embeddings import (
    MEASURED,
    VERSIONS,
    Normalisation,
    Tower,
    pixels_of,
    shared_facts,
    shared_item,
    why_not,
)

CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
HALVES = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
STEPS = {"do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255}
GRID = (1, 4, 6)
NORM = Normalisation.of(CLIP["image_mean"], CLIP["image_std"], 1 / 255)


def patches(seed: int = 0, count: int = 24, size: int = 3 * 2 * 7 * 7) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, size), np.uint8))


def processed(pixels: torch.Tensor, numbers: dict[str, Any], how: Any = np.float32) -> torch.Tensor:
    """As image processors do it: rescaled, then normalised by channel; in 32 or in 64 bits."""
    by_channel: Any = pixels.numpy().reshape(len(pixels), 3, -1).astype(how) * how(1 / 255)
    mean = np.array(numbers["image_mean"], how).reshape(1, 3, 1)
    std = np.array(numbers["image_std"], how).reshape(1, 3, 1)
    return torch.from_numpy(((by_channel - mean) / std).astype(np.float32).reshape(pixels.shape))


# ------------------------------------------------------------------------------------------------- from floats to bytes
@pytest.mark.parametrize("numbers", [CLIP, HALVES])
@pytest.mark.parametrize("how", [np.float32, np.float64])
def test_every_byte_comes_back_from_its_float(numbers: dict[str, Any], how: type) -> None:
    norm = Normalisation.of_processor(STEPS | numbers)
    assert norm is not None
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3)[None]
    found = pixels_of(processed(pixels, numbers, how), norm)
    assert found is not None
    assert torch.equal(found, pixels)


def spoiled(values: torch.Tensor, to: float) -> torch.Tensor:
    values[3, 5] = to
    return values


@pytest.mark.parametrize(
    "values",
    [
        processed(patches(), CLIP) + 1e-3,
        processed(patches(), HALVES),
        processed(patches(), CLIP).bfloat16(),
        processed(patches(), CLIP).double(),
        patches().float(),
        spoiled(processed(patches(), CLIP), float("nan")),
        spoiled(processed(patches(), CLIP), float("inf")),
        spoiled(processed(patches(), CLIP), 256 * NORM.weight[0] + NORM.bias[0]),
        spoiled(processed(patches(), CLIP), -1 * NORM.weight[0] + NORM.bias[0]),
        processed(patches(), CLIP)[:, :-1],
        processed(patches(), CLIP)[None],
        torch.empty(0, 294),
    ],
    ids=[
        *("moved", "otherwise normalised", "bfloat16", "float64", "not normalised", "nan", "inf", "256", "-1"),
        *("no whole channels", "three axes", "nothing"),
    ],
)
def test_what_is_no_normalised_byte_has_no_name(values: torch.Tensor) -> None:
    assert pixels_of(values, NORM) is None
    assert shared_item(values, GRID, NORM) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"do_normalize": False},
        {"do_rescale": None},
        {"image_mean": None},
        {"image_mean": [], "image_std": []},
        {"image_mean": 0.5, "image_std": 0.5},
        {"image_std": [0.5, 0.5]},
        {"image_std": [0.5, 0.0, 0.5]},
        {"rescale_factor": 0},
    ],
)
def test_a_processor_that_does_not_say_how_it_normalises(changes: dict[str, Any]) -> None:
    assert Normalisation.of_processor(STEPS | CLIP | changes) is None


# ---------------------------------------------------------------------------------------------------------- the picture
def test_where_bytes_cannot_be_told_apart_there_is_no_name() -> None:
    """Values of neighbouring bytes lie so near each other that any number is near one."""
    flat = Normalisation.of([0.5] * 3, [255.0] * 3, 1 / 255)
    assert pixels_of(torch.rand(8, 12).mul_(3e-3), flat) is None
    assert pixels_of(torch.zeros(8, 12, dtype=torch.uint8), flat) is None


def test_both_forms_of_a_picture_have_one_name() -> None:
    pixels = patches()
    name = shared_item(pixels, GRID, NORM)
    assert name is not None
    assert len(name) == 32
    assert shared_item(processed(pixels, CLIP), GRID, NORM) == name
    assert shared_item(processed(pixels, CLIP, np.float64), list(GRID), NORM) == name
    assert shared_item(pixels.T.contiguous().T, GRID, NORM) == name


def test_any_difference_makes_another_name() -> None:
    touched = patches()
    touched[7, 11] ^= 1
    halves = Normalisation.of(HALVES["image_mean"], HALVES["image_std"], 1 / 255)
    pixels = patches()
    names = [
        shared_item(pixels, GRID, NORM),
        shared_item(touched, GRID, NORM),
        shared_item(pixels, (1, 6, 4), NORM),
        shared_item(pixels, (2, 3, 4), NORM),
        shared_item(pixels, GRID, halves),
        shared_item(pixels.reshape(48, -1), (1, 8, 6), NORM),
        shared_item(pixels.flip(0), GRID, NORM),
    ]
    assert None not in names
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("grid", [(1, 4, 5), (0, 4, 6), (1, 1, 23)])
def test_a_grid_of_other_patches_has_no_name(grid: tuple[int, int, int]) -> None:
    assert shared_item(patches(), grid, NORM) is None


# ----------------------------------------------------------------------------------------------------------- the engine
def test_engines_with_other_towers_share_nothing() -> None:
    tower = Tower("Qwen2VLForConditionalGeneration", "b3:" + "0" * 64, "bfloat16", "cpu")
    others: dict[str, Any] = {
        "architecture": "Qwen2_5_VLForConditionalGeneration",
        "model": "b3:" + "1" * 64,
        "dtype": "float32",
        "device": "cuda",
        "narrower": {"weights_epoch": "7"},
    }
    assert others.keys() == set(Tower._fields)
    towers = [tower, *(tower._replace(**{name: other}) for name, other in others.items())]
    ids = {Namespace(kind="embedding", **shared_facts(one)).id for one in towers}
    assert len(ids) == len(towers)


def test_only_what_was_measured_is_shared() -> None:
    for engine, version in VERSIONS.items():
        for architecture in MEASURED:
            assert why_not(engine, version, architecture) is None
            assert why_not(engine, version + "+cpu", architecture) is None
            assert "was not measured" in str(why_not(engine, version + ".1", architecture))
        assert "nobody has measured" in str(why_not(engine, version, "LlavaForConditionalGeneration"))
