"""Which server memory a device may read: asked once, in the background, kept mapped, given up when nobody maps it."""

from __future__ import annotations

import gc
import threading
from typing import Any

import numpy as np
import pytest

torch: Any = pytest.importorskip("torch")

from mmcache.testing.values import PATIENCE_S, eventually  # noqa: E402
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
        assert self.go.wait(PATIENCE_S)
        assert nbytes == 64
        self.registered.append(place)
        return self.answer

    def unregister(self, place: int, device: Any) -> str:
        self.unregistered.append(place)
        return self.parting

    def registry(self) -> Registry:
        return Registry(self.register, self.unregister)


def allowed(registry: Registry, held: Map) -> bool:
    with registry.reading(held, CPU) as readable:
        return readable


def test_the_answer_is_no_until_the_driver_has_given_one_and_nobody_waits_for_it() -> None:
    driver, held = Driver(), Map()
    driver.go.clear()
    registry = driver.registry()
    assert [allowed(registry, held) for _ in range(3)] == [False] * 3
    driver.go.set()
    eventually(lambda: allowed(registry, held), "it may be read")
    assert driver.registered == [held.data.ctypes.data]


def test_many_threads_ask_the_driver_once() -> None:
    driver, held = Driver(), Map()
    registry, answers = driver.registry(), []
    threads = [threading.Thread(target=lambda: answers.append(allowed(registry, held))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    eventually(lambda: allowed(registry, held), "it may be read")
    assert len(answers) == 8
    assert len(driver.registered) == 1


def test_a_refusal_is_said_once_and_stays(caplog: pytest.LogCaptureFixture) -> None:
    driver, held = Driver("no such call"), Map()
    registry = driver.registry()
    allowed(registry, held)
    eventually(lambda: "no such call" in caplog.text, "the refusal is said")
    assert not allowed(registry, held)
    assert len(driver.registered) == 1
    assert sum("no such call" in record.getMessage() for record in caplog.records) == 1


def test_memory_is_given_up_when_its_client_is_gone_but_not_while_it_is_read() -> None:
    driver, held = Driver(), [Map()]
    registry = driver.registry()
    eventually(lambda: allowed(registry, held[0]), "it may be read")
    place = held[0].data.ctypes.data
    with registry.reading(held[0], CPU) as readable:
        assert readable
        held.clear()
        gc.collect()
        others = [Map() for _ in range(50)]  # a restarted server's memory may be mapped anywhere but there
        assert place not in [other.data.ctypes.data for other in others]
        eventually(lambda: allowed(registry, others[0]), "the other may be read")
        assert driver.unregistered == []
    eventually(lambda: driver.unregistered == [place], "it is given up")
    eventually(lambda: len(registry._entries) == 1, "its entry is gone")
    assert allowed(registry, others[0])


def test_what_the_driver_does_not_let_go_stays_mapped_and_what_it_never_took_does_not() -> None:
    driver, held = Driver(parting="busy"), [Map()]
    registry = driver.registry()
    eventually(lambda: allowed(registry, held[0]), "it may be read")
    place = held[0].data.ctypes.data
    held.clear()
    gc.collect()
    eventually(lambda: driver.unregistered == [place], "it is given up")
    assert registry._entries[0].data.ctypes.data == place
    driver.answer = "no"
    refused = Map()
    assert not allowed(registry, refused)
    eventually(lambda: registry._entries[1].allowed is False, "it is refused")
    assert registry._entries[1].data is None


def test_where_no_thread_can_be_started_the_answer_is_no(monkeypatch: pytest.MonkeyPatch) -> None:
    driver, held = Driver(), Map()
    registry = driver.registry()
    without_threads(monkeypatch)
    assert not allowed(registry, held)
    assert registry._entries[0].allowed is False
    assert driver.registered == []
