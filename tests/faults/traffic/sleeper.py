"""A process that only sleeps and wakes: how late it is woken is what this machine does to everybody.

python -m tests.faults.traffic.sleeper FILE       rows of two doubles, one each tenth of a second, until SIGTERM
"""

from __future__ import annotations

import struct
import sys
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tests.faults.traffic.records import go_first

NAP_S: Final = 0.005
ROW_S: Final = 0.1
_ROW: Final = struct.Struct("<dd")


def main(words: list[str]) -> None:
    """Sleep, and write down by how much the longest nap of each tenth of a second was too long."""
    go_first()
    with Path(words[0]).open("ab", buffering=0) as file:
        while True:
            began_s, worst_s = time.monotonic(), 0.0
            while (now_s := time.monotonic()) < began_s + ROW_S:
                time.sleep(NAP_S)
                worst_s = max(worst_s, time.monotonic() - now_s - NAP_S)
            file.write(_ROW.pack(began_s, worst_s))


def read_naps(path: Path) -> NDArray[Any]:
    """Rows: when, and how much too long."""
    data = path.read_bytes() if path.exists() else b""
    return np.frombuffer(data[: len(data) // _ROW.size * _ROW.size], "<f8").reshape(-1, 2)


if __name__ == "__main__":
    main(sys.argv[1:])
