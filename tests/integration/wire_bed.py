"""A network of the tests' own: a namespace with a server in it, and the link from here to there."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from typing import Final

import pytest

NAMESPACE: Final = f"mmcache-{os.getpid()}"
OUTSIDE, INSIDE = f"mmo{os.getpid()}"[:15], f"mmi{os.getpid()}"[:15]
HERE, THERE = "198.18.213.1", "198.18.213.2"  # a range for tests between networks: RFC 2544
SLOW: Final = "tbf rate 160mbit burst 256kb latency 400ms"  # 16 MiB take most of a second
NOTHING: Final = "tbf rate 8bit burst 10b limit 10b"  # no packet is that small: each is dropped


def run(*words: str) -> None:
    """One command of iproute2; skips the test where it is not permitted."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no network namespace to be had: {' '.join(words)}: {done.stderr.strip()}")


class Wire:
    """The link between this process and a namespace with a server in it; `limit` says what it lets through."""

    def limit(self, rule: str) -> None:
        """Both ways, from now on."""
        run("tc", "qdisc", "replace", "dev", OUTSIDE, "root", *rule.split())
        run("ip", "netns", "exec", NAMESPACE, "tc", "qdisc", "replace", "dev", INSIDE, "root", *rule.split())


@contextlib.contextmanager
def network() -> Iterator[Wire]:
    """The namespace and the link, slow; gone in the end."""
    if os.geteuid() or not (shutil.which("ip") and shutil.which("tc")):
        pytest.skip("network namespaces need root, ip and tc (iproute2)")
    inside = ("ip", "netns", "exec", NAMESPACE, "ip")
    try:
        run("ip", "netns", "add", NAMESPACE)
        run("ip", "link", "add", OUTSIDE, "type", "veth", "peer", "name", INSIDE, "netns", NAMESPACE)
        run("ip", "address", "add", f"{HERE}/30", "dev", OUTSIDE)
        run("ip", "link", "set", OUTSIDE, "up")
        run(*inside, "address", "add", f"{THERE}/30", "dev", INSIDE)
        run(*inside, "link", "set", INSIDE, "up")
        run(*inside, "link", "set", "lo", "up")
        between = Wire()
        between.limit(SLOW)
        yield between
    finally:
        # The link by itself: sockets that still have something to send keep a namespace that has no name any more.
        for words in (("link", "delete", OUTSIDE), ("netns", "delete", NAMESPACE)):
            subprocess.run(["ip", *words], capture_output=True, check=False)
