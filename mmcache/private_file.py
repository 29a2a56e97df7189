"""Files that hold secrets: read only when nobody else can read them, written so that nobody ever could."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from mmcache.errors import ConfigError

MAX_NBYTES: Final = 4 << 20
Signature = tuple[tuple[int, ...] | None, ...]


def read_private(path: str, what: str) -> bytes:
    """The bytes of a regular file that is this user's (or root's) and closed to everybody else.

    `what` names it in errors. Raises ConfigError, with the remedy. What is checked is what is read: one descriptor.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(fd, "rb") as file:
            _check_private(os.fstat(fd), path, what)
            data = file.read(MAX_NBYTES + 1)
    except OSError as error:
        raise ConfigError(f"the {what} {path} cannot be read: {error.strerror or error}") from None
    if len(data) > MAX_NBYTES:
        raise ConfigError(f"the {what} {path} is larger than {MAX_NBYTES >> 20} MiB; is it the right file?")
    return data


def check_private(path: str, what: str) -> None:
    """As `read_private`, for a file that a library reads by its name."""
    read_private(path, what)


def _check_private(found: os.stat_result, path: str, what: str) -> None:
    mode = stat.S_IMODE(found.st_mode)
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError(f"the {what} {path} is not a regular file")
    if found.st_uid not in (0, os.geteuid()):
        raise ConfigError(
            f"the {what} {path} belongs to user {found.st_uid}, who could change it; chown it to user {os.geteuid()}"
        )
    if mode & 0o077:
        raise ConfigError(f"the {what} {path} has mode {mode:04o}: others could read it; chmod 600 it")


def write_private(path: Path, data: bytes, *, replace: bool, what: str) -> None:
    """A file of mode 0600 with these bytes, whole or not at all. Without `replace` an existing file is an error.

    Raises ConfigError.
    """
    temporary = ""
    try:
        fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
        with open(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(fd)
        if replace:
            os.rename(temporary, path)
        else:
            os.link(temporary, path)
            os.unlink(temporary)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise ConfigError(f"cannot write the {what} {path}: {error.strerror}") from None


def signature(paths: Sequence[str]) -> Signature:
    """What changes when one of the files does: replaced, written, or given other modes. A file that is not there is
    None."""
    return tuple(map(_signature, paths))


def _signature(path: str) -> tuple[int, ...] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
