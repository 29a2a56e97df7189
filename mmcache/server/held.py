"""A server's memory where a holder keeps it: what the holder gives to each server that it forks."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from mmcache.config import ServerConfig
from mmcache.errors import ConfigError
from mmcache.store.arena import Arena
from mmcache.store.kept import Kept

GIVE_UP: Final = "the last servers did not start on what was there"


@dataclass(frozen=True)
class Held:
    """What was inherited. `ended`: how the server before did, "" for the first; `give_up`: begin anew."""

    arena_fd: int
    writable: mmap.mmap
    memory: memoryview
    ready_lives: memoryview[int]
    ended: str
    give_up: bool

    @classmethod
    def given(cls, given: Mapping[str, Any]) -> Held:
        """From what holder.py hands over, which may be of an older release: names are only added there."""
        names = ("arena_fd", "arena", "kept", "ready_lives", "ended", "give_up")
        return cls(*(given[name] for name in names))

    def kept(self, config: ServerConfig) -> Kept:
        """What outlives this server beside the values; once a life. Raises StoreError if that memory is too small."""
        settings: dict[str, str | int] = {
            "memory": config.memory_nbytes,
            "alignment": config.alignment,
            "policy": config.policy,
            "access file": "yes" if config.access_file else "no",
        }
        why = GIVE_UP if self.give_up else ""
        return Kept(self.memory, config.entries, settings, give_up=why, lock=threading.Lock())

    def arena(self, config: ServerConfig) -> Arena:
        """The memory for values. Raises ConfigError if it is not as large as it should be."""
        if len(self.writable) != config.memory_nbytes:
            raise ConfigError(
                f"{len(self.writable)} bytes are held, and memory is {config.memory_nbytes}; stop the server with its "
                "holder, and start both anew"
            )
        return Arena.held(self.arena_fd, self.writable)

    def ready(self) -> None:
        """Tell the holder that this server accepts."""
        self.ready_lives[0] += 1
