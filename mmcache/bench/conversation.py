"""The requests of `mmcache bench chat`: many users in conversations about photos, as a scheduler would see them arrive.

Every prompt is the system text, all that was said before, and a new message, so its leading KV blocks are those of the
turn before it, with the blocks that the answer completed. A photo comes back in a later turn of its own conversation
(its embedding can hit, its blocks cannot: they stand elsewhere) and in other users' conversations (where the text
before it is the same, its blocks can hit too). No cache here.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from mmcache.bench import corpus
from mmcache.bench.workload import (
    FEW_PIXELS,
    IM_END,
    IM_START,
    MAX_PIXELS,
    QUESTIONS,
    Medium,
    Request,
    interleave,
    photo_medium,
    say,
    system,
    tokenize,
)

UNDER_WAY = 4  # conversations at any time
ANSWER_TOKENS = (32, 96)
FOLLOW_UPS = (
    "Thank you. What makes you say so?",
    "And how would somebody from another field describe it?",
    "Please say that again, but shorter, and without the last point.",
    "I am not convinced: which detail would change your mind?",
    "Could the light have come from the other side?",
    "What should I look at next if I want to learn more about it?",
    "Turn that into three points for a slide, please.",
    "Is that typical, or is it an exception?",
)
AGAIN = "Here it is once more, so that you need not scroll up. Look at the lower half only."
ANOTHER = "Now compare what you said with this one."
SMALLER = "The same at a lower resolution: does your answer still hold?"


@dataclass(frozen=True)
class ChatScale:
    """How much talk: users with a conversation each, photos they talk about, and turns of a conversation."""

    users: int
    photos: int
    turns: tuple[int, int]


FULL = ChatScale(users=24, photos=8, turns=(3, 6))
QUICK = ChatScale(users=5, photos=2, turns=(3, 4))


@dataclass(frozen=True, eq=False)
class Photos:
    """The photos as they are usually sent, and at a lower resolution, in order of popularity."""

    usual: Sequence[Medium]
    smaller: Sequence[Medium]

    def pick(self, rng: random.Random) -> int:
        """One of them: the k-th is asked about 1 / k as often as the first."""
        return rng.choices(range(len(self.usual)), [1 / (place + 1) for place in range(len(self.usual))])[0]


def requests(scale: ChatScale, seed: int) -> list[Request]:
    """Every request in order of arrival; the same seed gives the same list. Of each conversation the last turn comes
    after all the others': its user went away and came back."""
    rng = random.Random(seed)
    taken = corpus.photos(scale.photos)
    photos = Photos(
        [photo_medium(photo, MAX_PIXELS) for photo in taken], [photo_medium(photo, FEW_PIXELS) for photo in taken]
    )
    talks = [_conversation(f"user {user}", rng.randint(*scale.turns), photos, rng) for user in range(scale.users)]
    first = interleave([talk[:-1] for talk in talks], rng, UNDER_WAY)
    return [*first, *interleave([talk[-1:] for talk in talks], rng, UNDER_WAY)]


def _conversation(user: str, turns: int, photos: Photos, rng: random.Random) -> list[Request]:
    """The turns of one conversation. Some are asked twice, some with the last message changed."""
    ids, media = system(), ()  # type: tuple[list[int], tuple[tuple[int, Medium], ...]]
    sent = photos.pick(rng)
    question = rng.choice(QUESTIONS)
    message: list[str | Medium] = [photos.usual[sent], question]
    if rng.random() < 0.3:
        message.reverse()  # the text first: no blocks are shared past it, the embedding is
    asked = []
    for turn in range(turns):
        asked.append(_turn(f"{user}: turn {turn + 1}", ids, media, message, rng))
        if rng.random() < 0.15:  # the same again: another answer is wanted
            asked.append(_turn(f"{user}: turn {turn + 1} again", ids, media, message, rng))
        if rng.random() < 0.15:  # the message was edited
            edited = [*message, rng.choice(FOLLOW_UPS)]
            asked.append(_turn(f"{user}: turn {turn + 1} edited", ids, media, edited, rng))
        ids, media = [*asked[-1].token_ids, *asked[-1].answer], asked[-1].media
        message, sent = _next_message(sent, photos, rng)
    return asked


def _next_message(sent: int, photos: Photos, rng: random.Random) -> tuple[list[str | Medium], int]:
    """What is said next, and which photo is now the talk."""
    kind = rng.random()
    if kind < 0.15:
        return [photos.usual[sent], AGAIN], sent
    if kind < 0.30:
        other = photos.pick(rng)
        return [photos.usual[other], ANOTHER], other
    if kind < 0.35:
        return [photos.smaller[sent], SMALLER], sent  # other pixels: nothing of the larger one may come back
    return rng.sample([*FOLLOW_UPS, *QUESTIONS], 2), sent


def _turn(
    name: str,
    ids: Sequence[int],
    media: tuple[tuple[int, Medium], ...],
    message: Sequence[str | Medium],
    rng: random.Random,
) -> Request:
    asked, new_media = say(ids, "user", message)
    answer = (*(rng.randrange(IM_START) for _ in range(rng.randint(*ANSWER_TOKENS))), IM_END)
    return Request(name, [*asked, IM_START, *tokenize("assistant")], (*media, *new_media), answer)
