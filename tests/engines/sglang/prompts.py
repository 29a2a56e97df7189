"""What the SGLang tests ask: prompts of token ids, and prompts with pictures (pictures.py)."""

from __future__ import annotations

from typing import Final, NamedTuple

PAGE: Final = 16
PICTURE: Final = "<|vision_start|><|image_pad|><|vision_end|>"  # without spaces, as SGLang looks for it
BEFORE: Final = 40  # words before the first picture
BEFORE_PAGES: Final = BEFORE // PAGE * PAGE  # tokens in full pages that hold nothing of it


def ids(start: int, count: int) -> list[int]:
    """A prompt of `count` token ids, from `start` on."""
    return [number % 2000 for number in range(start, start + count)]


def words(start: int, count: int) -> str:
    """The text of `ids(start, count)` for the VL model's tokenizer."""
    return " ".join(f"t{number}" for number in ids(start, count))


class Pictured(NamedTuple):
    """A prompt: its text, with a PICTURE for each of the pictures it shows."""

    text: str
    pictures: tuple[str, ...]


def about(*pictures: str, first: int = 100) -> Pictured:
    """Words, the first picture, more words, and so on."""
    places = (f"{PICTURE} {words(300 + 100 * place, 60)}" for place in range(len(pictures)))
    return Pictured(" ".join([words(first, BEFORE), *places]), pictures)


TEXTS: Final = {
    "plain": ids(5, 520),
    "same beginning": ids(5, 300) + ids(900, 220),
    "long": ids(31, 2200),  # more pages than SGLang asks for at once
}
MANY: Final = [ids(5, 96) + ids(100 * place + 200, 120) for place in range(16)]  # asked at the same time
PICTURED: Final = {
    **{name: about(name) for name in ("first", "second", "touched", "row", "column", "wide", "tall")},
    "first second": about("first", "second"),
    "first touched": about("first", "touched"),
}
STORED: Final = ("first", "row", "wide", "first second")
