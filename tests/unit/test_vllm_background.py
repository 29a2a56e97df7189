"""Work off the engine's thread: tickets, exceptions that stay inside, waiting for everything."""

from __future__ import annotations

import logging
import threading
import time

import pytest

from mmcache_connectors.buffers import BufferPool
from mmcache_connectors.vllm.background import Background


def test_results_come_back_and_an_exception_is_none_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    background = Background("test", 2)
    good = background.submit(lambda: 7)
    with caplog.at_level(logging.ERROR):
        bad = background.submit(lambda: 1 // 0)
        assert good.wait(5)
        assert bad.wait(5)
    assert (good.result, bad.result) == (7, None)
    assert "ZeroDivisionError" in caplog.text
    assert background.submit(lambda: 8).wait(5)  # the threads go on


def test_flush_waits_for_all_work_and_says_when_it_took_too_long() -> None:
    background = Background("test", 1)
    assert background.flush(0)
    go = threading.Event()
    done: list[int] = []
    background.submit(lambda: go.wait(5))
    background.submit(lambda: done.append(1))
    started = time.monotonic()
    assert not background.flush(0.05)
    assert time.monotonic() - started < 2
    go.set()
    assert background.flush(5)
    assert done == [1]


def test_a_ticket_can_be_asked_without_waiting() -> None:
    background = Background("test", 1)
    go = threading.Event()
    ticket = background.submit(lambda: go.wait(5))
    assert not ticket.done()
    assert not ticket.wait(0)
    go.set()
    assert ticket.wait(5)


def test_buffers_are_bounded_and_used_again() -> None:
    pool = BufferPool(64, 2, pinned=False)
    first, second = pool.take(), pool.take()
    assert first is not None
    assert second is not None
    assert pool.take() is None
    assert pool.free_share() == 0
    pool.give_back(first)
    assert pool.free_share() == 0.5
    with pool.borrow() as again:
        assert again is first
        assert pool.take() is None
    assert pool.take() is first
