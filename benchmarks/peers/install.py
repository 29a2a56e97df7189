"""Environments for the peers: one a peer, in a folder of their own, as their requirements exclude each other.

`install` is safe to run twice at once and to stop at any moment: a lock is held for each environment while it is built,
and a stamp with a digest of what it was built from stands for one that is complete.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

REQUIREMENTS = Path(__file__).parent / "requirements"
WITH_TORCH = {"lmcache", "aibrix"}
PIP = ("-m", "pip", "--disable-pip-version-check", "-qq", "install")
INSTALL_S = 1800


class PeerError(Exception):
    """A peer cannot be installed, started or used; the words go into the table."""


def python_of(folder: Path, name: str) -> Path:
    """The interpreter of the environment `name`, complete or not."""
    return folder / name / "bin" / "python"


def install(folder: Path, name: str) -> None:
    """Build the environment `name` in `folder`, unless it is there. Raises PeerError with pip's last words."""
    files = [REQUIREMENTS / f"{name}.txt"]
    if name in WITH_TORCH:
        files.insert(0, REQUIREMENTS / "torch.txt")
    digest = hashlib.sha256(b"\0".join([sys.version.encode(), *(file.read_bytes() for file in files)])).hexdigest()
    venv = folder / name
    stamp = venv / f".stamp-{digest[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f".lock-{name}", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if stamp.exists():
            return
        print(f"installing {name} into {venv}", file=sys.stderr, flush=True)
        python = str(python_of(folder, name))
        _run(sys.executable, "-m", "venv", str(venv))
        for file in files:
            # Frozen lists are complete as they are; torch brings what it needs for the build that is offered.
            _run(python, *PIP, *(["--no-deps"] * (file.name != "torch.txt")), "-r", str(file))
        for old in venv.glob(".stamp-*"):
            old.unlink()
        stamp.touch()


def need(package: str, what: str) -> None:
    """See that this system has `what`, a command or a library (`lib*`): by apt, if need be and this process may.

    Raises PeerError with what to do.
    """
    if _library(what) if what.startswith("lib") else shutil.which(what):
        return
    if os.geteuid() or not shutil.which("apt-get"):
        raise PeerError(f"no {what} on this system: install it (Debian, Ubuntu: apt-get install {package})")
    print(f"installing {package} with apt-get", file=sys.stderr, flush=True)
    _run("apt-get", "update", "-qq")
    _run("apt-get", "install", "-y", "-qq", "--no-install-recommends", package)


def _library(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def _run(*command: str) -> None:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=INSTALL_S, env=environment
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PeerError(f"`{' '.join(command[:4])} ...`: {error}") from error
    if done.returncode:
        said = done.stdout.strip().splitlines()
        raise PeerError(f"`{' '.join(command[:4])} ...` failed: {said[-1] if said else 'it said nothing'}")
