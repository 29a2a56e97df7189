"""What keeps a connector from harming its engine, and has it speak as vLLM does: what connectors here share.

vLLM lets an exception from a connector end the engine, so every method it calls once it runs is guarded. No vLLM here.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

log = logging.getLogger("mmcache.vllm")
P = ParamSpec("P")
R = TypeVar("R")


def never_raises(default: Callable[[], Any]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """An exception becomes `default()`, and a line in the log."""

    def wrap(method: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(method)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return method(*args, **kwargs)
            except Exception:
                log.exception("mmcache: %s failed; the engine goes on as if nothing were cached", method.__name__)
                return default()  # type: ignore[no-any-return]

        return guarded

    return wrap


def log_as_vllm_does() -> None:
    """Have mmcache's log lines come out where vLLM's do."""
    ours, theirs = logging.getLogger("mmcache"), logging.getLogger("vllm")
    if not ours.handlers and theirs.handlers:
        for handler in theirs.handlers:
            ours.addHandler(handler)
        ours.propagate = False
