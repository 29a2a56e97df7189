"""Several calls at once, each but the first on a thread of its own, none of which goes on after the call has ended."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")


def beside(calls: Sequence[Callable[[], T]], name: str) -> list[T]:
    """What each call returns, in order. They run at the same time, on threads of this name; a thread that cannot be had
    is done without. Ends only after all of them, whatever ends it, also through signals that raise.

    A call that raises on its thread is made again here, so that the caller hears of it: it must bear that.
    """
    helpers = [_Helper(call, name) for call in calls[1:]]
    try:
        for helper in helpers:
            with contextlib.suppress(RuntimeError):
                helper.start()
        results = [call() for call in calls[:1]]
    finally:
        _settle(helpers)
    return results + [helper.outcome() for helper in helpers]


class _Helper(threading.Thread, Generic[T]):
    """Makes one call, unless it is told not to before it has begun."""

    def __init__(self, call: Callable[[], T], name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._call = call
        self._results: list[T] = []
        self._turn = threading.Lock()
        self._begun = self._too_late = False
        self._ended = threading.Event()

    def run(self) -> None:
        with self._turn:
            if self._too_late:
                return
            self._begun = True
        try:
            with contextlib.suppress(Exception):  # outcome() does it again, and so raises it in the caller
                self._results.append(self._call())
        finally:
            self._ended.set()

    def settle(self) -> None:
        """See to it that nothing happens after this: wait for the end, or, if it has not begun, it never will."""
        with self._turn:
            self._too_late = True
        if self._begun:
            self._ended.wait()

    def outcome(self) -> T:
        """What the call returned; makes it here if the thread did not."""
        return self._results[0] if self._results else self._call()


def _settle(helpers: Sequence[_Helper[T]]) -> None:
    """Settle all, also through signals that raise; the last such exception is raised at the end."""
    interruption: BaseException | None = None
    for helper in helpers:
        while True:
            try:
                helper.settle()
                break
            except BaseException as error:
                interruption = error
    if interruption is not None:
        raise interruption
