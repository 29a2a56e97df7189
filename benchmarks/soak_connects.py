"""Thousands of connections that end in every way there is; for the soak, which looks at what they leave behind."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Callable
from typing import Final

import mmcache
from benchmarks.soak_client import NAMESPACE, value_of
from mmcache.keys import opaque_key
from mmcache.pb import cache_pb2 as pb
from mmcache.testing.process import ServerProcess
from mmcache.transport.base import PRELUDE_NBYTES, PROTOCOL, Op, pack_prelude, parse_prelude

PATIENCE_S: Final = 7.0
WAYS: Final = (
    "a client",
    "joined",
    "half a prelude",
    "half a Join",
    "half a body",
    "half a payload",
    "nothing",
    "reset",
)


def message(op: Op, body: bytes) -> bytes:
    """One well-formed request."""
    return pack_prelude(op, 1, len(body)) + body


JOIN: Final = message(Op.JOIN, pb.JoinRequest(protocol=PROTOCOL, client="soak").SerializeToString())


def _reserve(number: int) -> bytes:
    key = opaque_key(NAMESPACE, f"connect/{number}".encode()).digest
    request = pb.ReserveRequest(keys=key, parents=bytes(32), frame_nbytes=[100_000], kinds=b"\1")
    return message(Op.RESERVE, request.SerializeToString())


def _answer(sock: socket.socket) -> None:
    head = sock.recv(PRELUDE_NBYTES, socket.MSG_WAITALL)
    body_nbytes = parse_prelude(head, 1 << 20).body_nbytes
    if body_nbytes:
        sock.recv(body_nbytes, socket.MSG_WAITALL)


def _dial(server: ServerProcess, unix: bool) -> socket.socket:
    if unix:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(PATIENCE_S)
        sock.connect(server.unix_path)
        return sock
    host, _, port = server.url.removeprefix("mmcache://").rpartition(":")
    return socket.create_connection((host, int(port)), PATIENCE_S)


def _raw(server: ServerProcess, number: int, way: str) -> None:
    with _dial(server, unix=number % 2 == 0) as sock:
        if way == "half a prelude":
            sock.sendall(JOIN[:11])
        elif way == "half a Join":
            sock.sendall(JOIN[:-2])
        elif way != "nothing":
            sock.sendall(JOIN)
            _answer(sock)
            if way == "half a body":
                sock.sendall(_reserve(number)[:-20])
            elif way == "half a payload":
                sock.sendall(_reserve(number))
                _answer(sock)
                sock.sendall(bytes(50_000))
            elif way == "reset":
                with contextlib.suppress(OSError):  # a unix socket knows no lingering
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def connect_and_leave(server: ServerProcess, count: int, report: Callable[[int], None]) -> None:
    """`count` connections, one after the other, over TCP and unix sockets in turn."""
    (key,) = keys = [opaque_key(NAMESPACE, b"connects")]
    value = value_of(key.digest, 5000)
    for number in range(count):
        way = WAYS[number // 2 % len(WAYS)]
        if way == "a client":
            transport = "auto" if number % 2 else "tcp"
            with mmcache.connect(f"{server.url}?transport={transport}", deadline_s=PATIENCE_S) as cache:
                assert all(cache.put(keys, [value]))
        else:
            _raw(server, number, way)
        report(number + 1)
