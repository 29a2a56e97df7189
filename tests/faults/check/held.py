"""What a server still holds for anybody once nobody is left: leases, reservations, bytes, connections' descriptors."""

from __future__ import annotations

import os
import time
from typing import Any, Final, NamedTuple, Protocol

COUNTED: Final = ("leases", "held_bytes", "reservations", "inflight_bytes", "bytes_lent")


class Taken(NamedTuple):
    """What a process has open, and how many threads run in it."""

    descriptors: int
    threads: int


class Asked(Protocol):
    """What is needed of a server."""

    @property
    def pid(self) -> int:
        """Of the process that serves."""
        ...

    def stat(self) -> dict[str, Any]:
        """What it says of itself; nothing if it does not answer."""
        ...


def open_of(pid: int) -> Taken:
    """Of a process, now."""
    return Taken(len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task")))


def what_is_held(server: Asked, before: Taken, patience_s: float) -> dict[str, Any]:
    """The counters that should be 0 by now, and what the process has open beside what it had before its first client.

    Waited for so long at most. `entries` is only told. `silent`: it did not answer.
    """
    give_up_s = time.monotonic() + patience_s
    while True:
        now = open_of(server.pid)  # first: whoever asks is connected
        counters = server.stat().get("counters", {})
        held: dict[str, Any] = {name: counters[name] for name in COUNTED if counters.get(name)}
        more = {name: (had, has) for name, had, has in zip(Taken._fields, before, now, strict=True) if has > had}
        if time.monotonic() > give_up_s or (counters and not held and not more):
            return {"counters": held, "more": more, "entries": counters.get("entries", 0), "silent": not counters}
        time.sleep(0.2)
