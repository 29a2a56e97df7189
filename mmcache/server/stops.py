"""SIGTERM and SIGINT as something to wait for, in the main thread.

They are blocked, so that all threads that start later inherit it, and one waits. Threads of libraries may have started
before (numpy's BLAS has some): a signal that one of them takes, because nobody waits at that moment, would end the
process. So there is a handler, too, and whoever waits looks for what it noted.
"""

from __future__ import annotations

import signal
import time
from math import inf
from types import FrameType
from typing import Final

STOP_SIGNALS: Final = frozenset({signal.SIGTERM, signal.SIGINT})
TICK_S: Final = 0.25
_noted: list[int] = []


def _note(number: int, _: FrameType | None) -> None:
    _noted.append(number)


def block_signals() -> None:
    """Before any thread of ours starts. Processes that this one starts have them blocked, too, and no handler."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    for number in STOP_SIGNALS:
        signal.signal(number, _note)


def stop_asked(within_s: float = inf) -> bool:
    """Wait for a stop signal, so long at most; True if one came. Each is told once."""
    until_s = time.monotonic() + within_s
    while not _noted:
        left_s = until_s - time.monotonic()
        told = signal.sigtimedwait(STOP_SIGNALS, max(0.0, min(TICK_S, left_s)))
        # Stopped and continued for longer than the rest of its time, it answers with what lay on its stack.
        if told is not None and told.si_signo in STOP_SIGNALS:
            return True
        if left_s <= 0 and not _noted:
            return False
    _noted.pop(0)
    return True
