"""Addresses of a host, within a deadline: the system's resolver knows none."""

from __future__ import annotations

import queue
import socket
import threading
import time
from typing import Any

from mmcache.errors import DeadlineExceeded, TransportError


def resolve(host: str, port: int, deadline: float) -> list[tuple[int, tuple[Any, ...]]]:
    """(family, address) of HOST:PORT, in order of preference. Raises TransportError.

    The system's resolver knows no deadline, so it runs on a thread of its own, which is left behind if it is late.
    """
    answer: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answer.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except Exception as error:  # a name that is none is a UnicodeError
            answer.put(error)

    threading.Thread(target=ask, name="mmcache-resolve", daemon=True).start()
    try:
        found = answer.get(timeout=max(0.0, deadline - time.monotonic()))
    except queue.Empty:
        raise DeadlineExceeded(f"the name {host} was not resolved in time; use an IP address") from None
    if isinstance(found, Exception):
        raise TransportError(f"{host} cannot be resolved: {found}; check the host in the URL") from found
    return [(int(family), address) for family, _, _, _, address in found]
