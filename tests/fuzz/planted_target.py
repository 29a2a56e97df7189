"""A target with a bug in it, to show that one is found, kept and reproduced."""

from __future__ import annotations

from random import Random

from tests.fuzz.bed import Mutate


class PlantedTarget:
    """Breaks on any input that repeats a byte four times."""

    max_nbytes = 64

    def seeds(self) -> list[bytes]:
        """One that does not break it."""
        return [b"abcdefgh"]

    def mutate(self, data: bytes, random: Random, blind: Mutate) -> bytes:
        """Any bytes, or one of them again."""
        at = random.randrange(len(data) + 1)
        return blind(data) if random.random() < 0.5 else data[:at] + data[max(0, at - 1) :]

    def check(self, data: bytes) -> None:
        """Raise AssertionError where the bug is."""
        assert not any(data[i : i + 4] == data[i : i + 1] * 4 for i in range(len(data) - 3)), "the planted bug"

    def close(self) -> None:
        """Nothing was started."""
