"""What an adapter is: a client in a worker process, and what starts the servers it needs.

Clients live in environments of their own, where only numpy and the peer's library are there: an adapter imports nothing
else at its top, and the library when the client is made.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.peers.install import PeerError

KiB, MiB = 1 << 10, 1 << 20
READY_S = 30.0
STOP_S = 8.0

Bytes = npt.NDArray[np.uint8]


class Client:
    """One client of one peer. `options` is what the peer's `serve` returned.

    `prepare` turns names and buffers into whatever a call takes, outside the timed part; `put` and `get` are given what
    it returned. They end when the values are stored, and when the bytes are in the buffers, and raise if a value was
    not stored or did not come back. All buffers are parts of `source` and `target`.
    """

    VIEWS = False  # whether values can be seen where the peer keeps them

    def __init__(self, options: Mapping[str, Any], source: Bytes, target: Bytes) -> None:
        self.options, self.source, self.target = options, source, target

    def prepare(self, names: Sequence[str], buffers: Sequence[Bytes]) -> Any:
        """What `put` and `get` are to be given for these values."""
        return list(names), list(buffers)

    def put(self, batch: Any) -> None:
        """Store the values, in one call if the peer has one for that."""
        raise NotImplementedError

    def get(self, batch: Any) -> None:
        """Fetch the values into the buffers, in one call if the peer has one for that."""
        raise NotImplementedError

    def view(self, batch: Any) -> list[Any]:
        """The values where the peer keeps them, as buffers, in one call; with VIEWS only."""
        raise NotImplementedError

    def leave(self, batch: Any) -> None:
        """What `view` showed is not looked at any more."""

    def settle(self, batch: Any) -> None:
        """Wait for what `put` has only begun. It is part of the time of a round, not of a call."""

    def handles(self, names: Sequence[str]) -> list[str]:
        """Where the peer has no names of its own choice: what a reader in another process needs; else nothing."""
        return []

    def learn(self, names: Sequence[str], handles: Sequence[str]) -> None:
        """Take the writer's handles."""

    def delete(self, names: Sequence[str]) -> None:
        """Forget the values."""

    def close(self) -> None:
        """Leave the peer."""


def reused(name: str) -> str:
    """The same name every round, for a peer that cannot delete: a put replaces the value of the round before.

    What is read must be the new value all the same, as every value differs.
    """
    case, _, rest = name.partition("/")
    return f"{case}/{rest.partition('/')[2]}"


def free_port() -> int:
    """A loopback port that nobody has, for a server that cannot choose one."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def spawn(
    stack: ExitStack,
    run: Path,
    command: Sequence[object],
    ready: Callable[[], bool],
    environment: Mapping[str, str] | None = None,
) -> None:
    """Start a server in the folder `run`, wait until `ready`, and have `stack` stop it.

    Raises PeerError with its last words if it ends or does not become ready.
    """
    words = [str(word) for word in command]
    name = Path(words[0]).name
    log = run / f"{name}.log"
    with open(log, "wb") as out:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            cwd=run,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
    stack.callback(_stop, process)
    ends = time.monotonic() + READY_S
    while not ready():
        if process.poll() is not None or time.monotonic() > ends:
            said = log.read_text(errors="replace").strip().splitlines()
            raise PeerError(f"{name} did not become ready: {said[-1] if said else 'it said nothing'}")
        time.sleep(0.05)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask it to end; kill its whole session, which `spawn` made, if it does not."""
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def listens(port: int) -> Callable[[], bool]:
    """A question for `spawn`: does somebody accept on this port?"""

    def answer() -> bool:
        with socket.socket() as probe:
            probe.settimeout(0.5)
            return probe.connect_ex(("127.0.0.1", port)) == 0

    return answer
