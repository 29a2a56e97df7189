"""Something made from files, made anew when they change; what cannot be read leaves the old one in force."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from mmcache.errors import MMCacheError
from mmcache.private_file import signature

T = TypeVar("T")
log = logging.getLogger("mmcache.server")


class Watched(Generic[T]):
    """`value` is what `load` made of the files. Raises what `load` raises, the first time."""

    def __init__(self, paths: Sequence[str], load: Callable[[], T], what: str) -> None:
        self._paths, self._load, self._what = paths, load, what
        self._signature = signature(paths)  # before they are read: a change meanwhile is seen next time
        self.value = load()

    def refresh(self) -> bool:
        """Look at the files; True if there is a new value. One warning a change that cannot be used."""
        now = signature(self._paths)
        if now == self._signature:
            return False
        self._signature = now
        try:
            self.value = self._load()
        except MMCacheError as error:
            log.warning("the %s changed and cannot be used; what it said before stays in force: %s", self._what, error)
            return False
        return True
