"""Numbers for tenants: what the index knows them by."""

from __future__ import annotations

import threading

from mmcache.server.caller import LOCAL


class Tenants:
    """Numbers for tenants' names, for as long as the process lives: a name keeps its number whatever happens to its
    credentials, so nothing it has cached is lost. 0 is LOCAL's. Thread-safe: names are only added."""

    def __init__(self) -> None:
        self._names = [LOCAL.name]
        self._numbers = {LOCAL.name: LOCAL.tenant}
        self._lock = threading.Lock()

    def number(self, name: str) -> int:
        """The number of this name, a new one for a new name."""
        with self._lock:
            if name not in self._numbers:
                self._numbers[name] = len(self._names)
                self._names.append(name)
            return self._numbers[name]

    def find(self, name: str) -> int | None:
        """The number of a name that has one."""
        return self._numbers.get(name)

    def name(self, number: int) -> str:
        """The name of a number that was given out."""
        return self._names[number]

    def __len__(self) -> int:
        return len(self._names)
