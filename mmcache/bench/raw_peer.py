"""The floor for TCP: one stream over blocking sockets, no keys, no frames, no checks. What a cache over TCP is beside.

    python -m mmcache.bench.raw_peer NBYTES

listens on a free loopback port, prints it, and sends NBYTES random bytes for every REQUEST_NBYTES it receives.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

REQUEST_NBYTES = 64
PIECE_NBYTES = 1 << 20
WAIT_S = 30.0


class RawPeer:
    """A peer in a process of its own that sends as many bytes as `target` takes. Use as a context manager."""

    def __init__(self, target: npt.NDArray[np.uint8]) -> None:
        self._target = target
        words = [sys.executable, "-m", "mmcache.bench.raw_peer", str(target.nbytes)]
        self._process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self._sock = socket.create_connection(("127.0.0.1", int(self._process.stdout.readline())), WAIT_S)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def gbps(self) -> float:
        """GB/s of one request and its answer, received straight into the target."""
        started_ns = time.perf_counter_ns()
        self._sock.sendall(bytes(REQUEST_NBYTES))
        view = self._target.data
        while len(view):
            got = self._sock.recv_into(view[:PIECE_NBYTES], 0, socket.MSG_WAITALL)
            if not got:
                raise ConnectionError("the raw peer ended")
            view = view[got:]
        return self._target.nbytes / (time.perf_counter_ns() - started_ns)

    def __enter__(self) -> RawPeer:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._sock.close()  # on which it ends
        self._process.communicate(timeout=WAIT_S)


def serve(nbytes: int) -> None:
    """Serve one peer until it leaves."""
    data = [memoryview(os.urandom(min(PIECE_NBYTES, nbytes - at))) for at in range(0, nbytes, PIECE_NBYTES)]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        peer: Any
        peer, _ = listener.accept()
    with peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while len(peer.recv(REQUEST_NBYTES, socket.MSG_WAITALL)) == REQUEST_NBYTES:
            for view in data:
                peer.sendall(view)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
