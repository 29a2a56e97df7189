"""Numbers for tenants: what the index knows them by."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from mmcache.errors import StoreError
from mmcache.server.caller import LOCAL


class Tenants:
    """Numbers for tenants' names, for as long as the process lives: a name keeps its number whatever happens to its
    credentials, so nothing it has cached is lost. 0 is LOCAL's. Thread-safe: names are only added.

    `names`: those that have numbers already, in their order. `added` hears of each new one before it is used.
    """

    def __init__(
        self, names: Sequence[str] = (), added: Callable[[int, str], None] = lambda _number, _name: None
    ) -> None:
        self._names = list(names)
        self._numbers = {name: number for number, name in enumerate(names)}
        self._added = added
        self._lock = threading.Lock()
        if self.number(LOCAL.name) != LOCAL.tenant:
            raise StoreError(f"the first tenant is {names[0]!r}, not {LOCAL.name!r}")

    def number(self, name: str) -> int:
        """The number of this name, a new one for a new name."""
        with self._lock:
            if name not in self._numbers:
                number = len(self._names)
                self._added(number, name)
                self._names.append(name)
                self._numbers[name] = number
            return self._numbers[name]

    def find(self, name: str) -> int | None:
        """The number of a name that has one."""
        return self._numbers.get(name)

    def name(self, number: int) -> str:
        """The name of a number that was given out."""
        return self._names[number]

    def __len__(self) -> int:
        return len(self._names)
