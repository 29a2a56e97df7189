"""By which way a client reaches its server: decided here, dialled by a driver."""

from __future__ import annotations

import logging
import os
from collections.abc import Generator
from typing import Final, Generic, NamedTuple, TypeVar

from mmcache.client.session import NoSharedMemory, Session
from mmcache.config import ClientConfig
from mmcache.errors import TransportError
from mmcache.transport.shm import ArenaMap

LEASE_PER_DEADLINE: Final = 4  # a lease should outlive the call that took it by far
log = logging.getLogger("mmcache.client")
L = TypeVar("L", bound=Session)


class Dial(NamedTuple):
    """Connect, and join with or without shared memory, and ready for NIXL or not: to the unix socket at `path`, or,
    where that is empty, to the settings' host and port, or to the server in this process. The answer is the link;
    TransportError is thrown."""

    path: str
    shared: bool
    nixl: bool = False


class Route(Generic[L]):
    """The best way the settings allow to one server, and what was learnt about it on the way."""

    def __init__(self, config: ClientConfig, *, attached: bool) -> None:
        self.config = config
        self.known: tuple[bytes, ArenaMap] | None = None
        self._attached = attached
        self._unix_path = ""
        self._warned = self._warned_of_nixl = False

    def open(self) -> Generator[Dial, L, L]:
        """A joined link. Raises TransportError when no way works."""
        config = self.config
        shared = config.transport != "tcp"
        if config.transport == "nixl":
            return self._note((yield Dial(config.path, False, nixl=True)))
        if self._attached or config.scheme == "mmcache+unix":
            try:
                return self._note((yield Dial(config.path, shared)))
            except NoSharedMemory:
                if config.transport != "auto":
                    raise
                return self._note((yield Dial(config.path, False)), "the server shares no memory with this client")
        if shared and self._unix_path:
            link = yield from self._try_unix(self._unix_path, None)
            if link is not None:
                return link
        link = self._note((yield Dial("", False)))
        if not shared:
            return link
        link.why = "its unix socket is off, on another host, or not for this client"
        path = link.joined.unix_path if link.channel.is_loopback else ""
        try:
            faster = (yield from self._try_unix(path, link.joined.server_id)) if path else None
        except BaseException:
            link.close()
            raise
        if faster is None:
            if config.transport == "shm":
                link.close()
                trouble = f"unix socket {path} cannot be used from here" if path else "unix socket is off or elsewhere"
                raise TransportError(f"the server's {trouble}; use transport=tcp")
            return link
        link.close()
        return faster

    def _try_unix(self, path: str, server_id: bytes | None) -> Generator[Dial, L, L | None]:
        """A shared-memory link by a path the server named, or None. The server there must be the same one."""
        try:
            if not os.access(path, os.R_OK | os.W_OK):
                raise TransportError(f"{path} is not reachable")
            link = self._note((yield Dial(path, True)))
        except TransportError:
            self._unix_path = ""
            return None
        if server_id is not None and link.joined.server_id != server_id:
            link.close()
            return None
        self._unix_path = path
        return link

    def _note(self, link: L, why: str = "") -> L:
        asked = self.config.transport != "auto"
        link.why = why or ("the URL asks for it" if asked else "the server is on this host and shares its memory")
        if trouble := link.no_reader:
            link.why = f"NIXL cannot be used: {trouble}"
            if not self._warned_of_nixl:
                self._warned_of_nixl = True
                log.warning("reads go by %s, not by NIXL: %s", link.path, trouble)
        if link.joined.lease_s < LEASE_PER_DEADLINE * self.config.deadline_s and not self._warned:
            self._warned = True
            log.warning(
                "the server's leases last %g s, less than %d calls of deadline_s=%g: slow reads may lose theirs and "
                "count as misses; raise serve --lease-s or lower deadline_s",
                link.joined.lease_s,
                LEASE_PER_DEADLINE,
                self.config.deadline_s,
            )
        if link.arena is not None:
            self.known = (link.joined.server_id, link.arena)
        return link
