"""A bad network between clients and a shard: a process that passes bytes on, late, not at all, or not all of them.

    python -m tests.faults.fault.relay LISTEN_PORT TARGET_PORT      listening at 0: at any free port

It says "ready" and its port, then obeys lines on stdin, a rule each, and says when it has: `free`, `delay SECONDS`,
`stall`, `cut` (every connection ends now, and each new one after some bytes), `lose` (some bytes in the middle are not
passed on, and the connection ends). It ends with its stdin. Loopback has no delay or loss of its own to set where
`tc netem` is missing.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import subprocess
import sys
import time
from typing import Final

PIECE_NBYTES: Final = 64 << 10
QUEUED: Final = 32  # pieces on their way in one direction
MOST_NBYTES: Final = 2 << 20  # that a connection lives for, when connections are cut
RULES: Final = ("free", "delay", "stall", "cut", "lose")
_RESET: Final = struct.pack("ii", 1, 0)  # SO_LINGER


class Broken(Exception):
    """This connection is to end now."""


class Network:
    """What holds for every connection. `changed` is set anew with each rule."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self.rule, self.delay_s = "free", 0.0
        self.changed = asyncio.Event()
        self._open: set[asyncio.StreamWriter] = set()

    def obey(self, line: str) -> None:
        """Take a rule."""
        rule, _, delay_s = line.strip().partition(" ")
        if rule not in RULES:
            raise ValueError(f"no rule {rule!r}; there are {', '.join(RULES)}")
        self.rule, self.delay_s = rule, float(delay_s or 0)
        self.changed.set()
        self.changed = asyncio.Event()
        if rule == "cut":
            for writer in list(self._open):
                reset(writer)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, both ways, to its end."""
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        except OSError:
            reset(writer)
            return
        pair = {writer, far_writer}
        self._open |= pair
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pass(reader, far_writer))
                group.create_task(self._pass(far_reader, writer))
        except* (OSError, Broken):
            for one in pair:
                reset(one)
        finally:
            self._open -= pair
            for one in pair:
                one.close()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One direction, to its end: read as fast as the queue allows, and written when each piece is due."""
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(QUEUED)

        async def send() -> None:
            left = random.randrange(1, MOST_NBYTES)
            while True:
                due_s, data = await queue.get()
                await asyncio.sleep(max(0.0, due_s - time.monotonic()))
                while self.rule == "stall":
                    await self.changed.wait()
                if not data:
                    writer.write_eof()
                    return
                left -= len(data)
                if left <= 0 and self.rule in ("cut", "lose"):
                    writer.write(spoilt(data, self.rule))
                    raise Broken
                writer.write(data)
                await writer.drain()

        async def receive() -> None:
            while True:
                data = await reader.read(PIECE_NBYTES)
                await queue.put((time.monotonic() + self.delay_s, data))
                if not data:
                    return

        async with asyncio.TaskGroup() as group:
            group.create_task(send())
            group.create_task(receive())


def spoilt(data: bytes, rule: str) -> bytes:
    """Of the last bytes of a connection, those that arrive: some are missing at the end, or in the middle."""
    first = random.randrange(len(data))
    return data[:first] + (data[first + random.randrange(1, 999) :] if rule == "lose" else b"")


def reset(writer: asyncio.StreamWriter) -> None:
    """End a connection as a host that is gone does."""
    sock = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.close()


async def main(words: list[str]) -> None:
    """See the top of this file."""
    network = Network(int(words[1]))
    server = await asyncio.start_server(network.serve, "127.0.0.1", int(words[0]))
    lines = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    print("ready", server.sockets[0].getsockname()[1], flush=True)
    while line := await lines.readline():
        network.obey(line.decode())
        print(line.decode().strip(), flush=True)
    server.close()


class Relay:
    """Such a process, from outside. Use as a context manager."""

    def __init__(self, port: int, target_port: int) -> None:
        self.port, self._target_port = port, target_port

    def __enter__(self) -> Relay:
        """Start it; `port` is then the one it has."""
        words = [sys.executable, "-m", "tests.faults.fault.relay", str(self.port), str(self._target_port)]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        ready, _, port = self._said().partition(" ")
        assert ready == "ready", f"the relay said {ready!r}"
        self.port = int(port)
        return self

    def obey(self, rule: str) -> None:
        """Hold to this rule, from when this returns."""
        assert self._process.stdin is not None
        self._process.stdin.write(rule + "\n")
        self._process.stdin.flush()
        said = self._said()
        assert said == rule, f"the relay said {said!r}, not {rule!r}"

    def _said(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
