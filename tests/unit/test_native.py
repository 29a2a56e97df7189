"""The C extension beside what it replaces: the same bytes, the same sums, and nothing outside its targets."""

from __future__ import annotations

import sys
import threading
import time
import types
from typing import Any

import numpy as np
import pytest
import xxhash

from mmcache.testing.values import PATIENCE_S
from mmcache.transport import native
from mmcache.transport.base import HIT, Outcome, Result
from mmcache.transport.planned import Move, Planned
from mmcache.transport.shm import PARALLEL_NBYTES, STREAM_NBYTES, Copier

copy_hashed: Any = native.NATIVE.copy_hashed
if copy_hashed is None:
    pytest.skip(native.STATE, allow_module_level=True)
SIZES = [0, 1, 15, 63, 64, 65, 240, 241, 1000, 8191, 8192, 8193, 70_001, (1 << 20) + 17]


def digest(data: Any) -> bytes:
    return xxhash.xxh3_128_digest(np.ascontiguousarray(data).data)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("offset", [0, 1, 31, 63])
@pytest.mark.parametrize("threads", [1, 2, 3, 16])
def test_every_size_and_alignment_arrives_with_its_sum(stream: bool, offset: int, threads: int) -> None:
    random = np.random.default_rng(offset)
    sources = [random.integers(0, 256, nbytes + 3, dtype=np.uint8)[3:] for nbytes in SIZES]
    memories = [np.full(offset + nbytes + 70, 0x5A, np.uint8) for nbytes in SIZES]
    targets = [memory[offset : offset + nbytes] for memory, nbytes in zip(memories, SIZES, strict=True)]
    sums = copy_hashed(sources, targets, stream, threads)
    assert sums == b"".join(map(digest, sources))
    for source, target, memory in zip(sources, targets, memories, strict=True):
        assert np.array_equal(source, target)
        assert np.all(memory[:offset] == 0x5A)
        assert np.all(memory[offset + len(source) :] == 0x5A)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("rows", "nbytes"), [(1, 100), (24, 8192), (7, 1), (3, 20_001), (1000, 3), (0, 5), (5, 0)])
def test_rows_that_lie_apart_are_filled_and_what_lies_between_is_left_alone(
    rows: int, nbytes: int, stream: bool
) -> None:
    source = np.random.default_rng(rows).integers(0, 256, rows * nbytes, dtype=np.uint8)
    memory = np.full((rows, nbytes + 9), 0x5A, np.uint8)
    assert copy_hashed([source], [memory[:, 4 : 4 + nbytes]], stream, 1) == digest(source)
    assert np.array_equal(memory[:, 4 : 4 + nbytes].reshape(-1), source)
    assert np.all(memory[:, :4] == 0x5A)
    assert np.all(memory[:, 4 + nbytes :] == 0x5A)


def whole(source: Any, target: Any, stream: bool) -> bytes:
    return bytes(copy_hashed([source], [target], stream, 1))


def in_parts(source: Any, target: Any, stream: bool) -> bytes:
    hasher = native.NATIVE.hasher()
    for start in range(0, len(source), 99_991):
        hasher.copy(source[start : start + 99_991].data, target[start : start + 99_991].data, stream)
    return hasher.take()


@pytest.mark.parametrize("copy", [whole, in_parts])
@pytest.mark.parametrize("stream", [False, True])
def test_what_was_hashed_is_what_was_written_though_the_source_changes_meanwhile(copy: Any, stream: bool) -> None:
    source, target = np.zeros(32 << 20, np.uint8), np.empty(32 << 20, np.uint8)
    stop = threading.Event()

    def disturb() -> None:
        value = 0
        while not stop.is_set():
            value += 1
            source[:] = value % 256

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        mixed, rounds, give_up_s = False, 0, time.monotonic() + PATIENCE_S
        while rounds < 20 or not (mixed or time.monotonic() > give_up_s):  # the other thread may be kept from running
            assert copy(source, target, stream) == digest(target)
            mixed |= bool(np.any(target != target[0]))
            rounds += 1
    finally:
        stop.set()
        thread.join()
    assert mixed, "the source did not change while it was read: nothing was shown"


@pytest.mark.parametrize(
    ("sources", "targets", "error"),
    [
        ([b"abc"], [bytearray(4)], ValueError),
        ([b"abc"], [], ValueError),
        ([b"abc"], [b"abc"], BufferError),
        ([b"ab"], [np.zeros(1, np.uint16)], ValueError),
        ([b"abcd"], [np.zeros(8, np.uint8)[::2]], ValueError),
        ([b"abcd"], [np.zeros((2, 4), np.uint8)[:, ::2]], ValueError),
        ([b"abcdefgh"], [np.zeros((2, 2, 2), np.uint8)], ValueError),
        ([np.zeros((4, 4), np.uint8)[:, :2]], [bytearray(8)], (BufferError, ValueError)),
        ([1], [bytearray(1)], TypeError),
        (1, [], TypeError),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(sources: Any, targets: Any, error: Any) -> None:
    good = bytearray(3)
    with pytest.raises(error):
        copy_hashed([b"xyz", *sources] if isinstance(sources, list) else sources, [good, *targets], False, 2)
    assert good == bytearray(3)


@pytest.mark.parametrize("count", [0, 1, 2, 5, 16, 17, 100])
@pytest.mark.parametrize("threads", [1, 2, 7, 16])
def test_any_number_of_tensors_on_any_number_of_threads(count: int, threads: int) -> None:
    random = np.random.default_rng(count)
    for nbytes in (0, 1, 50_000):
        sources = [random.integers(0, 256, nbytes, dtype=np.uint8) for _ in range(count)]
        targets = [np.zeros(nbytes, np.uint8) for _ in range(count)]
        assert copy_hashed(sources, targets, True, threads) == b"".join(map(digest, sources))
        assert all(map(np.array_equal, sources, targets))


@pytest.mark.parametrize("threads", [-1, 0, 17, 1 << 30])
def test_a_number_of_threads_that_makes_no_sense_is_refused(threads: int) -> None:
    with pytest.raises(ValueError, match="threads"):
        copy_hashed([], [], False, threads)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("nbytes", [1000, STREAM_NBYTES // 4, PARALLEL_NBYTES // 3])
def test_a_copier_with_it_tells_each_bad_frame_apart(threads: int, nbytes: int) -> None:
    random = np.random.default_rng(1)
    plans: list[Planned | Result] = []
    for number in range(8):
        source = random.integers(0, 256, 6 * nbytes, dtype=np.uint8)
        target = np.zeros(6 * nbytes, np.uint8) if number % 2 else np.zeros((6, nbytes + 1), np.uint8)[:, 1:]
        plans.append(
            Planned([Move(source, target, digest(source)), Move(source[:0], target[:0], digest(source[:0]))], [])
        )
    plans[2] = Result(Outcome.MISMATCH, "of another shape")
    for bad in (0, 5):
        plan = plans[bad]
        assert isinstance(plan, Planned)
        plan.moves[0].source[bad * 100] ^= 1
    plan = plans[7]
    assert isinstance(plan, Planned)
    plans[7] = plan._replace(gaps=[np.ones(3, np.uint8)])
    outcomes = [result.outcome for result in Copier(threads, copy_hashed).copy(plans, verify=True)]
    wrong = {0: Outcome.CORRUPT, 2: Outcome.MISMATCH, 5: Outcome.CORRUPT, 7: Outcome.CORRUPT}
    assert outcomes == [wrong.get(number, HIT.outcome) for number in range(8)]
    for number in (1, 3, 4, 6):
        plan = plans[number]
        assert isinstance(plan, Planned)
        assert np.array_equal(plan.moves[0].source, plan.moves[0].target.reshape(-1))


def test_an_extension_of_another_abi_or_one_that_cannot_be_loaded_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    other = types.ModuleType("another_abi")
    other.ABI, other.copy_hashed = native.ABI + 1, copy_hashed  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "another_abi", other)
    found, why = native.load("another_abi")
    assert found is native.PYTHON
    assert "ABI" in why
    suffix = ".cpython-3" + str(sys.version_info.minor) + "-x86_64-linux-gnu.so"
    (tmp_path / f"of_another_python{suffix}").write_bytes(b"\x7fELF of another Python")
    monkeypatch.syspath_prepend(str(tmp_path))
    found, why = native.load("of_another_python")
    assert found is native.PYTHON
    assert "cannot be loaded" in why
    assert native.load("mmcache_native_that_is_not_there") == (native.PYTHON, "mmcache-native is not installed")
