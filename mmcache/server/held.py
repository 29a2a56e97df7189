"""A server's memory where a holder keeps it: what the holder gives to each server that it forks."""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from mmcache.config import ServerConfig
from mmcache.errors import ConfigError, TransportError
from mmcache.store.arena import Arena
from mmcache.store.kept import Kept

GIVE_UP: Final = "the last servers did not start on what was there"


@dataclass(frozen=True)
class Held:
    """What was inherited. `on_trial`: see `tries`; `ended`: how the server before did, "" for the first; `give_up`:
    begin anew."""

    arena_fd: int
    writable: mmap.mmap
    memory: memoryview
    ready_lives: memoryview[int]
    on_trial: memoryview[int]
    ended: str
    give_up: bool

    @classmethod
    def given(cls, given: Mapping[str, Any]) -> Held:
        """From what holder.py hands over, which may be of an older release: names are only added there."""
        names = ("arena_fd", "arena", "kept", "ready_lives", "on_trial", "ended", "give_up")
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

    @contextlib.contextmanager
    def tries(self) -> Iterator[None]:
        """Around the taking over of what was kept. If the process ends in there, that may be why, unless settings are
        wrong or an address cannot be had: after two such ends the holder has it given up."""
        self.on_trial[0] = 1
        try:
            yield
        except Exception as error:
            self.on_trial[0] = not isinstance(error, ConfigError | TransportError)
            raise
        self.on_trial[0] = 0

    def ready(self) -> None:
        """Tell the holder that this server accepts."""
        self.ready_lives[0] += 1
