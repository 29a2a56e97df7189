"""A test for which no thread can be had. Threads that other tests began in this process may begin some all the same."""

from __future__ import annotations

import threading

import pytest


def without_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the calling thread fail to start another, as where the system allows no more."""
    start, here = threading.Thread.start, threading.get_ident()

    def refuse(self: threading.Thread) -> None:
        if threading.get_ident() == here:
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", refuse)
