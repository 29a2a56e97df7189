"""`mmcache serve --shards N`: a process for each shard, and this one, which starts again what dies and stops them all.

A shard that dies takes its entries with it and nothing else: its clients see misses until it is back at its address.
It is started again after a pause that grows while it keeps dying. A shard that hangs is not noticed here. With --hold
the process of a shard is its holder, which starts the server again itself, with its entries (holder.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from mmcache.config import ENV_PREFIX, ServerConfig
from mmcache.errors import MMCacheError
from mmcache.server.shard_plan import STEADY_S, environment_of, pause_s, where_it_is
from mmcache.server.stops import stop_asked

log = logging.getLogger("mmcache.supervisor")
TICK_S: Final = 0.1
KILL_AFTER_S: Final = 5.0  # beyond the drain
MAX_READY_NBYTES: Final = 64 << 10
PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
_libc = ctypes.CDLL(None)


def _end_with(supervisor: int) -> None:
    """In a new process: SIGTERM when the supervisor ends, however it does (man 2 PR_SET_PDEATHSIG); if it has, end."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != supervisor:
        os._exit(1)


@dataclass
class _Shard:
    number: int
    config: ServerConfig
    process: subprocess.Popen[bytes] | None = None
    said: bytes = b""
    ready: dict[str, Any] = field(default_factory=dict)  # its ready line; empty: not yet
    deaths: int = 0
    began_s: float = 0.0
    again_s: float = 0.0

    def start(self, words: Sequence[str]) -> None:
        others = {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mmcache", "serve", "--json", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            env=others | environment_of(self.config),
            process_group=0,  # Ctrl-C is for the supervisor, which then asks each
            preexec_fn=partial(_end_with, os.getpid()),
        )
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)
        self.said, self.ready, self.began_s = b"", {}, time.monotonic()

    def hear(self) -> bool:
        """Read as much of its ready line as is there; True once there is a new one."""
        assert self.process is not None
        assert self.process.stdout is not None
        self.said += self.process.stdout.read(MAX_READY_NBYTES) or b""
        *lines, self.said = self.said.split(b"\n")
        if lines:
            self.ready = json.loads(lines[-1])
            self.config = where_it_is(self.config, self.ready)
        return bool(lines)

    def ended(self) -> int | None:
        """The exit code, once, of a process that has ended; None while it runs, and while there is none."""
        if self.process is None or self.process.poll() is None:
            return None
        process, self.process = self.process, None
        assert process.stdout is not None
        process.stdout.close()
        return process.returncode


class Supervisor:
    """Runs a process for each of these settings. `words` go to `mmcache serve` as they are.

    The caller has blocked the stop signals. `stop` after `start`, however that ended.
    """

    def __init__(self, configs: Iterable[ServerConfig], words: Sequence[str] = ()) -> None:
        self._shards = [_Shard(number, config) for number, config in enumerate(configs)]
        self._words = words

    def start(self) -> list[dict[str, Any]] | None:
        """Start all; their ready lines once all accept, or None if a stop signal came first.

        Raises MMCacheError if one ends before that: what it said is on stderr.
        """
        for shard in self._shards:
            shard.start(self._words)
        while not all(shard.ready for shard in self._shards):
            for shard in self._shards:
                if not shard.ready:
                    shard.hear()
                if (code := shard.ended()) is not None:
                    raise MMCacheError(f"shard {shard.number} did not start (exit {code}); what it said stands above")
            if stop_asked(TICK_S):
                return None
        return [shard.ready for shard in self._shards]

    def watch(self) -> None:
        """Start again what dies, until a stop signal comes."""
        while not stop_asked(TICK_S):
            for shard in self._shards:
                self._look_after(shard, time.monotonic())

    def _look_after(self, shard: _Shard, now_s: float) -> None:
        if shard.process is None:
            if now_s >= shard.again_s:
                self._start_again(shard, now_s)
            return
        if shard.hear():
            entries = shard.ready.get("restored_entries", 0)
            what = f"with {entries} entries" if entries else "empty"
            log.warning("shard %d is back at %s, %s", shard.number, shard.ready["url"], what)
        code = shard.ended()
        if code is not None:
            self._note_death(shard, now_s, f"died (exit {code})")

    def _start_again(self, shard: _Shard, now_s: float) -> None:
        try:
            shard.start(self._words)
        except OSError as error:  # no memory or no process to be had: perhaps later
            self._note_death(shard, now_s, f"could not be started ({error})")

    def _note_death(self, shard: _Shard, now_s: float, how: str) -> None:
        shard.deaths = 1 if now_s - shard.began_s >= STEADY_S and shard.ready else shard.deaths + 1
        wait_s = pause_s(shard.deaths)
        shard.ready, shard.again_s = {}, now_s + wait_s
        log.error("shard %d %s; it is started again in %g s", shard.number, how, wait_s)

    def stop(self) -> list[str]:
        """Have all drain at once, and wait; kill what does not end. The shards, in words, that did not end well."""
        running = [(shard, shard.process) for shard in self._shards if shard.process is not None]
        for _, process in running:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        bad = []
        deadline_s = time.monotonic() + KILL_AFTER_S + max(shard.config.drain_s for shard in self._shards)
        for shard, process in running:
            try:
                process.wait(max(0.0, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.returncode:
                bad.append(f"shard {shard.number} (exit {process.returncode})")
            assert process.stdout is not None
            process.stdout.close()
        return bad
