"""A mix of requests and troubles, from a seed: what an hour of a busy engine before a bad cache meets, in little.

`working_set` has the prompts, a few of every kind that the cache tells apart, many of which begin alike. `beats` has
the order: who arrives at which step, who is aborted in which state, when the engine loses its own caches, what befalls
the cache. Nothing here runs anything.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tests.engines.vllm.harness import BLOCK, Ask, ask, words
from tests.engines.vllm.models import IMAGE, VIDEO

LORAS: Final = (["one", 1, "adapter"], ["two", 2, "adapter-retrained"], ["renewed", 3, "adapter-retrained"])
SALTS: Final = ("mine", "yours")
SPOKEN: Final = 40  # tokens of a chat's first answer: at least one block of the next prompt is the engine's own words
STEM_SEED: Final = 7000
STATES: Final = ("loading", "prefill", "decode", "waiting", "preempted")  # in which a request is aborted
# What befalls the cache. `killed`: SIGKILL, then a new, empty server. `stopped`: SIGSTOP for longer than the deadline.
# `flipped`: bits of stored frames. `reshaped`: frames of another shape, `swapped`: frames of other keys, under right
# keys. `forgotten`: entries deleted. `refusing`: everything leased, so that nothing finds room.
FAULTS: Final = ("killed", "stopped", "flipped", "reshaped", "swapped", "forgotten", "refusing")
SECOND_LIFE: Final = 0.6  # of the beats, after which the engine forgets all it has seen


@dataclass(frozen=True)
class Case:
    """One prompt of the working set. `life`: asked only before (0) or after (1) the engine forgot what it had seen."""

    kind: str
    ask: Ask
    life: int | None = None


@dataclass(frozen=True)
class Beat:
    """A few steps of the engine: first `arrivals` (places in the working set) are added, then it runs `steps` steps.

    `aborts`: states in each of which one request is aborted as soon as one is in it. `forget`: before that the engine's
    own prefix cache is emptied, and with it what runs preempted; `reborn`: all its caches are, once nothing runs.
    """

    arrivals: tuple[int, ...]
    steps: int
    aborts: tuple[str, ...] = ()
    forget: bool = False
    reborn: bool = False
    fault: str = ""


def working_set(seed: int) -> list[Case]:
    """The prompts, some hundreds; the same for the same seed."""
    return list(_cases(random.Random(seed), 100_000 * (seed + 1)))


def _cases(chance: random.Random, base: int) -> Iterator[Case]:
    stems = [words(STEM_SEED + i, 64 + 48 * i) for i in range(5)]
    fresh = iter(range(base, base + 100_000))

    def tail(least: int = 10, most: int = 140) -> str:
        return words(next(fresh), chance.randrange(least, most))

    def stem() -> str:
        whole = chance.choice(stems)
        return whole if chance.random() < 0.7 else whole[: chance.randrange(1, len(whole))]

    def tokens() -> int:
        return chance.randrange(4, 9)

    for _ in range(40):
        yield Case("text", ask(stem() + tail(), max_tokens=tokens()))
    for blocks in range(1, 9):
        for beyond in (-1, 0, 1):
            length = blocks * BLOCK + beyond
            yield Case("block border", ask((stems[-1] + words(base, 100))[:length], max_tokens=tokens()))
    for _ in range(6):
        yield Case("several chunks", ask(stem() + tail(560, 700), max_tokens=tokens()))
    for _ in range(12):
        yield Case("decode", ask(stem() + tail(), max_tokens=chance.randrange(36, 72)))
    for text in (stem() + tail() for _ in range(8)):
        yield from (Case("adapter", ask(text, max_tokens=tokens(), lora=lora)) for lora in LORAS)
        yield Case("text", ask(text, max_tokens=tokens()))
    for text in (stem() + tail() for _ in range(8)):
        yield from (Case("salt", ask(text, max_tokens=tokens(), salt=salt)) for salt in SALTS)
        yield Case("text", ask(text, max_tokens=tokens()))
    for _ in range(3):
        yield Case("not reading", ask(stem() + tail(), max_tokens=tokens(), skip_reading=True))
    yield from _chats(chance, stems, fresh)
    yield from _pictures(chance, stems, fresh)
    yield Case("refused", ask(stem() + IMAGE, {"kind": "broken"}))
    yield Case("refused", ask(words(next(fresh), 1100)))


def _chats(chance: random.Random, stems: Sequence[str], fresh: Iterator[int]) -> Iterator[Case]:
    """Each first turn, and the second after it."""
    for place in range(10):
        text, said = chance.choice(stems) + words(next(fresh), 40), words(next(fresh), 30)
        more: dict[str, Any] = {"lora": LORAS[0]} if place % 5 == 3 else {"salt": SALTS[0]} if place % 5 == 4 else {}
        pictures = [place] if place % 5 == 2 else []
        first = ask(text, *pictures, max_tokens=SPOKEN, **more)
        yield Case("chat", first)
        yield Case("next turn", {**first, "then": [said]})


def _pictures(chance: random.Random, stems: Sequence[str], fresh: Iterator[int]) -> Iterator[Case]:
    """The same few pictures in many prompts; twins of one pixel; clips; names, good and forged."""
    pool = range(6)
    before = [stem[:70] for stem in stems[:3]]

    def around(*items: str, after: int = 60) -> str:
        text = chance.choice(before)
        for item in items:
            text += item + words(next(fresh), chance.choice([0, 0, 9, 30]))
        return text + words(next(fresh), chance.randrange(5, after))

    def tokens() -> int:
        return chance.randrange(4, 9)

    for _ in range(30):
        yield Case("image", ask(around(IMAGE), chance.choice(pool), max_tokens=tokens()))
    for seed in pool:
        text = around(IMAGE, after=100)
        twin = {"kind": "picture", "seed": seed, "changed": True}
        yield Case("image", ask(text, seed, max_tokens=tokens()))
        yield Case("one pixel", ask(text, twin, max_tokens=tokens()))
    for count in (2, 2, 2, 2, 3, 3, 3, 3):
        several = chance.sample(pool, count)
        text = around(*[IMAGE] * count)
        yield Case("images", ask(text, *several, max_tokens=tokens()))
        yield Case("images", ask(text, *reversed(several), max_tokens=tokens()))
    for seed in (1, 1, 2):
        text = around(VIDEO)
        for every in (1, 2):
            clip = {"kind": "frames", "seed": seed, "every": every}
            yield Case("video", ask(text, videos=[clip], max_tokens=tokens()))
        yield Case("video", ask(IMAGE + text, 0, videos=[clip], max_tokens=tokens()))
    for seed in pool:
        named = {"image": [f"picture {seed}"]}
        yield Case("uuid", ask(around(IMAGE), seed, uuids=named, max_tokens=tokens()))
    for place in range(3):
        text, forged = around(IMAGE), {"image": [f"forged {place}"]}
        for life in (0, 1):
            yield Case("forged uuid", ask(text, 20 + 2 * place + life, uuids=forged, max_tokens=tokens()), life)
    for lora in LORAS:
        yield Case("image and adapter", ask(before[0] + IMAGE + words(next(fresh), 40), 3, lora=lora, max_tokens=5))


def beats(seed: int, cases: Sequence[Case], requests: int, *, every: int = 4, sizes: int = 9) -> list[Beat]:
    """At least so many requests, and every case among them. Every `every`-th beat the cache has trouble, each kind in
    turn; `sizes` bounds how many arrive at once, so that some beats crowd the engine and others leave it idle.
    """
    chance = random.Random(seed)
    count = -(-2 * requests // sizes)
    turn = round(SECOND_LIFE * count)
    order = [list(_order(chance, cases, life, requests)) for life in (0, 1)]
    troubles = _troubles(chance)
    found = []
    for number in range(count):
        life = int(number >= turn)
        left = order[life]
        size = chance.randrange(1, sizes)
        if number in (turn - 1, count - 1):
            size = len(left)  # whatever has not been asked in this life
        arrivals, order[life] = left[:size], left[size:]
        trouble = number % every == every - 1
        found.append(
            Beat(
                tuple(arrivals),
                steps=chance.randrange(1, 12),
                aborts=(chance.choice(STATES),) if chance.random() < 0.5 else (),
                forget=trouble or chance.random() < 0.2,
                reborn=number == turn,
                fault=next(troubles) if trouble else "",
            )
        )
    return found


def _order(chance: random.Random, cases: Sequence[Case], life: int, requests: int) -> Iterator[int]:
    """Every case of this life once, and some again and again: few prompts get most of the requests."""
    share = SECOND_LIFE if not life else 1 - SECOND_LIFE
    mine = [place for place, case in enumerate(cases) if case.life in (None, life)]
    weights = [1 / (1 + chance.randrange(len(mine))) for _ in mine]
    again = chance.choices(mine, weights, k=max(0, round(share * requests) - len(mine)))
    everything = mine + again
    chance.shuffle(everything)
    yield from everything


def _troubles(chance: random.Random) -> Iterator[str]:
    while True:
        yield from chance.sample(FAULTS, len(FAULTS))
