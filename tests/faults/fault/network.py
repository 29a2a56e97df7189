"""A network namespace for one shard, and the link to it, which can be taken down: packets are lost without a word."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import Final

_PID: Final = os.getpid()
NAME: Final = f"mmcache-faults-{_PID}"
OUTSIDE, INSIDE = f"mfo{_PID}"[:15], f"mfi{_PID}"[:15]
# A range for tests between networks (RFC 2544), four addresses a process.
_BASE: Final = _PID % 16384 * 4
HERE, THERE = (f"198.19.{_BASE >> 8}.{(_BASE & 255) + host}" for host in (1, 2))


class NoNetwork(Exception):
    """Why there is no namespace to be had here."""


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoNetwork(f"ip {' '.join(words)}: {done.stderr.strip()}")


class Network:
    """The namespace and its link. `under` comes before a command that is to run in it. A context manager.

    Raises NoNetwork where this is not root, or has no iproute2, or may not.
    """

    under: Final = ("ip", "netns", "exec", NAME)

    def __enter__(self) -> Network:
        if os.geteuid() or not shutil.which("ip"):
            raise NoNetwork("network namespaces need root, and ip of iproute2")
        try:
            _ip("netns", "add", NAME)
            _ip("link", "add", OUTSIDE, "type", "veth", "peer", "name", INSIDE, "netns", NAME)
            _ip("address", "add", f"{HERE}/30", "dev", OUTSIDE)
            _ip("link", "set", OUTSIDE, "up")
            inside = ("netns", "exec", NAME, "ip")
            _ip(*inside, "address", "add", f"{THERE}/30", "dev", INSIDE)
            _ip(*inside, "link", "set", INSIDE, "up")
            _ip(*inside, "link", "set", "lo", "up")
        except NoNetwork:
            self._remove()
            raise
        return self

    def cut(self) -> None:
        """Nothing gets through, either way."""
        _ip("link", "set", OUTSIDE, "down")

    def mend(self) -> None:
        """As it was."""
        _ip("link", "set", OUTSIDE, "up")

    def _remove(self) -> None:
        # The link by itself: sockets that still have something to send keep a namespace that has no name any more.
        for words in (("link", "delete", OUTSIDE), ("netns", "delete", NAME)):
            subprocess.run(["ip", *words], capture_output=True, check=False)

    def __exit__(self, *error: object) -> None:
        self._remove()
