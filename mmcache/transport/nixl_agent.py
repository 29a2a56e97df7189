"""The process that lets NIXL's peers read a server's arena: `python -m mmcache.transport.nixl_agent FD NBYTES REPORT`.

UCX asks nobody who they are, and over TCP a peer can reach whatever the process that listens has mapped. So this one
has nothing but the arena, read-only: no keys, no tokens, none of the server's environment. It says on the descriptor
REPORT, as one JSON object, what clients need, or the error, and ends when its standard input does: with its server.
"""

from __future__ import annotations

import json
import os
import resource
import sys

from mmcache.errors import MMCacheError
from mmcache.transport.nixl import DEVICES_VARIABLE, Agent
from mmcache.transport.shm import ArenaMap


def main(fd: int, nbytes: int, report: int) -> None:
    """Map, register, report, wait for the end."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    said: dict[str, str | int]
    try:
        arena = ArenaMap(fd, nbytes, populate=False)
        agent = Agent(os.environ[DEVICES_VARIABLE])
        agent.register(arena.data)
        said = {"metadata": agent.metadata().hex(), "base": arena.data.ctypes.data}
    except MMCacheError as error:
        said = {"error": str(error)}
    with os.fdopen(report, "w") as out:
        json.dump(said, out)
    if "error" not in said:
        sys.stdin.buffer.read()
    os._exit(0)  # no peer's read, and no thread of UCX, is waited for


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
