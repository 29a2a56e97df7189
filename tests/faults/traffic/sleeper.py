"""A process that only sleeps and wakes, on each CPU: how late it is woken is what this machine does to everybody.

python -m tests.faults.traffic.sleeper FILE       rows of three doubles, one a CPU each tenth of a second, until SIGTERM
"""

from __future__ import annotations

import os
import struct
import sys
import threading
import time
from io import FileIO
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tests.faults.traffic.records import go_first

NAP_S: Final = 0.005
ROW_S: Final = 0.1
_ROW: Final = struct.Struct("<ddd")


def main(words: list[str]) -> None:
    """Sleep, and write down by how much the longest nap of each tenth of a second was too long, for each CPU alone: a
    hypervisor may stop one and not the others."""
    with Path(words[0]).open("ab", buffering=0) as file:
        sleepers = [threading.Thread(target=_sleep, args=(file, cpu)) for cpu in os.sched_getaffinity(0)]
        for sleeper in sleepers:
            sleeper.start()
        for sleeper in sleepers:
            sleeper.join()


def _sleep(file: FileIO, cpu: int) -> None:
    os.sched_setaffinity(0, [cpu])  # of this thread, as is what follows
    go_first(2)  # before clients too: what keeps it waiting is the machine
    while True:
        began_s, worst_s = time.monotonic(), 0.0
        while (now_s := time.monotonic()) < began_s + ROW_S:
            time.sleep(NAP_S)
            worst_s = max(worst_s, time.monotonic() - now_s - NAP_S)
        file.write(_ROW.pack(began_s, worst_s, cpu))


def read_naps(path: Path) -> NDArray[Any]:
    """Rows: when, how much too long, and on which CPU."""
    data = path.read_bytes() if path.exists() else b""
    return np.frombuffer(data[: len(data) // _ROW.size * _ROW.size], "<f8").reshape(-1, 3)


if __name__ == "__main__":
    main(sys.argv[1:])
