"""Work off the engine's thread: tickets, exceptions that stay inside, waiting for everything."""

from __future__ import annotations

import logging
import threading
import time

import pytest
import torch

from mmcache.testing.values import PATIENCE_S
from mmcache_connectors.buffers import BufferPool
from mmcache_connectors.vllm.background import Background
from tests.unit.heard import heard


def test_results_come_back_and_an_exception_is_none_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    background = Background("test", 2)
    good = background.submit(lambda: 7)
    with caplog.at_level(logging.ERROR):
        bad = background.submit(lambda: 1 // 0)
        assert good.wait(PATIENCE_S)
        assert bad.wait(PATIENCE_S)
    assert (good.result, bad.result) == (7, None)
    assert "ZeroDivisionError" in caplog.text
    assert background.submit(lambda: 8).wait(PATIENCE_S)  # the threads go on


def test_flush_waits_for_all_work_and_says_when_it_took_too_long() -> None:
    background = Background("test", 1)
    assert background.flush(0)
    go = threading.Event()
    done: list[int] = []
    background.submit(lambda: go.wait(60))
    background.submit(lambda: done.append(1))
    waits = []
    for _ in range(3):  # a busy machine is late once
        started = time.monotonic()
        assert not background.flush(0.05)
        waits.append(time.monotonic() - started)
    assert min(waits) < 2
    assert done == []
    go.set()
    assert background.flush(PATIENCE_S)
    assert done == [1]


def test_a_ticket_can_be_asked_without_waiting() -> None:
    background = Background("test", 1)
    go = threading.Event()
    ticket = background.submit(lambda: go.wait(PATIENCE_S))
    assert not ticket.done()
    assert not ticket.wait(0)
    go.set()
    assert ticket.wait(PATIENCE_S)


def test_buffers_are_bounded_and_used_again() -> None:
    pool = BufferPool(64, 2, pinned="no")
    first, second = pool.take(), pool.take()
    assert first is not None
    assert second is not None
    assert pool.take() is None
    assert pool.free_share() == 0
    pool.give_back(first)
    assert pool.free_share() == 0.5
    assert pool.take() is first
    assert pool.take() is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is page-locked memory here")
def test_without_page_locked_memory_loads_use_ordinary_and_saves_none(caplog: pytest.LogCaptureFixture) -> None:
    wanted, must = BufferPool(64, 2, pinned="wanted"), BufferPool(64, 2, pinned="must")
    with caplog.at_level(logging.WARNING):
        assert wanted.take() is not None
        assert wanted.take() is not None
        assert must.take() is None
        assert must.take() is None
    assert must.free_share() == 1
    assert [record.message.rsplit("; ")[-1] for record in heard(caplog)] == [
        "ordinary memory is used",
        "blocks are not stored without one",
    ]
