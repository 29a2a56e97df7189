"""A policy that hears of uses a little later, never too late: noting a use is then as cheap as adding to a list.

Whoever looked something up can be answered first. Everything else that a policy is told or asked comes after the uses
noted before it, so the order in which rows leave is the same as without this. PURE: no clock, no randomness, no I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from mmcache.store.policy import Policy

MOST_WAITING: Final = 4096  # uses noted and not told yet, before one more call


class Uses:
    """The Policy it is given, with `note`, and `tell` for when there is time."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._waiting: list[int] = []

    def note(self, rows: Iterable[int]) -> None:
        """As `touch` for each, in order, before any other call takes effect."""
        if len(self._waiting) >= MOST_WAITING:
            self.tell()
        self._waiting.extend(rows)

    def tell(self) -> Policy:
        """Tell the policy of all uses noted. The policy."""
        policy, waiting = self._policy, self._waiting
        if waiting:
            for row in waiting:
                policy.touch(row)
            waiting.clear()
        return policy

    def insert(self, row: int, name: bytes, kind: int, parent: int) -> None:
        self.tell().insert(row, name, kind, parent)

    def touch(self, row: int) -> None:
        self.tell().touch(row)

    def remove(self, row: int) -> None:
        self.tell().remove(row)

    def evict(self, row: int, name: bytes) -> None:
        self.tell().evict(row, name)

    def shelve(self, row: int) -> None:
        self.tell().shelve(row)

    def unshelve(self, row: int) -> None:
        self.tell().unshelve(row)

    def victim(self, evictable: Callable[[int], bool], max_scan: int) -> int | None:
        return self.tell().victim(evictable, max_scan)

    def exhausted(self) -> bool:
        return self.tell().exhausted()

    def restore(self, rows: Sequence[int], kinds: Sequence[int]) -> None:
        self.tell().restore(rows, kinds)

    def listed(self) -> list[int]:
        return self.tell().listed()
