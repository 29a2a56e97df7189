"""One client process: conversations that grow, each byte compared, each call timed, until SIGTERM.

    python -m tests.faults.traffic.client SETTINGS        a JSON object: see Settings

At the end it closes its client, and prints what it had open before its first call and has now: a line of JSON. No
exception of the client's ends it: it is written down, and the next call tried.
"""

from __future__ import annotations

import json
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

import mmcache
from mmcache.client.blocking import Client
from mmcache.errors import FrameError
from mmcache.frame_view import Frame
from mmcache.keyset import Keys
from mmcache.testing.leaks import Taken, taken
from mmcache.testing.values import Bytes, blanks
from tests.faults.traffic.records import Recorder, cpu_wait_s, go_first
from tests.faults.traffic.values import BLOCK_NBYTES, PICTURE_NBYTES, TURNS, Values, is_right, value_of

T = TypeVar("T")
PICTURES = 48
PACE_S = 0.02
HOLD_S = 0.2  # the longest that a lease is used, but for the process being stopped
BACK_S = 8.0  # until what a closed client had open must be given back


@dataclass(frozen=True)
class Settings:
    """`name`: of its lane; `life`: how many processes had that before it. `population`: whose keys it uses."""

    url: str
    name: str
    life: int
    seed: int
    population: str
    chats: int
    folder: str

    def words(self) -> list[str]:
        """The command of such a process."""
        return [sys.executable, "-m", "tests.faults.traffic.client", json.dumps(asdict(self))]


class Engine:
    """What uses the cache as an engine does. `known`: how many leading blocks of each conversation are stored."""

    def __init__(self, settings: Settings, cache: Client, recorder: Recorder) -> None:
        self.settings, self.cache, self.recorder = settings, cache, recorder
        self.random = random.Random(f"{settings.seed}/{settings.name}/{settings.life}")
        self.values = Values(settings.population)
        # Conversations of their own for each life: another client's would be known to it and not to this one.
        self.chats = [(settings.seed * 1000 + chat, settings.life) for chat in range(settings.chats)]
        self.turns = [1] * settings.chats
        self.known = [0] * settings.chats
        self.pictures: set[int] = set()
        self.blocks = blanks(200, BLOCK_NBYTES)

    def timed(self, op: str, call: Callable[[], T], count: Callable[[T], tuple[int, int, int]], lost: T) -> T:
        """Make a call and write it down; `lost` is its answer if it raises."""
        waited_s, began_s = cpu_wait_s(), time.monotonic()
        try:
            answer = call()
        except Exception as error:
            self.recorder.trouble("raised", f"{op}: {error!r}")
            answer = lost
        took_s = time.monotonic() - began_s
        waited_s = cpu_wait_s() - waited_s
        self.recorder.call(op, (began_s, took_s, waited_s), count(answer))
        return answer

    def step(self) -> None:
        """A turn of a conversation, a picture, or a look at what is there."""
        kind = self.random.random()
        if kind < 0.6:
            self.turn()
        elif kind < 0.8:
            self.picture()
        elif kind < 0.9:
            self.look()
        else:
            self.lease()

    def turn(self) -> None:
        """Ask for the prompt so far, read what is there, store the rest."""
        at = self.random.randrange(len(self.chats))
        chat, generation = self.chats[at]
        keys, known = self.values.prompt(chat, generation, self.turns[at]), self.known[at]
        pinned = None
        if self.random.random() < 0.5:
            pinned = self.timed("pin_prefix", lambda: self.cache.pin_prefix(keys), nothing, None)
            count = pinned.count if pinned is not None else 0
        else:
            count = self.timed("match_prefix", lambda: self.cache.match_prefix(keys), nothing, 0)
        found = self.read(keys[:count], self.blocks[:count], known)
        if pinned is not None:
            self.timed("release", pinned.release, nothing, False)
        self.known[at] = found + self.store(keys[found:], BLOCK_NBYTES)
        self.turns[at] += 1
        if self.turns[at] > TURNS:
            self.chats[at], self.turns[at], self.known[at] = (chat, generation + 100), 1, 0

    def picture(self) -> None:
        """Read an embedding, or store it."""
        number = self.random.randrange(PICTURES)
        keys = self.values.picture(number)
        if not self.read(keys, blanks(1, PICTURE_NBYTES), int(number in self.pictures)):
            self.pictures.discard(number)
            if self.store(keys, PICTURE_NBYTES):
                self.pictures.add(number)

    def read(self, keys: Keys, buffers: list[Any], known: int) -> int:
        """How many leading ones are hits; every hit is compared. `known`: how many should be."""

        def count(results: list[Any]) -> tuple[int, int, int]:
            return known, min(known, leading(results)), sum(map(bool, results))

        results: list[Any] = self.timed("get_into", lambda: self.cache.get_into(keys, buffers), count, [])
        results = results or [False] * len(keys)
        for digest, result, buffer in zip(keys.digests, results, buffers, strict=True):
            if result and not is_right(digest, buffer):
                self.recorder.trouble("wrong", f"get_into: {digest.hex()}")
        return leading(results)

    def store(self, keys: Keys, nbytes: int) -> int:
        """How many leading ones could be stored."""
        if not len(keys):
            return 0
        values = [value_of(digest, nbytes) for digest in keys.digests]
        return leading(self.timed("put", lambda: self.cache.put(keys, values), nothing, []))

    def look(self) -> None:
        """Ask which blocks are there."""
        at = self.random.randrange(len(self.chats))
        keys = self.values.prompt(*self.chats[at], self.turns[at])
        flags = self.timed("contains", lambda: self.cache.contains(keys), nothing, [False] * len(keys))
        if len(flags) != len(keys):
            self.recorder.trouble("wrong", f"contains: {len(flags)} answers to {len(keys)} keys")

    def lease(self) -> None:
        """See some blocks under a lease for a moment. What they were counts if the lease was held to the end."""
        at = self.random.randrange(len(self.chats))
        keys = self.values.prompt(*self.chats[at], self.turns[at])
        start = self.random.randrange(len(keys))
        keys = keys[start : start + 16]
        leased = self.timed("acquire", lambda: self.cache.acquire(keys), nothing, None)
        if leased is None:
            return
        time.sleep(self.random.random() * HOLD_S)
        copies = [(key, copy_of(frame)) for key, frame in zip(keys.digests, leased.frames, strict=True) if frame]
        held = self.timed("release", leased.release, lambda _: (0, 0, len(copies)), False)
        for digest, copy in copies:
            if held and copy is not None and not is_right(digest, copy):
                self.recorder.trouble("wrong", f"acquire: {digest.hex()}")


def copy_of(frame: Frame) -> Bytes | None:
    """The one tensor of a frame, verified and copied; None if it is not sound: a miss, as its lease may be over."""
    try:
        frame.verify()
        (stored,) = frame.header.tensors
    except FrameError:
        return None
    return np.frombuffer(bytes(frame.payload(stored)), np.uint8)


def nothing(answer: Any) -> tuple[int, int, int]:
    """Asked, hits and compared values of a call that has none."""
    return 0, 0, 0


def _more(now: Taken, before: Taken) -> bool:
    return now.descriptors > before.descriptors or now.threads > before.threads


def leading(results: list[Any]) -> int:
    """How many are true before the first that is not."""
    return next((row for row, result in enumerate(results) if not result), len(results))


def main(words: list[str]) -> int:
    """See the top of this file."""
    settings = Settings(**json.loads(words[0]))
    over = False

    def end(*_: Any) -> None:
        nonlocal over
        over = True

    signal.signal(signal.SIGTERM, end)
    go_first()
    with Recorder(Path(settings.folder), f"{settings.name}-{settings.life}") as recorder:
        mmcache.connect(settings.url, lazy=True).close()
        before = taken()
        with mmcache.connect(settings.url, lazy=True) as cache:
            cache.announces = False
            engine = Engine(settings, cache, recorder)
            while not over:
                engine.step()
                time.sleep(PACE_S * engine.random.random() * 2)
            counters = dict(cache.counters)
        give_up_s = time.monotonic() + BACK_S
        while _more(now := taken(), before) and time.monotonic() < give_up_s:
            time.sleep(0.1)
    print(json.dumps({"before": before._asdict(), "after": now._asdict(), "counters": counters}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
