"""Feeds a target from atheris until it has had its bytes: `python -m tests.fuzz.drive TARGET COUNTS BYTES LIBFUZZER...`

A process of its own, as libFuzzer ends the process it runs in. COUNTS is a file of three numbers that outlives any end:
how many inputs the target was given, their bytes, and the peak of resident memory.
"""

from __future__ import annotations

import mmap
import os
import sys
from random import Random
from struct import Struct
from typing import Final

import atheris

from tests.fuzz import bed
from tests.fuzz.targets import start

COUNTS: Final = Struct("<QQQ")


def main() -> None:
    """Does not return."""
    name, counts_file, nbytes, *arguments = sys.argv[1:]
    with atheris.instrument_imports(include=["mmcache"]):
        target = start(name)
    limit_nbytes = int(nbytes)
    with open(counts_file, "r+b") as file:
        counts = mmap.mmap(file.fileno(), COUNTS.size)

    def feed(data: bytes) -> None:
        inputs, fed_nbytes, _ = COUNTS.unpack_from(counts)
        COUNTS.pack_into(counts, 0, inputs + 1, fed_nbytes + len(data), bed.peak_rss())
        target.check(data)
        if fed_nbytes + len(data) >= limit_nbytes:
            target.close()
            sys.stderr.flush()
            os._exit(0)

    def mutate(data: bytes, max_nbytes: int, seed: int) -> bytes:
        def blind(piece: bytes) -> bytes:
            return bytes(atheris.Mutate(piece, max(len(piece), max_nbytes)))

        return target.mutate(bytes(data), Random(seed), blind)[:max_nbytes]

    atheris.Setup([sys.argv[0], f"-max_len={target.max_nbytes}", *arguments], feed, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
