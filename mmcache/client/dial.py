"""By which way a client reaches its server: decided here, dialled by a driver."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Generator
from typing import Final, Generic, NamedTuple, TypeVar

from mmcache.client.session import NoSharedMemory, Session
from mmcache.config import ClientConfig
from mmcache.errors import TransportError
from mmcache.transport.shm import ArenaMap

LEASE_PER_DEADLINE: Final = 4  # a lease should outlive the call that took it by far
_IN_PROCESS: Final = "the server is in this process"
_WHY: Final = {
    "auto": "the server is on this host and shares its memory",
    "shm": "the URL asks for it (transport=shm)",
    "tcp": "the URL asks for a socket and no shared memory (transport=tcp)",
    "nixl": "the URL asks for it (transport=nixl)",
}
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
        self.known: ArenaMap | None = None
        self._attached = attached
        self._unix_path = ""
        self._warned = self._warned_of_nixl = False

    def open(self) -> Generator[Dial, L, L]:
        """A joined link that knows why it is the best one. Raises TransportError when no way works."""
        config = self.config
        shared = config.transport != "tcp"
        if config.transport == "nixl":
            return self._note((yield Dial(config.path, False, nixl=True)))
        if self._attached or config.scheme == "mmcache+unix":
            try:
                return self._note((yield Dial(config.path, shared)))
            except NoSharedMemory as error:
                if config.transport != "auto":
                    raise TransportError(f"no shared memory: {error}; use transport=tcp") from None
                return self._note((yield Dial(config.path, False)), str(error))
        if shared and self._unix_path:
            faster, _ = yield from self._try_unix(self._unix_path, None)
            if faster is not None:
                return faster
        link = self._note((yield Dial("", False)))
        if not shared:
            return link
        try:
            faster, why = yield from self._beside(link)
        except BaseException:
            link.close()
            raise
        if faster is None and config.transport == "auto":
            link.why = why
            return link
        link.close()
        if faster is None:
            raise TransportError(f"no shared memory: {why}; use transport=tcp")
        return faster

    def _beside(self, link: L) -> Generator[Dial, L, tuple[L | None, str]]:
        """A shared-memory link to the server of this one, or why there is none."""
        if not link.channel.is_loopback:
            return None, "the URL's address is not loopback, so the server is taken to be on another host"
        path = link.joined.unix_path
        if not path:
            return None, "the server has no unix socket, by which its memory would be shared (serve --unix)"
        return (yield from self._try_unix(path, link.joined.server_id))

    def _try_unix(self, path: str, server_id: bytes | None) -> Generator[Dial, L, tuple[L | None, str]]:
        """A shared-memory link by a path the server named, or why not. The server there must be the same one."""
        try:
            os.stat(path)
            if not os.access(path, os.R_OK | os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            link = self._note((yield Dial(path, True)))
        except NoSharedMemory as error:
            why = str(error)
        except TransportError as error:
            why = f"the server's unix socket cannot be used: {error}"
        except OSError as error:
            why = f"the server's unix socket {path} cannot be reached from here: {error.strerror}"
        else:
            if server_id is None or link.joined.server_id == server_id:
                self._unix_path = path
                return link, ""
            link.close()
            return None, f"another server than the URL's answers at the unix socket that it names, {path}"
        self._unix_path = ""
        return None, why

    def _note(self, link: L, why: str = "") -> L:
        link.why = why or (_IN_PROCESS if self._attached else _WHY[self.config.transport])
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
            self.known = link.arena
        return link
