"""Work off the engine's thread: a few daemon threads with one queue, and tickets to ask how a piece of work went."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

log = logging.getLogger("mmcache.vllm")
T = TypeVar("T")


class Ticket(Generic[T]):
    """One piece of work under way. `result` is None until `done`, and stays None if the work raised."""

    __slots__ = ("_event", "result", "started_s")

    def __init__(self) -> None:
        self._event = threading.Event()
        self.started_s = time.monotonic()
        self.result: T | None = None

    def done(self) -> bool:
        """True once the work has ended, well or not."""
        return self._event.is_set()

    def wait(self, timeout_s: float) -> bool:
        """As `done`, after waiting for it at most this long."""
        return self._event.wait(timeout_s) if timeout_s > 0 else self._event.is_set()

    def finish(self, result: T | None) -> None:
        """Called once, by whoever did the work."""
        self.result = result
        self._event.set()


class Background:
    """`count` daemon threads. Work that raises is logged and gives None: nothing of it reaches the engine.

    Threads start with the first work, so that a process forked before then has its own.
    """

    def __init__(self, name: str, count: int) -> None:
        self._name, self._count = name, count
        self._queue: queue.SimpleQueue[tuple[Callable[[], object], Ticket[object]]] = queue.SimpleQueue()
        self._idle = threading.Condition()
        self._started = 0
        self._open = 0

    def submit(self, work: Callable[[], T]) -> Ticket[T]:
        """Queue `work`; it runs when a thread is free. Raises RuntimeError where no thread can be started."""
        ticket: Ticket[T] = Ticket()
        with self._idle:
            while self._started < self._count:
                threading.Thread(target=self._run, name=f"{self._name}-{self._started}", daemon=True).start()
                self._started += 1
            self._open += 1
        self._queue.put((work, ticket))  # type: ignore[arg-type]
        return ticket

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything submitted has ended; False if it did not within the time."""
        with self._idle:
            return self._idle.wait_for(lambda: not self._open, timeout_s)

    def _run(self) -> None:
        while True:
            work, ticket = self._queue.get()
            result: object = None
            try:
                result = work()
            except Exception:
                log.exception("work for the cache failed; it counts as a miss, or as a block that is not stored")
            finally:
                del work
                ticket.finish(result)
                del ticket, result
                with self._idle:
                    self._open -= 1
                    if not self._open:
                        self._idle.notify_all()
