"""What a client has taken from its process after many failures: measured in a process of its own, told by its parent.

`python -m mmcache.testing.leaks URL` is that process: it reads commands, a line each, and answers each with a line.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Final, NamedTuple, Self

import mmcache
from mmcache.testing.between import FREE, Between, Limit
from mmcache.testing.values import eventually
from mmcache.testing.way import DEADLINE_S, MEMORY, NBYTES, LateError, Stored, Way, holds_nothing, led

WARM: Final = 8  # what is taken once, by gRPC's or NIXL's own threads too, is no leak
FAILURES: Final = 24
WINDOWS: Final = 3
GROWTH_NBYTES: Final = FAILURES * NBYTES // 3


class Taken(NamedTuple):
    """What a process has."""

    descriptors: int
    threads: int
    nbytes: int


def taken() -> Taken:
    """Of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Taken(
        len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), pages * os.sysconf("SC_PAGESIZE")
    )


class Reader:
    """A process that reads one value over and over. Use as a context manager."""

    def __init__(self, url: str) -> None:
        words = [sys.executable, "-m", "mmcache.testing.leaks", url]
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=quiet, text=True)

    def tell(self, command: str) -> Any:
        """A command's answer. Raises LateError if a call was late."""
        there, back = self._process.stdin, self._process.stdout
        assert there is not None
        assert back is not None
        there.write(command + "\n")
        there.flush()
        line = back.readline()
        assert line, f"the reader ended at {command!r}"
        answer = json.loads(line)
        if isinstance(answer, str):
            raise LateError(answer)
        return answer

    def settles(self, before: Taken, patience_s: float = 5.0) -> None:
        """Its descriptors and threads are what they were, soon, and its memory is about as much."""
        now = before

        def back() -> bool:
            nonlocal now
            now = Taken(*self.tell("taken"))
            few = now.descriptors <= before.descriptors and now.threads <= before.threads
            return few and now.nbytes < before.nbytes + GROWTH_NBYTES

        try:
            eventually(back, "what was taken is given back", patience_s)
        except AssertionError:
            raise AssertionError(f"{before} became {now} after {FAILURES} failures") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()


def many_failures_leave_no_descriptor_thread_or_memory(way: Way) -> None:
    """Cut off within a value's bytes, again and again: by one client that recovers, and by clients that are closed."""
    stored = Stored("leak", count=1)
    with way.server(MEMORY) as server, led(way, server) as between, Reader(way.url(between.address)) as reader:
        with way.connect(way.address(server), DEADLINE_S) as direct:
            eventually(lambda: stored.put(direct), "it stores")

        def recover() -> None:
            _cut(between, reader)
            eventually(lambda: reader.tell("get") == 1, "it hits again")

        def come_and_go() -> None:
            reader.tell("connect")
            eventually(lambda: reader.tell("get") == 1, "it hits")
            _cut(between, reader)
            reader.tell("close")

        reader.tell("connect")
        _repeat(reader, recover)
        reader.tell("close")
        _repeat(reader, come_and_go)
        holds_nothing(way, server)


def _cut(between: Between, reader: Reader) -> None:
    between.limit(Limit(nbytes=50_000))
    between.drop()
    reader.tell("get")
    between.limit(FREE)


def _repeat(reader: Reader, fail: Callable[[], None]) -> None:
    """A leak goes on; a heap that grows to its usual size still (gRPC takes some 60 failures) comes to an end."""
    for _ in range(WARM):
        fail()
    first = Taken(*reader.tell("taken"))
    for window in range(WINDOWS):
        before = first._replace(nbytes=Taken(*reader.tell("taken")).nbytes)  # of the others not one more, ever
        for _ in range(FAILURES):
            fail()
        try:
            reader.settles(before)
            return
        except AssertionError:
            if window == WINDOWS - 1:
                raise


def main(url: str, commands: IO[str], answers: IO[str]) -> None:
    """Obey until there is nothing more to read."""
    stored = Stored("leak", count=1)
    cache = mmcache.connect(url, deadline_s=DEADLINE_S, lazy=True)
    cache.close()
    for command in map(str.strip, commands):
        answer: Any = None
        if command == "connect":
            cache = mmcache.connect(url, deadline_s=DEADLINE_S, lazy=True)
        elif command == "get":
            try:
                answer = stored.get(cache)
            except LateError as error:
                answer = str(error)
        elif command == "close":
            cache.close()
        elif command == "taken":
            answer = taken()
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.stdin, sys.stdout)
