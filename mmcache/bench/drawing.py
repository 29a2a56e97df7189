"""The requests of `mmcache bench diffusion`: pictures drawn from prompts, seeds and init images that repeat.

A request is a whole recipe (everything that decides a latent's bits), how many steps of it to run, and what identifies
its parts to mmcache (keys) and, separately, to the benchmark (truths: SHA-256 over the recipe). Users try a few seeds
for the first steps, finish the one they like, ask again, and change one setting at a time: equal but for a guidance
scale, a scheduler, a seed, an init image or a blank at the prompt's end. No cache here.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeVar

import numpy as np

from mmcache.bench import corpus, extras
from mmcache.bench.encoder import truth
from mmcache.bench.oracle import Entry, ExactLRU, Tallies, get_or_store
from mmcache.bench.workload import interleave
from mmcache.keys import item_digest
from mmcache.media import media_digest, samples_digest

SIDE = 1024  # pixels
CHECKPOINT_STEPS = 10  # a latent is kept after so many steps of denoising, and at the end
UNDER_WAY = 3  # users at any time
EULER, DDIM = "EulerDiscreteScheduler", "DDIMScheduler"  # both resume exactly from the latents alone
NEGATIVE = "blurry, low quality, watermark, extra fingers"
ASKED, SKIPPED = "denoising steps asked for", "denoising steps skipped"

T = TypeVar("T")

SUBJECTS = ("a lighthouse", "a sleeping fox", "an old tram", "a glass teapot", "two chess players", "a street market")
PLACES = ("at dawn after rain", "in a forest of tall ferns", "on a cliff above the sea", "in a quiet library")
STYLES = ("oil painting", "35 mm photograph", "ink drawing with a light wash")


@dataclass(frozen=True)
class DrawScale:
    """How much drawing: users with a session each, prompts in circulation, photos to start from."""

    users: int
    prompts: int
    photos: int


FULL = DrawScale(users=160, prompts=60, photos=8)
QUICK = DrawScale(users=8, prompts=6, photos=2)


@dataclass(frozen=True, eq=False)
class InitImage:
    """A photo to start from, as the VAE sees it: uint8 (1024, 1024, 3), its item for mmcache, and its truth."""

    name: str
    pixels: corpus.Pixels
    item: bytes
    truth: bytes


@dataclass(frozen=True)
class Prompt:
    """A text for the text encoders. `clip_skip`: how many of CLIP's last layers are left out."""

    text: str
    clip_skip: int = 0

    @property
    def item(self) -> bytes:
        """What mmcache knows it by."""
        settings = {"max_sequence_length": 77, "clip_skip": self.clip_skip}
        return item_digest(media_digest(self.text.encode(), "text"), processor_kwargs=settings)

    @property
    def truth(self) -> bytes:
        """What the benchmark knows it by."""
        return truth(b"prompt", self.text.encode(), repr(self.clip_skip).encode())


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a latent's bits, but for how many steps are done."""

    prompt: Prompt
    negative: Prompt
    seed: int
    steps: int = 30
    guidance: float = 7.0
    scheduler: str = EULER
    image: InitImage | None = None
    strength: float = 1.0  # below 1 with an init image: the first steps are left out

    @property
    def begin(self) -> int:
        """The step it starts at, as diffusers' image-to-image pipelines count."""
        return self.steps - int(self.steps * self.strength)

    @property
    def scheduler_config(self) -> Mapping[str, object]:
        """The scheduler's whole configuration."""
        return {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "timestep_spacing": "leading"}

    @property
    def timesteps(self) -> list[float]:
        """Those in effect."""
        every = 1000 // self.steps
        return [float(1 + every * place) for place in reversed(range(self.steps))][self.begin :]

    def truth_at(self, step: int) -> bytes:
        """What the benchmark knows the latent after `step` steps by."""
        settings = (self.seed, self.steps, self.guidance, self.scheduler, self.strength, step)
        image = self.image.truth if self.image else b""
        return truth(b"latent", self.prompt.truth, self.negative.truth, image, repr(settings).encode())

    def checkpoints(self, until: int) -> list[int]:
        """After which steps a latent is kept, up to `until` steps done, in order."""
        return [step for step in range(self.begin + 1, until + 1) if step % CHECKPOINT_STEPS == 0 or step == self.steps]


@dataclass(frozen=True)
class Drawing:
    """A request: a recipe, and how many steps of it to run: all, or the first few for a preview."""

    recipe: Recipe
    until: int

    def step(self, sizes: Mapping[str, int]) -> DrawingStep:
        """The request as the replays see it; `sizes` are payload bytes by kind."""
        recipe = self.recipe
        prompts = (recipe.prompt, recipe.negative)
        return DrawingStep(
            latents=tuple(
                (step, Entry(recipe.truth_at(step), b"", sizes["latent"]))
                for step in reversed(recipe.checkpoints(self.until))
            ),
            prompts=tuple(Entry(prompt.truth, b"", sizes["prompt"]) for prompt in prompts),
            images=(Entry(recipe.image.truth, b"", sizes["embedding"]),) if recipe.image else (),
            begin=recipe.begin,
        )


@dataclass(frozen=True, slots=True)
class DrawingStep:
    """A request by identity: its latents from the last wanted to the first, with the steps done at each; what else
    is needed where those do not suffice."""

    latents: tuple[tuple[int, Entry], ...]
    prompts: tuple[Entry, ...]
    images: tuple[Entry, ...]
    begin: int

    def serve(self, store: ExactLRU, tallies: Tallies) -> None:
        """The flow of an engine that goes on from the furthest latent it finds; see Step."""
        tally, goal = tallies["latent"], self.latents[0][0]
        present = ((step, entry) for step, entry in self.latents if entry.content in store)
        done, found = next(present, (self.begin, None))
        tally.lookups += 1
        if found is not None:
            store.read([found])
            tally.hits += 1
            tally.bytes_read += found.nbytes
        tallies.work[ASKED] += goal - self.begin
        tallies.work[SKIPPED] += done - self.begin
        if done == goal:
            return
        get_or_store(store, tallies["prompt"], self.prompts)
        if found is None:
            get_or_store(store, tallies["embedding"], self.images)
        tally.bytes_written += store.put([entry for step, entry in reversed(self.latents) if step > done])


def requests(scale: DrawScale, seed: int) -> list[Drawing]:
    """Every request in order of arrival; the same seed gives the same list."""
    rng = random.Random(seed)
    texts = [f"{subject} {place}, {style}" for subject in SUBJECTS for place in PLACES for style in STYLES]
    prompts = [Prompt(text) for text in rng.sample(texts, scale.prompts)]
    images = [_init_image(photo) for photo in corpus.photos(scale.photos)]
    sessions = [_session(prompts, images, rng) for _ in range(scale.users)]
    return list(interleave(sessions, rng, UNDER_WAY))


def _session(prompts: Sequence[Prompt], images: Sequence[InitImage], rng: random.Random) -> list[Drawing]:
    """Previews of some seeds, one of them finished, the same once more, and then one setting changed."""
    image = _by_rank(images, rng) if rng.random() < 0.4 else None
    recipe = Recipe(_by_rank(prompts, rng), Prompt(NEGATIVE), 0, image=image, strength=0.6 if image else 1.0)
    seeds = sorted({_by_rank(range(8), rng) for _ in range(4)})
    tried = [replace(recipe, seed=seed) for seed in seeds]
    drawings = [Drawing(one, one.checkpoints(one.steps)[0]) for one in tried]
    liked = rng.choice(tried)
    drawings += [Drawing(liked, liked.steps)] * rng.choice((1, 2))
    changed = rng.choice(
        (
            replace(liked, guidance=5.0),
            replace(liked, scheduler=DDIM),
            replace(liked, steps=20),
            replace(liked, seed=liked.seed + 100),
            replace(liked, prompt=Prompt(liked.prompt.text + " ")),
            replace(liked, prompt=replace(liked.prompt, clip_skip=1)),
            replace(liked, negative=Prompt("")),
            replace(liked, image=_by_rank(images, rng), strength=0.6),
        )
    )
    return [*drawings, Drawing(changed, changed.steps)]


@lru_cache(maxsize=64)
def initial_state(seed: int) -> bytes:
    """A digest of the noise that a seed stands for: what mmcache's key holds instead of the seed."""
    noise = np.random.default_rng(seed).standard_normal((4, SIDE // 8, SIDE // 8), dtype=np.float32)
    return samples_digest(noise, "latent", "noise")


def _by_rank(choices: Sequence[T], rng: random.Random) -> T:
    """One of them: the k-th comes 1 / k as often as the first."""
    return rng.choices(choices, [1 / (place + 1) for place in range(len(choices))])[0]


def _init_image(photo: corpus.Photo) -> InitImage:
    image = extras.load("PIL.Image")
    height, width = photo.rgb.shape[:2]
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    square = image.fromarray(photo.rgb).crop((left, top, left + side, top + side))
    pixels = np.asarray(square.resize((SIDE, SIDE), image.Resampling.BICUBIC))
    item = item_digest(samples_digest(pixels, "image", "RGB"), processor_kwargs={"vae_tiling": False})
    return InitImage(photo.name, pixels, item, truth(b"init image", repr(pixels.shape).encode(), pixels.tobytes()))
