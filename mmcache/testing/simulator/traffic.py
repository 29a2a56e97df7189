"""Prompts: conversations that grow, a beginning that many prompts share and leave inside a run, and prompts of once."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Final

from mmcache.keys import Namespace
from mmcache.keyset import Keys

BLOCK_TOKENS: Final = 256
NAMESPACE: Final = Namespace(kind="kv", model="test/model", dtype="uint8", layout="LBHNC", block_size=BLOCK_TOKENS)
CONVERSATIONS: Final = 8
TURNS: Final = 2
TAILS: Final = 20  # more than make a fork
SHARED_BLOCKS: Final = 5  # ends inside the run that begins at token 1024
TAIL_BLOCKS: Final = 5  # at most: some go beyond that run, which is another wave of a search


class Traffic:
    """`steady` comes again and again; `once` gives what comes once."""

    def __init__(self, random: random.Random) -> None:
        self._random = random
        self._label = random.getrandbits(40) << 16
        self.steady: list[Keys] = []
        system = self._tokens(2)
        for _ in range(CONVERSATIONS):
            tokens = system + self._tokens(random.randint(1, 5))
            for _ in range(TURNS):
                self.steady.append(NAMESPACE.block_keys(tokens))
                tokens = tokens + self._tokens(random.randint(1, 5))
        shared = self._tokens(SHARED_BLOCKS)
        self.steady += [
            NAMESPACE.block_keys(shared + self._tokens(random.randint(1, TAIL_BLOCKS))) for _ in range(TAILS)
        ]

    def _tokens(self, blocks: int) -> list[int]:
        self._label += 1
        return [self._label] * (blocks * BLOCK_TOKENS)

    def once(self) -> Iterator[Keys]:
        """Prompts that nobody has asked for before."""
        while True:
            yield NAMESPACE.block_keys(self._tokens(self._random.randint(2, 16)))
