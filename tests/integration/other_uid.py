"""What a process of another user tries: `python -m tests.integration.other_uid FUNCTION WORDS...`, started as root.

It takes what it may take while it is root, then becomes USER for good, and says in one line of JSON how each thing it
tries ends: the error's name, or "done".
"""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import json
import mmap
import os
import socket
import sys
from collections.abc import Callable
from typing import Any, Final

import numpy as np

import mmcache
from mmcache.client.operations import Operations
from mmcache.pb import cache_pb2 as pb
from mmcache.transport.base import PRELUDE_NBYTES, Op, pack_prelude, parse_prelude
from tests.integration.support import blanks, keys_of, values_of

USER: Final = 65534  # nobody
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2  # linux/falloc.h
_libc = ctypes.CDLL(None, use_errno=True)


def become_user() -> None:
    """Another user from now on, without groups and without a way back."""
    os.setgroups([])
    os.setgid(USER)
    os.setuid(USER)
    assert os.getresuid() == (USER, USER, USER)


def _tried(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "done"


def _checked(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")


def arena_of(unix_path: str) -> int:
    """Join as a client on this host does; the descriptor of the arena that the server sends."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(unix_path)
    body = pb.JoinRequest(protocol=1, client="test", want_arena=True).SerializeToString()
    sock.sendall(pack_prelude(Op.JOIN, 7, len(body)) + body)
    data, ancillary, _, _ = sock.recvmsg(PRELUDE_NBYTES, socket.CMSG_SPACE(4))
    assert parse_prelude(data, 1 << 20).op == Op.JOIN
    fds = array.array("i")
    fds.frombytes(ancillary[0][2])
    return fds[0]


def tries_to_change(fd: int, offset: int) -> dict[str, str]:
    """Every way there is to change the file behind `fd`, at and behind `offset`, a multiple of the page size."""
    page, bad = mmap.PAGESIZE, b"\xff" * 64
    again = f"/proc/{os.getpid()}/fd/{fd}"

    def write_again() -> None:
        opened = os.open(again, os.O_RDWR)
        try:
            os.pwrite(opened, bad, offset)
        finally:
            os.close(opened)

    def map_again() -> None:
        opened = os.open(again, os.O_RDWR)
        try:
            with mmap.mmap(opened, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=offset) as view:
                view[:64] = bad
        finally:
            os.close(opened)

    def change_map() -> None:
        _libc.mmap.restype = ctypes.c_void_p
        where = _libc.mmap(None, page, mmap.PROT_READ, mmap.MAP_SHARED, fd, ctypes.c_long(offset))
        _checked(_libc.mprotect(ctypes.c_void_p(where), page, mmap.PROT_READ | mmap.PROT_WRITE))
        ctypes.memset(where, 0xFF, 64)

    def write_map() -> None:
        with mmap.mmap(fd, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=offset) as view:
            view[:64] = bad

    def punch() -> None:
        mode = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
        _checked(_libc.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(page)))

    attempts: dict[str, Callable[[], object]] = {
        "write": lambda: os.pwrite(fd, bad, offset),
        "map writable": write_map,
        "make a map writable": change_map,
        "punch a hole": punch,
        "reopen and write": write_again,
        "reopen and map": map_again,
        "reopen and truncate": lambda: os.close(os.open(again, os.O_RDWR | os.O_TRUNC)),
        "grow": lambda: os.ftruncate(fd, 1 << 40),
        "shrink": lambda: os.ftruncate(fd, page),
    }
    return {name: _tried(attempt) for name, attempt in attempts.items()}


def attack_arena(unix_path: str, server_pid: str) -> dict[str, Any]:
    """Hold the arena as a client of the server's own user does, become another one, and try to change it."""
    fd = arena_of(unix_path)
    become_user()
    tried = tries_to_change(fd, 0)
    tried["take seals back"] = _tried(lambda: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 0))
    tried["list the server's files"] = _tried(lambda: os.listdir(f"/proc/{server_pid}/fd"))
    tried["open the server's memory"] = _tried(lambda: os.close(os.open(f"/proc/{server_pid}/mem", os.O_RDWR)))
    return {"tried": tried, "nbytes": os.fstat(fd).st_size}


def attack_unsealed(nbytes: str) -> dict[str, Any]:
    """The same with a file that nobody sealed: what an arena would be open to."""
    fd = os.memfd_create("unsealed")
    os.ftruncate(fd, int(nbytes))
    become_user()
    return {"tried": tries_to_change(fd, 0), "nbytes": os.fstat(fd).st_size}


def connect_unix(path: str) -> dict[str, Any]:
    """Connect to a unix socket as root and then as another user."""

    def connect() -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.connect(path)

    before = _tried(connect)
    become_user()
    return {"root": before, "other": _tried(connect)}


def use_tenant(url: str, token: str, label: str, nbytes: str) -> dict[str, Any]:
    """As another user, with a token: look for what stands under these keys in every way a client has."""
    keys, size = keys_of(2, label), int(nbytes)
    values, buffers = values_of(keys, size), blanks(2, size)
    with mmcache.connect(url, token=token) as cache:
        cache.match_prefix(keys)  # what is only imported when it is used is imported now
    become_user()
    with mmcache.connect(url, token=token) as cache:
        got = [str(result.outcome) for result in cache.get_into(keys, buffers)]
        with cache.acquire(keys) as lease:
            acquired = sum(frame is not None for frame in lease.frames)
        return {
            "transport": cache.stat()["transport"],
            "got": got,
            "right": sum(map(np.array_equal, buffers, values)),
            "acquired": acquired,
            "matched": cache.match_prefix(keys),
            "inspected": cache.inspect(keys.digests[0]).found,
            "listed": len(list(Operations(cache).entries())),
            "deleted": sum(cache.delete(keys)),
        }


def which_path(url: str) -> dict[str, Any]:
    """Connect as another user: what Client.stat says."""
    mmcache.connect(url).close()  # what is only imported when it is used is imported now
    become_user()
    with mmcache.connect(url) as cache:
        return cache.stat()


if __name__ == "__main__":
    FUNCTIONS = (attack_arena, attack_unsealed, connect_unix, use_tenant, which_path)
    functions = {function.__name__: function for function in FUNCTIONS}
    print(json.dumps(functions[sys.argv[1]](*sys.argv[2:])), flush=True)
