"""`mmcache bench diffusion`: prompt embeddings, encoded init images and latents through a cache, every hit checked.

For each picture it does what a diffusion engine can do: go on from the latent with the most steps done that is there;
unless that is the end, look up the embeddings of the prompt and the negative prompt, and, starting from nothing, the
encoded init image; make and store what is missing, and the latents on the way. The values are stand-ins of SDXL's
shapes whose seed is SHA-256 over everything a real value depends on; that digest shares no code with mmcache.keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from mmcache.bench import drawing, extras
from mmcache.bench.corpus import Pixels
from mmcache.bench.drawing import ASKED, SKIPPED, Drawing, DrawingStep, Recipe
from mmcache.bench.engine import CheckedCache, nbytes_of
from mmcache.bench.report import Report
from mmcache.bench.run import Options, Progress, Serve, Workload, run_workload
from mmcache.keys import Namespace, embedding_key, latent_key
from mmcache.keyset import Key, Keys
from mmcache.units import count

SCALES = {"full": drawing.FULL, "quick": drawing.QUICK}
KINDS = ("prompt", "embedding", "latent")
MODEL = "stabilityai/stable-diffusion-xl-base-1.0"
# Of its text encoders (77 tokens, width 768 + 1280; pooled 1280) and VAE (8 x smaller, 4 channels; mean and logvar).
PROMPT_SHAPE, POOLED_SHAPE = (77, 2048), (1280,)
LATENT_SHAPE, POSTERIOR_SHAPE = (4, 128, 128), (8, 128, 128)
PATCH = 8

Half = npt.NDArray[np.float16]


def run(options: Options, progress: Progress | None = None) -> Report:
    """Run the workload once and report. `progress` is called with (requests done, requests in all).

    `full` is about 900 requests of 160 users with a working set of about 0.15 GB, `quick` about 45 of 8 users.

    Raises:
        ConfigError: options that cannot work, or media libraries that are not installed.
        TransportError: as `run_workload`.
    """
    extras.check("diffusion")
    return run_workload(_planned(SCALES[options.scale], options.seed), options, progress)


class StandIns:
    """Values of the real shapes that depend on all a real one depends on, and on the run's seed."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        rng = np.random.default_rng(seed)
        features = PATCH * PATCH * 3
        self._projection = rng.standard_normal((features, POSTERIOR_SHAPE[0]), np.float32) / np.float32(features**0.5)
        self.prompt = lru_cache(maxsize=64)(self._prompt)
        self.posterior = lru_cache(maxsize=16)(self._posterior)

    def _prompt(self, content: bytes) -> dict[str, Half]:
        rng = self._rng(content)
        return {"prompt_embeds": _normal(rng, PROMPT_SHAPE), "pooled_prompt_embeds": _normal(rng, POOLED_SHAPE)}

    def latent(self, content: bytes) -> Half:
        """float16 (4, 128, 128)."""
        return _normal(self._rng(content), LATENT_SHAPE)

    def _posterior(self, image: drawing.InitImage) -> Half:
        return self.project(image.pixels)

    def project(self, pixels: Pixels) -> Half:
        """uint8 (1024, 1024, 3) to float16 (8, 128, 128): a linear projection of patches of 8 x 8 pixels."""
        side = POSTERIOR_SHAPE[1]
        patches = pixels.reshape(side, PATCH, side, PATCH, 3).swapaxes(1, 2).reshape(side * side, -1)
        rows = (patches.astype(np.float32) / 127.5 - 1) @ self._projection
        return np.ascontiguousarray(rows.T.reshape(POSTERIOR_SHAPE).astype(np.float16))

    def _rng(self, content: bytes) -> np.random.Generator:
        return np.random.Generator(np.random.SFC64([self._seed, int.from_bytes(content, "little")]))


class _Engine:
    """Serves drawings as a diffusion engine would."""

    def __init__(self, cache: CheckedCache, salt: str) -> None:
        self._prompts = Namespace(kind="prompt", model=MODEL, dtype="float16", cache_salt=salt)
        self._images = Namespace(kind="embedding", model=MODEL, component="vae", dtype="float16", cache_salt=salt)
        self._latents = Namespace(kind="latent", model=MODEL, dtype="float16", cache_salt=salt)
        self._cache = cache
        self._values = StandIns(cache.seed)

    def serve(self, asked: Drawing, step: DrawingStep) -> None:
        """One request, from its keys to the last latent stored."""
        cache, recipe = self._cache, asked.recipe
        prompts = cache.timed("prompt keys", lambda: prompt_keys(self._prompts, recipe))
        steps = [done for done, _ in step.latents]
        keys = cache.timed("latent keys", lambda: latent_keys(self._latents, recipe, prompts, steps))
        done = self._resume(step, keys)
        goal = steps[0]
        cache.tallies.work[ASKED] += goal - step.begin
        cache.tallies.work[SKIPPED] += done - step.begin
        if done == goal:
            return
        cache.get_or_store("prompt", prompts, [self._values.prompt(entry.content) for entry in step.prompts])
        if done == step.begin and recipe.image is not None:
            key = embedding_key(self._images, recipe.image.item)
            cache.get_or_store("embedding", [key], [self._values.posterior(recipe.image)])
        missing = [(key, entry) for key, (at, entry) in zip(keys, step.latents, strict=True) if at > done]
        missing.reverse()  # in the order they come into being
        values = [self._values.latent(entry.content) for _, entry in missing]
        cache.store("latent", Keys.of(key for key, _ in missing), values)

    def _resume(self, step: DrawingStep, keys: Sequence[Key]) -> int:
        """Read the latent with the most steps done that is there; returns how many those are."""
        cache, tally = self._cache, self._cache.tallies["latent"]
        tally.lookups += 1
        present = cache.timed("contains latent", lambda: cache.client.contains(Keys.of(keys)))
        for key, there, (done, entry) in zip(keys, present, step.latents, strict=True):
            if not there:
                continue
            value = self._values.latent(entry.content)
            cache.damage("latent", [key], value.nbytes)
            if cache.read("latent", Keys.of(key), [value])[0]:
                tally.hits += 1
                return done
        return step.begin


def prompt_keys(namespace: Namespace, recipe: Recipe) -> list[Key]:
    """The keys of the prompt's and the negative prompt's embeddings."""
    return [embedding_key(namespace, prompt.item) for prompt in (recipe.prompt, recipe.negative)]


def latent_keys(namespace: Namespace, recipe: Recipe, prompts: Sequence[Key], steps: Sequence[int]) -> list[Key]:
    """The keys of a recipe's latents after so many steps; `prompts` is from `prompt_keys`."""
    conditioning = {"negative_prompt": prompts[1].chain}
    if recipe.image is not None:
        conditioning["image"] = recipe.image.item
    common: dict[str, Any] = {
        "prompt": prompts[0].chain,
        "conditioning": conditioning,
        "scheduler": recipe.scheduler,
        "scheduler_config": recipe.scheduler_config,
        "timesteps": recipe.timesteps,
        "sigmas": None,
        "mu": None,
        "steps": recipe.steps,
        "guidance": recipe.guidance,
        "eta": 0.0 if recipe.scheduler == drawing.DDIM else None,
        "size": (drawing.SIDE, drawing.SIDE, 1),
        "initial_state": drawing.initial_state(recipe.seed),
        "batch": (1, 0),
        "step_cache": None,
        "parallelism": {},
        "cpu_threads": None,
        "strength": recipe.strength,
    }
    return [latent_key(namespace, step=step, **common) for step in steps]


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> Half:
    return rng.standard_normal(shape, np.float32).astype(np.float16)


def _planned(scale: drawing.DrawScale, seed: int) -> Workload:
    requests = drawing.requests(scale, seed)
    sizes = {
        "prompt": nbytes_of(StandIns(seed).prompt(b"")),
        "embedding": 2 * int(np.prod(POSTERIOR_SHAPE)),
        "latent": 2 * int(np.prod(LATENT_SHAPE)),
    }
    steps = [request.step(sizes) for request in requests]

    def engine(cache: CheckedCache, salt: str) -> Serve:
        drawer = _Engine(cache, salt)
        return lambda index: drawer.serve(requests[index], steps[index])

    return Workload(
        name="diffusion",
        about=f"{count(scale.prompts, 'prompt')} and {count(scale.photos, 'photo')} by {count(scale.users, 'user')}",
        kinds=KINDS,
        steps=steps,
        engine=engine,
        entry_nbytes=sizes["latent"],
        facts={
            "users": scale.users,
            "prompts": scale.prompts,
            "photos": scale.photos,
            "model": MODEL,
            "prompt_shape": [list(PROMPT_SHAPE), list(POOLED_SHAPE)],
            "embedding_shape": list(POSTERIOR_SHAPE),
            "latent_shape": list(LATENT_SHAPE),
            "checkpoint_steps": drawing.CHECKPOINT_STEPS,
        },
        measured=(
            "every value that came back, compared bit for bit with a recomputation from the whole recipe: texts, "
            "settings, seed, scheduler, steps done and the init image's pixels",
            "init images: photos scikit-image ships, decoded, cropped and resized to 1024 x 1024",
        ),
        modelled=(
            f"prompt embeddings: seeded normal numbers at SDXL's shapes {PROMPT_SHAPE} and {POOLED_SHAPE} float16, "
            f"{sizes['prompt']:,} B",
            f"encoded init images: a seeded linear projection of the real pixels at the VAE posterior's shape "
            f"{POSTERIOR_SHAPE} float16, {sizes['embedding']:,} B",
            f"latents: seeded normal numbers at {LATENT_SHAPE} float16, {sizes['latent']:,} B; nothing is denoised, so "
            "steps are counted and no time is claimed for them",
            "who draws what, when; prompts, seeds and photos are chosen by rank, the k-th 1/k as often as the first",
            "ideal (an endless cache) and exact LRU: replays, not caches",
        ),
    )
