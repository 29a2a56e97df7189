"""What fails inside a connector is a miss to SGLang, and a line in the log the first time."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

log = logging.getLogger("mmcache.sglang")
T = TypeVar("T")


class Faults:
    """The kinds of failures that were said. Thread-safe: at worst one is said twice."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def caught(self, work: Callable[[], T], missed: T) -> T:
        """`work()`, or `missed` if it raises."""
        try:
            return work()
        except Exception as error:
            if type(error).__name__ not in self._said:
                self._said.add(type(error).__name__)
                log.exception("mmcache: a call failed inside the connector; it counts as a miss, and so will others")
            return missed
