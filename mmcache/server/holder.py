"""The holder: a process that owns a server's memory and starts the server again when it ends. docs/warm-restart.md.

Only who mapped the arena before it was sealed can write it; nobody can map it for writing afterwards, and exec drops
maps. So the holder maps it, seals it, and forks each server, which inherits the map. It is started as a script
(`mmcache serve --hold` becomes it) and knows nothing of mmcache but where it lies: each server it forks imports the
code that is installed then, which may be another release. It is small, as it cannot be changed while it runs.

SIGTERM and SIGINT end the server and then the holder; SIGHUP has the server end and another one take its place. When
the holder ends, however it does, so does the server. The memory is gone with both.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib
import mmap
import os
import signal
import sys
import time
from pathlib import Path

F_SEAL_FUTURE_WRITE = 0x0010  # linux/fcntl.h
PR_SET_PDEATHSIG = 1  # linux/prctl.h
PAGE_NBYTES = 4096  # of the kept memory: the holder's own
STOPS = {signal.SIGTERM, signal.SIGINT}
SIGNALS = STOPS | {signal.SIGHUP, signal.SIGCHLD}
STEADY_S = 5.0  # a server that ran so long has recovered
LONGEST_PAUSE_S = 30.0
MOST_FAILURES = 2  # starts that ended while what was kept was on trial, before one begins anew


def pause_s(deaths: int) -> float:
    """Seconds before a server is started again that has died `deaths` times, 1 or more, without running STEADY_S."""
    return 0.0 if deaths < 2 else min(LONGEST_PAUSE_S, 0.5 * 2.0 ** min(deaths - 2, 16))


def how(status: int) -> str:
    """The end of a process in words, from its wait status."""
    code = os.waitstatus_to_exitcode(status)
    return f"was killed by signal {-code}" if code < 0 else f"ended with exit {code}"


def mapped(fd: int, nbytes: int) -> memoryview:
    """A file, mapped for as long as the process lives. Unlike `mmap.mmap`, this keeps no descriptor of it."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    address = libc.mmap(None, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "mmap")
    return memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")


class Holder:
    """The memory, and one server after another."""

    def __init__(self, arena_fd: int, kept_nbytes: int, words: list[str]) -> None:
        seals = F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL
        self.arena_fd, self.words = arena_fd, words
        self.arena = mmap.mmap(arena_fd, os.fstat(arena_fd).st_size)
        fcntl.fcntl(arena_fd, fcntl.F_ADD_SEALS, seals)
        kept_fd = os.memfd_create("mmcache-index", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(kept_fd, PAGE_NBYTES + kept_nbytes)
        self.kept = mapped(kept_fd, PAGE_NBYTES + kept_nbytes)
        fcntl.fcntl(kept_fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | seals)
        os.close(kept_fd)  # the last one: nobody can open it under /proc
        self.ready_lives = self.kept[:8].cast("Q")  # a server that is ready adds one
        self.on_trial = self.kept[8:16].cast(
            "Q"
        )  # 1 while a server starts on what was kept: if it ends, that may be why
        self.pid = self.lives = self.failures = self.deaths = 0
        self.ended = ""  # how the last one did

    def start(self) -> int:
        """Fork a server: 0 in it, else its process id."""
        self.ready_before, self.began_s = self.ready_lives[0], time.monotonic()
        self.on_trial[0] = 0
        holder = os.getpid()
        self.pid = os.fork()
        if not self.pid:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != holder:
                os._exit(1)
        self.lives += 1
        return self.pid

    def run(self) -> int:
        """The exit code of the holder; in a server just forked, -1."""
        while self.start():
            status, asked = self.wait()
            was_ready = self.ready_lives[0] > self.ready_before
            if asked in STOPS or not self.ready_lives[0]:
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code
            self.ended = "was asked to make room for this one" if asked else how(status)
            steady = was_ready and (asked or time.monotonic() - self.began_s >= STEADY_S)
            self.deaths = 0 if asked and was_ready else 1 if steady else self.deaths + 1
            self.failures = 0 if was_ready else self.failures + self.on_trial[0]
            told = signal.sigtimedwait(STOPS, pause_s(self.deaths)) if self.deaths else None
            if told is not None and told.si_signo in STOPS:  # stopped and continued meanwhile, it answers with anything
                return 0
        return -1

    def wait(self) -> tuple[int, int]:
        """Until the server has ended: its wait status, and the signal that asked for it, or 0."""
        asked = 0
        while True:
            with contextlib.suppress(ChildProcessError):
                while (ended := os.waitpid(-1, os.WNOHANG))[0]:  # as a container's first process also strangers
                    if ended[0] == self.pid:
                        return ended[1], asked
            number = signal.sigwait(SIGNALS)
            if number != signal.SIGCHLD:
                asked = number if asked not in STOPS else asked
                os.kill(self.pid, signal.SIGTERM)

    def serve(self) -> int:
        """In the forked process: be a server, of the code that is installed now."""
        signal.pthread_sigmask(signal.SIG_SETMASK, STOPS)
        importlib.invalidate_caches()
        given = {
            "arena_fd": self.arena_fd,
            "arena": self.arena,
            "kept": self.kept[PAGE_NBYTES:],
            "ready_lives": self.ready_lives,
            "on_trial": self.on_trial,
            "ended": self.ended,
            "give_up": self.failures >= MOST_FAILURES,
            "words": self.words,
        }
        code: int = importlib.import_module("mmcache.cli_serve").serve_held(given)
        return code


def main(words: list[str]) -> int:
    """`holder.py ARENA_FD KEPT_NBYTES [WORD...]`: the words are for `cli_serve.serve_held`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # whoever started this may have ignored it: then no end is told
    root = str(Path(__file__).parents[2])
    if root not in sys.path:
        sys.path.insert(0, root)
    os.set_inheritable(int(words[0]), False)
    holder = Holder(int(words[0]), int(words[1]), words[2:])
    code = holder.run()
    return holder.serve() if code < 0 else code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
