"""Records what a client and a server of this release say to each other over TCP, for the next release to answer.

Run it with the release to keep: `python scripts/golden_conversations.py > tests/golden/conversations_vN.json`.
A release talks to the one before it; tests/golden/test_conversations.py plays these to its server and to its client.
"""

from __future__ import annotations

import json
import socket
import sys
import threading

import numpy as np

import mmcache
from mmcache._version import __version__
from mmcache.config import ServerConfig
from mmcache.server.serve import Server
from mmcache.transport.base import PROTOCOL

CHUNK_NBYTES = 1 << 16


class Recorder:
    """Sits between one client connection and the server, and keeps whose bytes came in which order."""

    def __init__(self, server: tuple[str, int]) -> None:
        self.turns: list[tuple[str, bytearray]] = []
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, args=(server,), daemon=True).start()

    def _serve(self, server: tuple[str, int]) -> None:
        ours, _ = self._listener.accept()
        theirs = socket.create_connection(server)
        threading.Thread(target=self._pump, args=("server", theirs, ours), daemon=True).start()
        self._pump("client", ours, theirs)

    def _pump(self, who: str, source: socket.socket, target: socket.socket) -> None:
        while data := source.recv(CHUNK_NBYTES):
            with self._lock:
                if not self.turns or self.turns[-1][0] != who:
                    self.turns.append((who, bytearray()))
                self.turns[-1][1].extend(data)
            target.sendall(data)


def talk(url: str) -> list[object]:
    """The conversation that is recorded; returns what the client made of it."""
    namespace = mmcache.Namespace(kind="kv", model="golden/model", dtype="uint8", layout="L", block_size=4)
    keys = namespace.block_keys(range(16))
    values = [np.arange(100, dtype=np.uint8) + block for block in range(4)]
    heard: list[object] = []
    with mmcache.connect(url, deadline_s=10.0) as cache:
        heard.append([str(result.outcome) for result in cache.put(keys[:3], values[:3])])
        heard.append([str(result.outcome) for result in cache.put(keys[:1], values[:1])])
        heard.append(cache.match_prefix(keys))
        heard.append(cache.contains(keys))
        buffers = [np.zeros(100, np.uint8) for _ in keys]
        heard.append([str(result.outcome) for result in cache.get_into(keys, buffers)])
        heard.append([buffer.sum().item() for buffer in buffers])
        pinned = cache.pin_prefix(keys)
        heard += [pinned.count, pinned.release()]
        with cache.acquire(keys[:2]) as leased:
            heard.append([frame is not None for frame in leased.frames])
        heard.append(cache.inspect(keys[0].digest).found)
        heard.append(cache.delete(keys[2:]))
    return heard


def main() -> None:
    """Record, and print JSON."""
    server = Server(ServerConfig(listen="127.0.0.1:0", unix_path="", memory_nbytes=1 << 20))
    server.start()
    assert server.address is not None
    recorder = Recorder(server.address)
    heard = talk(f"mmcache://127.0.0.1:{recorder.port}?transport=tcp")
    server.stop()
    turns = [[who, bytes(data).hex()] for who, data in recorder.turns]
    json.dump({"release": __version__, "protocol": PROTOCOL, "heard": heard, "turns": turns}, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
