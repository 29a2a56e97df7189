"""Which server memory a device may read: asked once, in the background, kept mapped, given up when nobody maps it."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch: Any = pytest.importorskip("torch")

from mmcache_connectors.registered import Registry  # noqa: E402
from tests.unit.threads import without_threads  # noqa: E402

CPU = torch.device("cpu")


class Map:
    """What a client holds while it uses a server's memory."""

    def __init__(self) -> None:
        self.data = np.zeros(64, np.uint8)


class Driver:
    """Registers nothing, and tells what it was asked; `answer` and `parting` are why it refuses."""

    def __init__(self, answer: str = "", parting: str = "") -> None:
        self.answer, self.parting = answer, parting
        self.registered: list[int] = []
        self.unregistered: list[int] = []
        self.go = threading.Event()
        self.go.set()

    def register(self, place: int, nbytes: int, device: Any) -> str:
        assert self.go.wait(5)
        assert nbytes == 64
        self.registered.append(place)
        return self.answer

    def unregister(self, place: int, device: Any) -> str:
        self.unregistered.append(place)
        return self.parting

    def registry(self) -> Registry:
        return Registry(self.register, self.unregister)


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def allowed(registry: Registry, held: Map) -> bool:
    with registry.reading(held, CPU) as readable:
        return readable


def test_the_answer_is_no_until_the_driver_has_given_one_and_nobody_waits_for_it() -> None:
    driver, held = Driver(), Map()
    driver.go.clear()
    registry = driver.registry()
    assert [allowed(registry, held) for _ in range(3)] == [False] * 3
    driver.go.set()
    until(lambda: allowed(registry, held))
    assert driver.registered == [held.data.ctypes.data]


def test_many_threads_ask_the_driver_once() -> None:
    driver, held = Driver(), Map()
    registry, answers = driver.registry(), []
    threads = [threading.Thread(target=lambda: answers.append(allowed(registry, held))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    until(lambda: allowed(registry, held))
    assert len(answers) == 8
    assert len(driver.registered) == 1


def test_a_refusal_is_said_once_and_stays(caplog: pytest.LogCaptureFixture) -> None:
    driver, held = Driver("no such call"), Map()
    registry = driver.registry()
    allowed(registry, held)
    until(lambda: "no such call" in caplog.text)
    assert not allowed(registry, held)
    assert len(driver.registered) == 1
    assert sum("no such call" in record.getMessage() for record in caplog.records) == 1


def test_memory_is_given_up_when_its_client_is_gone_but_not_while_it_is_read() -> None:
    driver, held = Driver(), [Map()]
    registry = driver.registry()
    until(lambda: allowed(registry, held[0]))
    place = held[0].data.ctypes.data
    with registry.reading(held[0], CPU) as readable:
        assert readable
        held.clear()
        gc.collect()
        others = [Map() for _ in range(50)]  # a restarted server's memory may be mapped anywhere but there
        assert place not in [other.data.ctypes.data for other in others]
        until(lambda: allowed(registry, others[0]))
        assert driver.unregistered == []
    until(lambda: driver.unregistered == [place])
    until(lambda: len(registry._entries) == 1)
    assert allowed(registry, others[0])


def test_what_the_driver_does_not_let_go_stays_mapped_and_what_it_never_took_does_not() -> None:
    driver, held = Driver(parting="busy"), [Map()]
    registry = driver.registry()
    until(lambda: allowed(registry, held[0]))
    place = held[0].data.ctypes.data
    held.clear()
    gc.collect()
    until(lambda: driver.unregistered == [place])
    assert registry._entries[0].data.ctypes.data == place
    driver.answer = "no"
    refused = Map()
    assert not allowed(registry, refused)
    until(lambda: registry._entries[1].allowed is False)
    assert registry._entries[1].data is None


def test_where_no_thread_can_be_started_the_answer_is_no(monkeypatch: pytest.MonkeyPatch) -> None:
    driver, held = Driver(), Map()
    registry = driver.registry()
    without_threads(monkeypatch)
    assert not allowed(registry, held)
    assert registry._entries[0].allowed is False
    assert driver.registered == []
