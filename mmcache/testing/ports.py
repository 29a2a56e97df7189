"""Ports on loopback for servers under test, which nobody else is given while a server is away."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack, suppress
from typing import Final

OWN: Final = range(20_000, 30_000)
_given: Final[set[int]] = set()


def own_ports(count: int = 1, within: range = OWN) -> list[int]:
    """So many in a row that nobody has now. None is given twice by one process.

    Within OWN, the kernel gives none of them to outgoing connections, nor to who asks for any: those are 32768 and more
    (ip(7)). Processes that take some at the same time need ranges of their own.
    """
    while True:
        first = random.randrange(within.start, within.stop - count + 1)
        ports = range(first, first + count)
        with ExitStack() as stack, suppress(OSError):
            for port in ports:
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
            if _given.isdisjoint(ports):
                _given.update(ports)
                return list(ports)


def keeper(port: int = 0) -> socket.socket:
    """A socket that is bound to it, or to a free one, and does not listen.

    Until it is closed the kernel gives that port to nobody but those who ask for it by number. Raises OSError if
    somebody listens there.
    """
    kept = socket.socket()
    try:
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        kept.bind(("127.0.0.1", port))
    except BaseException:
        kept.close()
        raise
    return kept
