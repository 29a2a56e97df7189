"""The requests of `mmcache bench serve`, as messages of OpenAI's chat API: real pictures, and text made up from a seed.

Captioning: several questions about the same images, or about the same frames of a camera move. Chat: conversations that
grow, whose photos come back in later turns and in other conversations. All of it follows from the options and the seed,
what an assistant said before included; so a second run with the same seed asks exactly the same, and one with another
seed shares neither text nor pixels with it.
"""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmcache.bench import corpus, extras
from mmcache.bench.conversation import AGAIN, ANOTHER, FOLLOW_UPS
from mmcache.bench.workload import QUESTIONS, interleave
from mmcache.errors import ConfigError

WORKLOADS = ("captioning", "chat")
ASKED = (*QUESTIONS, *FOLLOW_UPS)
UNDER_WAY = {"captioning": 2, "chat": 4}  # media, or conversations, at any time
POOL = 6  # photos that conversations are about
ANSWER_CHARACTERS = 200
JPEG_QUALITY = 90
SYSTEM = "You are a careful assistant who looks before answering, and who says how sure you are."
WORDS = (
    "amber anchor autumn balcony basket bridge bright brown calm candle castle cedar clear cloud coast copper "
    "corner courtyard crowd dark distant door dust early eastern empty evening faded fence field flat garden gate "
    "glass gold grass green grey harbour heavy high hill house iron island ladder lamp lantern late leaf light long "
    "low market meadow mist moss narrow near northern old open orange orchard painted pale path pebble pier pine "
    "plain quiet rail red ridge river road roof rope round sand shadow sharp shore silver sky slow small smooth "
    "southern square stair steep stone street summer tall tide tower tree valley village wall warm water western "
    "white wide wind window wood"
)

Message = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What to ask.

    Attributes:
        workload: "captioning" or "chat".
        requests: how many; the last medium, or conversation, may be cut short.
        questions: about the same media, or turns of a conversation.
        images: in a captioning prompt; at most so many in a conversation; 0 for models of text alone.
        size: of each image, (width, height) in pixels.
        characters: of made-up text in each medium's, or conversation's, first message.
        seed: another one gives other text and other pixels.
    """

    workload: str
    requests: int
    questions: int
    images: int
    size: tuple[int, int]
    characters: int
    seed: str


@dataclass(frozen=True, eq=False)
class Prompt:
    """One request: its name, which question about its media (or turn of its conversation) it is, and its messages."""

    name: str
    place: int
    messages: list[Message]


def prompts(shape: Shape) -> list[Prompt]:
    """Every request in order of arrival. Raises ConfigError where the media libraries are missing."""
    if not 1 <= shape.questions <= len(ASKED):
        raise ConfigError(f"{shape.questions} questions asked for: choose 1 to {len(ASKED)}")
    camera = Camera(shape) if shape.images else None
    session = {"captioning": _captioning, "chat": _chat}[shape.workload]
    count = -(-shape.requests // shape.questions)
    sessions = [session(shape, camera, number) for number in range(count)]
    sessions[-1] = sessions[-1][: shape.requests - (count - 1) * shape.questions]
    return list(interleave(sessions, random.Random(f"{shape.seed}/order"), UNDER_WAY[shape.workload]))


def made_up(rng: random.Random, characters: int) -> str:
    """Sentences of real words in no real order: about so many characters."""
    text, words = "", WORDS.split()
    while len(text) < characters:
        text += " ".join(rng.choices(words, k=rng.randint(6, 14))).capitalize() + ". "
    return text[:characters]


class Camera:
    """Takes pictures of the corpus's photos, each from a place of its own, as data URLs of JPEG files."""

    def __init__(self, shape: Shape) -> None:
        self._photos = corpus.photos(len(corpus.PHOTOS))
        self._size = shape.size
        rng = random.Random(f"{shape.seed}/photos")
        self.pool = [self.stills(rng, 1)[0] for _ in range(POOL)] if shape.workload == "chat" else []

    def stills(self, rng: random.Random, count: int) -> list[str]:
        """Different photos."""
        chosen = [rng.choice(self._photos) for _ in range(count)]
        return [url for photo in chosen for url in self._seen(photo, 1, 0.0, rng)]

    def frames(self, rng: random.Random, count: int) -> list[str]:
        """Frames of one move over one photo."""
        return self._seen(rng.choice(self._photos), count, 0.25, rng)

    def _seen(self, photo: corpus.Photo, count: int, turns: float, rng: random.Random) -> list[str]:
        image = extras.load("PIL.Image")
        urls = []
        for pixels in corpus.shots(photo, count, turns=turns, start=rng.random(), size=self._size):
            file = io.BytesIO()
            image.fromarray(pixels).save(file, "JPEG", quality=JPEG_QUALITY)
            urls.append("data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode())
        return urls


def _system(shape: Shape) -> Message:
    """Begins with words of the seed, so that no prompt of another run shares its first block."""
    return {"role": "system", "content": f"{made_up(random.Random(f'{shape.seed}/system'), 64)}. {SYSTEM}"}


def _user(images: Sequence[str], *texts: str) -> Message:
    said = " ".join(text for text in texts if text)
    if not images:
        return {"role": "user", "content": said}
    parts: list[Message] = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": said}]}


def _captioning(shape: Shape, camera: Camera | None, number: int) -> list[Prompt]:
    """Questions about one medium; every second medium is a camera move."""
    rng = random.Random(f"{shape.seed}/captioning/{number}")
    images: list[str] = []
    if camera is not None:
        images = (camera.frames if number % 2 else camera.stills)(rng, shape.images)
    notes = made_up(rng, shape.characters)
    kind = "text" if camera is None else "video" if number % 2 else "images"
    return [
        Prompt(f"{kind} {number + 1}, question {place + 1}", place, [_system(shape), _user(images, notes, question)])
        for place, question in enumerate(rng.sample(ASKED, shape.questions))
    ]


def _chat(shape: Shape, camera: Camera | None, number: int) -> list[Prompt]:
    """The turns of one conversation. A photo comes back in three of ten turns: one seen before, or another one."""
    rng = random.Random(f"{shape.seed}/chat/{number}")
    pool = camera.pool if camera is not None else []
    said, sent = [_system(shape)], 0
    found = []
    for place in range(shape.questions):
        question, images = rng.choice(FOLLOW_UPS if place else QUESTIONS), []
        if pool and sent < shape.images and (not place or rng.random() < 0.3):
            images = [rng.choices(pool, [1 / (rank + 1) for rank in range(len(pool))])[0]]
            question = question if not place else f"{rng.choice((AGAIN, ANOTHER))} {question}"
            sent += 1
        said = [*said, _user(images, "" if place else made_up(rng, shape.characters), question)]
        found.append(Prompt(f"conversation {number + 1}, turn {place + 1}", place, said))
        said = [*said, {"role": "assistant", "content": made_up(rng, ANSWER_CHARACTERS)}]
    return found
