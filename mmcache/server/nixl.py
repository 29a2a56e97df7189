"""Keeps the NIXL agent of a server: a process of its own that maps the arena, started again when it ends."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from typing import Final

from mmcache.errors import TransportError
from mmcache.pb import cache_pb2 as pb
from mmcache.store.arena import Arena
from mmcache.transport.nixl import DEVICES_VARIABLE
from mmcache.transport.tcp import close_fds

log = logging.getLogger("mmcache.server")
START_S: Final = 30.0
AGAIN_S: Final = 0.2  # after it ended; longer after it could not be started
AGAIN_SLOWLY_S: Final = 5.0
JOIN_WAIT_S: Final = 1.5  # a client that joins while it starts again waits so long for it
_PASSED_ON: Final = ("PYTHONPATH", "LD_LIBRARY_PATH", "HOME")  # and UCX's own settings


class NixlAgent:
    """The agent for this arena, with UCX on `devices`. Raises TransportError if it does not start."""

    def __init__(self, arena: Arena, devices: str) -> None:
        self._arena, self._devices = arena, devices
        if arena.why_not_shared:
            raise TransportError(f"--nixl needs memory that can be shared ({arena.why_not_shared}); leave it out")
        self._changed = threading.Condition()
        self._stopping = False
        self._offer: pb.NixlOffer | None = None
        self._process: subprocess.Popen[bytes]
        self._start()
        self._thread = threading.Thread(target=self._watch, name="mmcache-nixl", daemon=True)
        self._thread.start()

    def offer(self) -> pb.NixlOffer:
        """What a client needs to read the arena, or why it gets nothing."""
        with self._changed:
            if self._offer is not None and not _runs(self._process):  # the thread that watches it is about to know
                self._offer = None
            self._changed.wait_for(lambda: self._offer is not None or self._stopping, JOIN_WAIT_S)
            return self._offer or pb.NixlOffer(why="the server's NIXL agent does not run now")

    def stop(self) -> None:
        """End the process, and offer nothing from now on."""
        with self._changed:
            self._stopping, self._offer = True, None
            self._process.kill()
            self._changed.notify_all()
        self._thread.join()

    def _start(self) -> None:
        try:
            ours, report = os.pipe()
        except OSError as error:
            raise TransportError(f"the NIXL agent cannot be started: {error}") from error
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "mmcache.transport.nixl_agent"]
                + [str(number) for number in (self._arena.fd, self._arena.nbytes, report)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(self._arena.fd, report),
                env=self._environment(),
            )
        except (OSError, subprocess.SubprocessError) as error:
            close_fds([ours])
            raise TransportError(f"the NIXL agent cannot be started: {error}") from error
        finally:
            close_fds([report])
        try:
            offer = self._hear(ours, process)
        except BaseException:
            process.kill()
            _bury(process)
            raise
        with self._changed:
            self._process, self._offer = process, offer
            if self._stopping:
                self._offer = None
                process.kill()
            self._changed.notify_all()

    def _environment(self) -> dict[str, str]:
        passed = {name: value for name, value in os.environ.items() if name.startswith("UCX_") or name in _PASSED_ON}
        return {"HOME": "/", **passed, DEVICES_VARIABLE: self._devices}

    def _hear(self, report: int, process: subprocess.Popen[bytes]) -> pb.NixlOffer:
        timer = threading.Timer(START_S, process.kill)
        timer.start()
        try:
            with os.fdopen(report, "rb") as pipe:
                data = pipe.read()
        finally:
            timer.cancel()
        if not data:
            trouble = f"the NIXL agent ended, or said nothing for {START_S:g} s"
            raise TransportError(f"--nixl {self._devices}: {trouble}; are there such devices?")
        said = json.loads(data)
        if "error" in said:
            raise TransportError(f"--nixl {self._devices}: {said['error']}")
        metadata = bytes.fromhex(said["metadata"])
        return pb.NixlOffer(metadata=metadata, base=said["base"], nbytes=self._arena.nbytes)

    def _watch(self) -> None:
        """Start it again whenever it ends."""
        while True:
            code = _bury(self._process)
            with self._changed:
                self._offer = None
                if self._stopping:
                    return
            log.warning("the NIXL agent ended with code %s; it is started again", code)
            pause_s = AGAIN_S
            while not self._sleep(pause_s):
                try:
                    self._start()
                    break
                except Exception as error:  # whatever it is, it may be over later
                    log.warning("%s; until it starts, clients read by TCP", error)
                    pause_s = AGAIN_SLOWLY_S

    def _sleep(self, pause_s: float) -> bool:
        """True as soon as it is to stop."""
        until = time.monotonic() + pause_s
        with self._changed:
            return self._changed.wait_for(lambda: self._stopping, max(0.0, until - time.monotonic()))


def _runs(process: subprocess.Popen[bytes]) -> bool:
    """Whether it has not ended, asked beside a thread that waits for that."""
    try:
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    except ChildProcessError:
        return False


def _bury(process: subprocess.Popen[bytes]) -> int:
    code = process.wait()
    with contextlib.suppress(OSError):
        if process.stdin is not None:
            process.stdin.close()
    return code
