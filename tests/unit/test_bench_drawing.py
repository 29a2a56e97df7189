"""The requests of `bench diffusion`: what decides a latent is in its key and in its truth, and the flow by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mmcache.bench.diffusion import LATENT_SHAPE, POSTERIOR_SHAPE, StandIns, latent_keys, prompt_keys
from mmcache.bench.drawing import (
    ASKED,
    DDIM,
    QUICK,
    SIDE,
    SKIPPED,
    Drawing,
    DrawingStep,
    InitImage,
    Prompt,
    Recipe,
    requests,
)
from mmcache.bench.oracle import Entry, ExactLRU, replay
from mmcache.keys import Namespace

PROMPTS = Namespace(kind="prompt", model="m", dtype="float16")
LATENTS = Namespace(kind="latent", model="m", dtype="float16")
KINDS = ("prompt", "embedding", "latent")
SIZES = {"prompt": 100, "embedding": 10, "latent": 1}


def image(name: str) -> InitImage:
    return InitImage(name, np.zeros((SIDE, SIDE, 3), np.uint8), name.encode() * 32, name.encode())


BASE = Recipe(Prompt("a fox"), Prompt("blurry"), seed=3, image=image("a"), strength=0.6)
OTHERS = [
    replace(BASE, prompt=Prompt("a fox ")),
    replace(BASE, prompt=Prompt("a fox", clip_skip=1)),
    replace(BASE, negative=Prompt("")),
    replace(BASE, seed=4),
    replace(BASE, steps=20),
    replace(BASE, guidance=5.0),
    replace(BASE, scheduler=DDIM),
    replace(BASE, image=image("b")),
    replace(BASE, image=None),
    replace(BASE, strength=0.7),
]


def name_of(recipe: Recipe, step: int) -> tuple[bytes, bytes]:
    """mmcache's name for a latent, and the benchmark's."""
    (key,) = latent_keys(LATENTS, recipe, prompt_keys(PROMPTS, recipe), [step])
    return key.digest, recipe.truth_at(step)


def test_every_setting_decides_the_latent() -> None:
    names = [name_of(BASE, 20), name_of(BASE, 10), *(name_of(other, 20) for other in OTHERS)]
    assert len({key for key, _ in names}) == len(names)
    assert len({truth for _, truth in names}) == len(names)


def test_the_same_recipe_has_the_same_name() -> None:
    assert name_of(replace(BASE), 20) == name_of(BASE, 20)


def test_keys_and_truths_name_the_same_contents_in_the_workload() -> None:
    asked = requests(QUICK, seed=0)
    assert requests(QUICK, seed=0)[5].recipe.truth_at(30) == asked[5].recipe.truth_at(30)
    pairs = {name_of(one.recipe, step) for one in asked for step, _ in one.step(SIZES).latents}
    assert len(pairs) > 40
    assert len({key for key, _ in pairs}) == len({truth for _, truth in pairs}) == len(pairs)
    ideal = replay([one.step(SIZES) for one in asked], ExactLRU(), KINDS)
    assert all(0.2 < ideal[kind].hit_rate < 0.95 for kind in KINDS)


@pytest.mark.parametrize(
    ("strength", "until", "kept"), [(1.0, 30, [10, 20, 30]), (1.0, 10, [10]), (0.6, 30, [20, 30]), (0.6, 20, [20])]
)
def test_latents_are_kept_on_the_way(strength: float, until: int, kept: list[int]) -> None:
    recipe = replace(BASE, strength=strength)
    assert recipe.checkpoints(until) == kept
    assert [step for step, _ in Drawing(recipe, until).step(SIZES).latents] == kept[::-1]
    assert recipe.begin == (0 if strength == 1.0 else 12)
    assert len(recipe.timesteps) == 30 - recipe.begin


def entry(name: str, nbytes: int) -> Entry:
    return Entry(name.encode(), b"", nbytes)


def test_the_flow_goes_on_from_the_furthest_latent() -> None:
    prompts = (entry("prompt", 100), entry("negative", 100))
    images = (entry("photo", 10),)
    preview = DrawingStep(((10, entry("at 10", 1)),), prompts, images, begin=2)
    whole = DrawingStep(((30, entry("at 30", 1)), (20, entry("at 20", 1)), (10, entry("at 10", 1))), prompts, images, 2)
    got = replay([preview, whole, whole], ExactLRU(), KINDS)
    # the preview finds nothing; the whole goes on from step 10 and needs the prompts, not the photo; then it is there
    assert (got["latent"].lookups, got["latent"].hits) == (3, 2)
    assert (got["prompt"].lookups, got["prompt"].hits) == (4, 2)
    assert (got["embedding"].lookups, got["embedding"].hits) == (1, 0)
    assert got["latent"].bytes_written == 3
    assert got["latent"].bytes_read == 2
    assert (got.work[ASKED], got.work[SKIPPED]) == (8 + 28 + 28, 0 + 8 + 28)


def test_values_depend_on_their_content_and_the_seed_alone() -> None:
    one, same, other = StandIns(1), StandIns(1), StandIns(2)
    assert one.latent(b"a").shape == LATENT_SHAPE
    assert one.latent(b"a").tobytes() == same.latent(b"a").tobytes()
    assert one.latent(b"a").tobytes() not in (one.latent(b"b").tobytes(), other.latent(b"a").tobytes())
    assert set(one.prompt(b"a")) == {"prompt_embeds", "pooled_prompt_embeds"}
    assert sum(array.nbytes for array in one.prompt(b"a").values()) == 317_952


def test_an_init_image_is_projected_patch_by_patch() -> None:
    values = StandIns(1)
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    first = values.project(pixels)
    assert first.shape == POSTERIOR_SHAPE
    changed = pixels.copy()
    changed[-1, -1] ^= 255
    assert np.argwhere((values.project(changed) != first).any(axis=0)).tolist() == [[127, 127]]
