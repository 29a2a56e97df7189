"""What the integration tests share beside mmcache.testing: a client of raw messages, child processes, the CLI."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import xxhash
from google.protobuf.message import Message

from mmcache.frame import FrameMeta, Kind, frame_segments, pack_header
from mmcache.keyset import Keys
from mmcache.pb import cache_pb2 as pb
from mmcache.tensors import named_tensors, specs_of
from mmcache.testing.ports import keeper
from mmcache.testing.process import ServerProcess
from mmcache.testing.process import suspend as suspend
from mmcache.testing.values import NAMESPACE as NAMESPACE
from mmcache.testing.values import PATIENCE_S as PATIENCE_S
from mmcache.testing.values import Bytes as Bytes
from mmcache.testing.values import blanks as blanks
from mmcache.testing.values import eventually as eventually
from mmcache.testing.values import keys_of as keys_of
from mmcache.testing.values import value_of as value_of
from mmcache.testing.values import values_of as values_of
from mmcache.transport.base import PRELUDE_NBYTES, Op, pack_prelude, parse_prelude

ROOT = Path(__file__).resolve().parents[2]
MiB = 1 << 20


def segments_of(keys: Keys, value: Any, position: int = 0, alignment: int = 64) -> list[bytes | memoryview]:
    """The frame that stores `value` under one of these keys, as the buffers a client sends."""
    tensors = named_tensors(value)
    payloads = [tensor.data.data for tensor in tensors.values()]
    meta = FrameMeta(
        kind=Kind.KV,
        key=keys.digests[position],
        namespace=keys.namespaces[position],
        parent=keys.parents[position],
        home=keys.homes[position],
        chain_index=keys.indices[position],
        created_ms=1_700_000_000_000,
        expires_ms=0,
        writer="tests",
    )
    header = pack_header(meta, specs_of(tensors), [xxhash.xxh3_128_digest(payload) for payload in payloads], alignment)
    return frame_segments(header, payloads, alignment)


def frame_bytes(keys: Keys, value: Any, position: int = 0) -> bytes:
    """The same as one string of bytes."""
    return b"".join(bytes(segment) for segment in segments_of(keys, value, position))


def reserve_request(keys: Keys, sizes: Sequence[int], *, ring: bool = False, kind: Kind = Kind.KV) -> pb.ReserveRequest:
    """What asks to store frames of these sizes under these keys."""
    return pb.ReserveRequest(
        keys=b"".join(keys.digests),
        parents=b"".join(keys.parents),
        frame_nbytes=sizes,
        kinds=bytes([kind] * len(keys)),
        ring=ring,
    )


class Raw:
    """A connection that sends exactly the bytes a test wants. Use as a context manager."""

    def __init__(self, target: ServerProcess | str) -> None:
        """To a server's port, or to the unix socket at a path."""
        if isinstance(target, str):
            self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.sock.settimeout(PATIENCE_S)
            self.sock.connect(target)
        else:
            host, _, port = target.url.removeprefix("mmcache://").rpartition(":")
            self.sock = socket.create_connection((host, int(port)), PATIENCE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.sock.close()

    def send(self, data: bytes) -> None:
        """These bytes, as they are."""
        self.sock.sendall(data)

    def ask(self, op: Op, message: Message, payload_nbytes: int = 0) -> None:
        """One well-formed request; an announced payload is the caller's to send."""
        body = message.SerializeToString()
        self.send(pack_prelude(op, 7, len(body), payload_nbytes) + body)

    def recv(self, nbytes: int) -> bytes:
        """Exactly this many bytes."""
        data = b""
        while len(data) < nbytes:
            piece = self.sock.recv(nbytes - len(data))
            assert piece, f"the server closed the connection after {data!r}"
            data += piece
        return data

    def answer(self) -> tuple[Op, bytes]:
        """The next message's operation and body."""
        prelude = parse_prelude(self.recv(PRELUDE_NBYTES), 1 << 24)
        return prelude.op, self.recv(prelude.body_nbytes)

    def refusal(self) -> pb.ErrorReply:
        """The next message, which must be an ERROR."""
        op, body = self.answer()
        assert op == Op.ERROR
        return pb.ErrorReply.FromString(body)

    def join(self) -> pb.JoinReply:
        """Join without shared memory."""
        self.ask(Op.JOIN, pb.JoinRequest(protocol=1, client="raw"))
        op, body = self.answer()
        assert op == Op.JOIN
        return pb.JoinReply.FromString(body)

    def reserve(self, keys: Keys, sizes: Sequence[int], *, ring: bool = False) -> bytes:
        """Ask to store frames of these sizes; one PutStatus byte a key."""
        self.ask(Op.RESERVE, reserve_request(keys, sizes, ring=ring))
        op, body = self.answer()
        assert op == Op.RESERVE
        return bytes(pb.ReserveReply.FromString(body).status)

    def put_done(self) -> bytes:
        """The server's last word on a put; one PutStatus byte a frame."""
        op, body = self.answer()
        assert op == Op.PUT_DONE
        return bytes(pb.PutReply.FromString(body).status)

    def closed_by_peer(self) -> bool:
        """Wait until the server hangs up; False if it says something instead."""
        try:
            return self.sock.recv(1) == b""
        except ConnectionError:
            return True


class Child:
    """A client process of its own, running one function of child.py; they talk in lines of JSON."""

    def __init__(self, *words: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.child", *words],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def hear(self) -> dict[str, Any]:
        """The child's next line."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the child ended with {self.process.wait()} and said nothing"
        said: dict[str, Any] = json.loads(line)
        return said

    def tell(self) -> None:
        """Let the child go on."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def wait_stopped(self) -> None:
        """Wait until the child is stopped by a signal."""
        _, status = os.waitpid(self.process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), f"the child ended with status {status} instead of stopping"

    def signal(self, number: int) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def end(self) -> int:
        """Wait for its end; the exit status."""
        return self.process.wait(PATIENCE_S)


@contextlib.contextmanager
def child(*words: str) -> Iterator[Child]:
    """A child that is gone when the block ends."""
    running = Child(*words)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.communicate()


@contextlib.contextmanager
def reserved_address() -> Iterator[str]:
    """An address for servers that end and come back at it: nobody else is given its port meanwhile."""
    with keeper() as kept:
        yield "{}:{}".format(*kept.getsockname())


def in_time(took_s: Callable[[], float], bound_s: float, tries: int = 3) -> None:
    """What `took_s` measures is within the bound at one of several tries: a machine that stands still for seconds
    spoils one, a fault all."""
    taken: list[float] = []
    while not taken or taken[-1] >= bound_s:
        assert len(taken) < tries, f"took {taken} s, the bound is {bound_s} s"
        taken.append(took_s())


class Ended(NamedTuple):
    """How a command ended, and what it said."""

    returncode: int
    stdout: str
    stderr: str


def run_cli(*words: str, environment: dict[str, str] | None = None) -> Ended:
    """`mmcache WORDS...` run to its end, without the caller's own settings, and 200 columns wide.

    In this process, which spares a second for a new interpreter and says the same. `serve`, too, where it ends by
    itself: the signals it blocks and the logging it sets up are put back.
    """
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MMCACHE_")}
    settings = clean | {"COLUMNS": "200"} | (environment or {})
    from mmcache.cli import main

    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    before = sys.argv, dict(os.environ)
    root = logging.getLogger()
    handlers, level, mask = root.handlers[:], root.level, signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        sys.argv = ["mmcache", *words]
        os.environ.clear()
        os.environ.update(settings)
        try:
            main()
        except SystemExit as ended_by:
            code = ended_by.code
        finally:
            sys.argv = before[0]
            os.environ.clear()
            os.environ.update(before[1])
            root.handlers[:] = handlers
            root.setLevel(level)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return Ended(code if isinstance(code, int) else int(bool(code)), out.getvalue(), err.getvalue())
