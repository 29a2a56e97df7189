"""A peer's bad network, in this process: what goes through it can be slowed, cut, half closed, or led elsewhere.

It passes bytes on and understands none of them, so TLS and gRPC go through it too; file descriptors beside bytes, as
shared memory needs them, do not.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from types import TracebackType
from typing import Final, NamedTuple, Self

_AT_ONCE: Final = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends a reset


class Limit(NamedTuple):
    """What becomes of the bytes that come back: after `nbytes` of them (None: never) the sender's side is closed, or,
    with `reset`, the connection; they come in pieces with pauses between."""

    nbytes: int | None = None
    reset: bool = False
    piece_nbytes: int = 64 << 10
    pause_s: float = 0.0


FREE: Final = Limit()


class Between:
    """Listens where `address` says, and passes on to `target`: both HOST:PORT, or both paths of unix sockets.

    `cuts` counts what `limit` has ended. Use as a context manager.
    """

    def __init__(self, target: str, path: str = "") -> None:
        self.target, self.cuts = target, 0
        self._limit, self._passed = FREE, 0
        self._lock, self._closing = threading.Lock(), False
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        if path:
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(path)
            self._listener.listen()
            self.address = path
        else:
            self._listener = socket.create_server(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._start(self._accept)

    def limit(self, limit: Limit) -> None:
        """For what comes back from now on, on every connection."""
        with self._lock:
            self._limit, self._passed = limit, 0

    def lead_to(self, target: str) -> None:
        """Pass new connections on to another place, and end those there are."""
        self.target = target
        self.drop()

    def drop(self) -> None:
        """End every connection."""
        with self._lock:
            ended = list(self._open)
        for sock in ended:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _start(self, run: object, *words: socket.socket | bool) -> None:
        thread = threading.Thread(target=run, args=words, daemon=True)  # type: ignore[arg-type]
        self._threads = [one for one in self._threads if one.is_alive()] + [thread]
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._closing:
                client.close()
                return
            try:
                server = self._connect()
            except OSError:
                client.close()
                continue
            with self._lock:
                self._open |= {client, server}
            self._start(self._pass, client, server)

    def _connect(self) -> socket.socket:
        if self.target.startswith("/"):
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(self.target)
            return sock
        host, _, port = self.target.rpartition(":")
        return socket.create_connection((host, int(port)))

    def _pass(self, client: socket.socket, server: socket.socket) -> None:
        """Both ways, to the end of both."""
        there = threading.Thread(target=self._pump, args=(client, server, False), daemon=True)
        there.start()
        self._pump(server, client, True)
        there.join()
        with self._lock:
            self._open -= {client, server}
        client.close()
        server.close()

    def _pump(self, source: socket.socket, sink: socket.socket, back: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(self._limit.piece_nbytes if back else 64 << 10):
                allowed = self._allow(len(data)) if back else len(data)
                sink.sendall(data[:allowed])
                if allowed < len(data):
                    if self._limit.reset:
                        sink.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
                        sink.shutdown(socket.SHUT_RDWR)
                    break
                if back and self._limit.pause_s:
                    time.sleep(self._limit.pause_s)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def _allow(self, nbytes: int) -> int:
        with self._lock:
            limit = self._limit.nbytes
            if limit is None:
                return nbytes
            allowed = min(nbytes, max(0, limit - self._passed))
            self._passed += allowed
            self.cuts += allowed < nbytes
            return allowed

    def close(self) -> None:
        """Listen no more, and end what is there."""
        self._closing = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes who waits to accept
        self._listener.close()
        if self.address.startswith("/"):
            os.unlink(self.address)
        self.drop()
        for thread in self._threads:
            thread.join(5)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
