"""The requests: questions about photos and videos, as an engine's scheduler would see them arrive.

A request is token ids, the media in it, and what identifies each medium to mmcache (item digests) and, separately, to
the benchmark (truths: SHA-256 over pixels, settings and times). Sessions about different media interleave, so reuse
is near but not immediate. Some requests are traps for a cache with loose keys: the same picture under another
max_pixels, the same video sampled at another rate, two photos swapped behind equal text. No cache here.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from mmcache.bench import corpus
from mmcache.bench.encoder import GRID, TOKENS_PER_PICTURE, KVShape, block_truths, preprocess, truth
from mmcache.bench.oracle import Entry, PrefixStep
from mmcache.chain import PlaceholderSpan
from mmcache.keys import item_digest
from mmcache.media import media_digest, samples_digest

T = TypeVar("T")

# Special tokens of Qwen2-VL's tokenizer; words get stable made-up ids below them.
IM_START, IM_END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD = 151644, 151645, 151652, 151653, 151655, 151656
MAX_PIXELS = 256 * 28 * 28
FEW_PIXELS = 128 * 28 * 28
FPS, FEW_FPS = 2.0, 1.0
UNDER_WAY = 2  # sessions at any time

SYSTEM = (
    "You are a careful assistant who looks at pictures and videos before answering. Describe only what can be seen. "
    "Name objects, people, animals, colours and places plainly, and say how sure you are whenever something is partly "
    "hidden, blurred or far away. When several pictures are given, refer to them in the order in which they appear. "
    "Answer in the language of the question, in at most three sentences, and never invent text that cannot be read."
)
QUESTIONS = (
    "What is the main subject here, and what tells you so? Mention its colour, its position and anything next to it.",
    "Is there anything unusual or easy to miss in the background? If so, describe it so that I could find it myself.",
    "Please write a caption for this that a newspaper could print, and one alternative that would suit a textbook.",
    "List everything with a straight edge, then everything that is round, and say which of the two lists is longer.",
    "Which parts are in focus and which are not? What does that say about how and from where it was recorded?",
    "Suppose I could not see it at all: how would you explain the mood of this scene to me in two sentences?",
)
COMPARE = "Compare the two: what do they have in common, what differs, and which was probably recorded more recently?"


@dataclass(frozen=True)
class Scale:
    """How much media: photos, videos of so many seconds, and questions asked about each."""

    photos: int
    videos: int
    video_s: int
    questions: int


FULL = Scale(photos=8, videos=16, video_s=2, questions=4)
QUICK = Scale(photos=3, videos=1, video_s=2, questions=3)


@dataclass(frozen=True, eq=False)
class Picture:
    """One input of the vision encoder: preprocessed pixels, its item digest for mmcache, and its truth."""

    pixels: corpus.Pixels
    item: bytes
    truth: bytes


@dataclass(frozen=True, eq=False)
class Medium:
    """A photo or a sampled video under certain settings: TOKENS_PER_PICTURE placeholder tokens for each picture."""

    name: str
    pad_token: int
    pictures: tuple[Picture, ...]
    item: bytes
    truth: bytes

    @property
    def length(self) -> int:
        return TOKENS_PER_PICTURE * len(self.pictures)


@dataclass(frozen=True, eq=False)
class Request:
    """One prompt: its token ids and the media in it with the token offset of their placeholders.

    `answer`: the ids that are generated after it; empty where a workload keeps the prompts alone.
    """

    name: str
    token_ids: list[int]
    media: tuple[tuple[int, Medium], ...]
    answer: tuple[int, ...] = ()

    def spans(self) -> list[PlaceholderSpan]:
        """The placeholders as mmcache's keys want them."""
        return [PlaceholderSpan(offset, medium.length, medium.item) for offset, medium in self.media]

    def pictures(self, block_size: int) -> Iterator[tuple[int, Picture]]:
        """Every picture with the number of leading blocks that cover it: with that many it need not be encoded."""
        for offset, medium in self.media:
            for index, picture in enumerate(medium.pictures):
                yield -(-(offset + (index + 1) * TOKENS_PER_PICTURE) // block_size), picture

    def step(self, shape: KVShape, embedding_nbytes: int) -> PrefixStep:
        """The request as the replays see it, identified by truths alone."""
        media = [(offset, medium.length, medium.truth) for offset, medium in self.media]
        contents = block_truths(shape, [*self.token_ids, *self.answer], media)
        parents = [b"", *contents[:-1]]
        entries = [Entry(content, parent, shape.nbytes) for content, parent in zip(contents, parents, strict=True)]
        asked = len(self.token_ids) // shape.block_size
        return PrefixStep(
            blocks=tuple(entries[:asked]),
            embeddings=tuple(
                (covered_by, Entry(picture.truth, b"", embedding_nbytes))
                for covered_by, picture in self.pictures(shape.block_size)
            ),
            generated=tuple(entries[asked:]),
        )


def tokenize(text: str) -> list[int]:
    """Words and punctuation marks as stable ids: a stand-in for a tokenizer, good for identity and length only."""
    words = re.findall(r"\w+|[^\w\s]", text)
    return [int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little") % IM_START for word in words]


def photo_medium(photo: corpus.Photo, max_pixels: int) -> Medium:
    """A photo under a processor setting. mmcache knows it by its file's bytes, the benchmark by its pixels."""
    kwargs = {"max_pixels": max_pixels}
    item = item_digest(media_digest(photo.data, "image"), grid=GRID, processor_kwargs=kwargs)
    content = _pixels_truth(photo.rgb, max_pixels)
    picture = Picture(preprocess(photo.rgb, max_pixels), item, content)
    return Medium(f"{photo.name} at {max_pixels} px", IMAGE_PAD, (picture,), item, content)


def video_medium(video: corpus.Video, fps: float, max_pixels: int) -> Medium:
    """A video sampled at `fps`. Its frames are encoded one by one, so samplings that share a frame share its embedding;
    the item in the prompt is the whole sample with its times."""
    frames = video.sample(fps)
    times_s = [frame.time_s for frame in frames]
    kwargs = {"max_pixels": max_pixels}
    pictures = tuple(
        Picture(
            preprocess(frame.rgb, max_pixels),
            item_digest(samples_digest(frame.rgb, "image", "RGB"), grid=GRID, processor_kwargs=kwargs),
            _pixels_truth(frame.rgb, max_pixels),
        )
        for frame in frames
    )
    item = item_digest(
        media_digest(video.data, "video"),
        grid=(len(frames), *GRID[1:]),
        processor_kwargs={**kwargs, "fps": fps},
        timestamps=times_s,
    )
    content = truth(b"video", repr(times_s).encode(), *(picture.truth for picture in pictures))
    return Medium(f"{video.name} at {fps:g} fps", VIDEO_PAD, pictures, item, content)


def prompt(name: str, parts: Sequence[str | Medium]) -> Request:
    """A chat prompt: the shared system text, then the user's texts and media in this order."""
    ids, media = say(system(), "user", parts)
    return Request(name, [*ids, IM_START, *tokenize("assistant")], media)


def system() -> list[int]:
    """The shared system text, as every prompt begins."""
    return [IM_START, *tokenize("system"), *tokenize(SYSTEM), IM_END]


def say(
    ids: Sequence[int], role: str, parts: Sequence[str | Medium]
) -> tuple[list[int], tuple[tuple[int, Medium], ...]]:
    """`ids` and one message after them, and the media in that message with their token offsets."""
    said, media = [*ids, IM_START, *tokenize(role)], []
    for part in parts:
        if isinstance(part, str):
            said += tokenize(part)
        else:
            media.append((len(said) + 1, part))
            said += [VISION_START, *[part.pad_token] * part.length, VISION_END]
    return [*said, IM_END], tuple(media)


def requests(scale: Scale, seed: int) -> list[Request]:
    """Every request of the benchmark in order of arrival; the same seed gives the same list."""
    pictures = corpus.photos(scale.photos)
    videos = [
        corpus.film(pictures[index % len(pictures)], frames=scale.video_s * corpus.VIDEO_FPS, turns=0.5 + index / 4)
        for index in range(scale.videos)
    ]
    photos = [photo_medium(picture, MAX_PIXELS) for picture in pictures]
    films = [video_medium(video, FPS, MAX_PIXELS) for video in videos]
    sessions = [
        _session(medium, photo_medium(picture, FEW_PIXELS), scale.questions)
        for picture, medium in zip(pictures, photos, strict=True)
    ]
    sessions += [
        _session(medium, video_medium(video, FEW_FPS, MAX_PIXELS), scale.questions)
        for video, medium in zip(videos, films, strict=True)
    ]
    sessions += [_comparison(first, second) for first, second in zip(photos[::2], photos[1::2], strict=False)]
    sessions += [
        _comparison(photo, video_medium(video, FEW_FPS, MAX_PIXELS))
        for photo, video in zip(reversed(photos), videos[: scale.videos // 2], strict=False)
    ]
    rng = random.Random(seed)
    returns = [session[:1] for session in sessions]
    return [*interleave(sessions, rng, UNDER_WAY), *interleave(returns, rng, UNDER_WAY)]


def _session(medium: Medium, variant: Medium, questions: int) -> list[Request]:
    """Questions about one medium: after it (its blocks are a shared prefix), before it (only its embeddings can hit),
    about the same file under other settings (nothing may hit past the system text), and one prompt asked again."""
    asked = QUESTIONS[:questions]
    after = [prompt(f"{medium.name}: question {i}", [medium, text]) for i, text in enumerate(asked)]
    before = prompt(f"{medium.name}: text first", [asked[-1], medium])
    other = prompt(f"{variant.name}: other settings", [variant, asked[0]])
    return [*after, before, other, after[0]]


def _comparison(first: Medium, second: Medium) -> list[Request]:
    """Two media side by side with no text between them, then swapped behind equal text, then the first again."""
    there = prompt(f"{first.name} and {second.name}", [COMPARE, first, second])
    back = prompt(f"{second.name} and {first.name}", [COMPARE, second, first])
    return [there, back, there]


def interleave(sessions: Sequence[Sequence[T]], rng: random.Random, under_way: int) -> Iterator[T]:
    """The sessions in random order, `under_way` of them at any time."""
    waiting = [list(session) for session in sessions]
    rng.shuffle(waiting)
    active = [waiting.pop() for _ in range(min(under_way, len(waiting)))]
    while active:
        session = rng.choice(active)
        yield session.pop(0)
        if not session:
            active.remove(session)
            if waiting:
                active.append(waiting.pop())


def _pixels_truth(rgb: corpus.Pixels, max_pixels: int) -> bytes:
    return truth(b"picture", repr((rgb.shape, max_pixels)).encode(), rgb.tobytes())
