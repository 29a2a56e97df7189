"""Frames copied into place part by part: what is hashed, where it is cut, and headers whose checksums come last."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from mmcache.errors import CorruptFrame, FrameError
from mmcache.frame import (
    NO_KEY,
    FrameMeta,
    Kind,
    TensorSpec,
    frame_segments,
    pack_header,
    parse_header,
    sealed,
    sum_of_sums,
)
from mmcache.frame_view import STREAM_NBYTES, Frame, FrameCheck
from mmcache.hashing import STEP_NBYTES, Hasher, PlainHasher
from mmcache.transport.native import NATIVE, PYTHON

HASHERS: list[Callable[[], Hasher]] = [PlainHasher, *([NATIVE.hasher] if NATIVE is not PYTHON else [])]
META = FrameMeta(Kind.KV, b"k" * 32, b"n" * 32, NO_KEY, b"h" * 32, 3, 1, 0, "test")
SIZES = st.lists(st.integers(0, 300), max_size=4)


def frame_of(sizes: list[int], *, sums: bool) -> tuple[bytes, list[bytes]]:
    """A frame of random tensors, with or without the checksums in its header, and those."""
    random = np.random.default_rng(sum(sizes))
    payloads = [random.integers(0, 256, nbytes, dtype=np.uint8).tobytes() for nbytes in sizes]
    specs = [TensorSpec(str(number), "uint8", (nbytes,)) for number, nbytes in enumerate(sizes)]
    digests = [xxhash.xxh3_128_digest(payload) for payload in payloads]
    header = pack_header(META, specs, digests if sums else None)
    return b"".join(frame_segments(header, [memoryview(payload) for payload in payloads], 64)), digests


def land(check: FrameCheck, frame: bytes, cuts: list[int]) -> None:
    places = [0, *sorted(cut % (len(frame) + 1) for cut in cuts), len(frame)]
    for start, stop in itertools.pairwise(places):
        check.copy(memoryview(frame)[start:stop])


@pytest.mark.parametrize("hasher", HASHERS)
@given(sizes=SIZES, cuts=st.lists(st.integers(0, 1 << 20), max_size=8))
def test_a_frame_copied_in_any_parts_is_checked_as_a_whole_one(
    hasher: Callable[[], Hasher], sizes: list[int], cuts: list[int]
) -> None:
    frame, _ = frame_of(sizes, sums=True)
    extent = memoryview(bytearray(len(frame)))
    check = FrameCheck(extent, hasher())
    land(check, frame, cuts)
    assert check.done
    assert extent == frame
    assert check.header == parse_header(frame)


@pytest.mark.parametrize("hasher", HASHERS)
@given(sizes=SIZES, cuts=st.lists(st.integers(0, 1 << 20), max_size=8), spoilt=st.integers(0, 1 << 20))
def test_a_changed_byte_is_found_wherever_it_is(
    hasher: Callable[[], Hasher], sizes: list[int], cuts: list[int], spoilt: int
) -> None:
    frame, _ = frame_of(sizes, sums=True)
    bad = bytearray(frame)
    bad[spoilt % len(bad)] ^= 1
    check = FrameCheck(memoryview(bytearray(len(frame))), hasher())
    with pytest.raises(FrameError):
        land(check, bytes(bad), cuts)
    assert not check.done


@pytest.mark.parametrize("hasher", HASHERS)
@given(sizes=SIZES, cuts=st.lists(st.integers(0, 1 << 20), max_size=8))
def test_a_header_whose_checksums_come_last_becomes_the_one_that_had_them_first(
    hasher: Callable[[], Hasher], sizes: list[int], cuts: list[int]
) -> None:
    frame, sums = frame_of(sizes, sums=False)
    extent = memoryview(bytearray(len(frame)))
    check = FrameCheck(extent, hasher(), sums_last=True)
    land(check, frame, cuts)
    assert not check.done
    for wrong in (bytes(16), sum_of_sums([*sums, bytes(16)])):
        with pytest.raises(CorruptFrame):
            check.seal(wrong)
    assert not check.done
    header = check.seal(sum_of_sums(sums))
    extent[: len(header)] = header
    assert check.done
    whole, _ = frame_of(sizes, sums=True)
    assert extent == whole
    assert check.header == parse_header(whole)
    Frame.parse(extent).verify()


def test_a_frame_that_is_not_complete_or_has_its_checksums_is_not_sealed() -> None:
    frame, sums = frame_of([5, 7], sums=False)
    check = FrameCheck(memoryview(bytearray(len(frame))), sums_last=True)
    check.copy(memoryview(frame)[:-1])
    with pytest.raises(FrameError):
        check.seal(sum_of_sums(sums))
    whole, sums = frame_of([5, 7], sums=True)
    check = FrameCheck(memoryview(bytearray(len(whole))))
    check.copy(memoryview(whole))
    with pytest.raises(FrameError):
        check.seal(sum_of_sums(sums))


def test_sealing_a_header_gives_what_packing_it_with_the_checksums_gives() -> None:
    specs = [TensorSpec("a", "float32", (2, 3)), TensorSpec("b", "uint8", ())]
    sums = [b"1" * 16, b"2" * 16]
    assert sealed(pack_header(META, specs, None), sums) == pack_header(META, specs, sums)


@pytest.mark.parametrize("hasher", HASHERS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_hasher_hashes_what_it_copies_and_what_it_is_shown(hasher: Callable[[], Hasher], stream: bool) -> None:
    one, random = hasher(), np.random.default_rng(0)
    sizes = [0, 1, 63, 64, 65, 4095, 4096, 4097, STREAM_NBYTES + 5, 3 * STEP_NBYTES + 1]
    parts = [random.integers(0, 256, nbytes, dtype=np.uint8) for nbytes in sizes]
    whole = xxhash.xxh3_128()
    for number, part in enumerate(parts):
        for offset in (0, 1, 64):
            memory = np.full(len(part) + 200, 0x5A, np.uint8)
            target = memory[offset : offset + len(part)]
            one.copy(part.data, target.data, stream)
            assert np.array_equal(part, target)
            assert np.all(memory[:offset] == 0x5A)
            assert np.all(memory[offset + len(part) :] == 0x5A)
            one.update(part.data)
            whole.update(part.data)
            whole.update(part.data)
        if number % 3 == 2:
            assert one.take() == whole.digest()
            whole.reset()
    assert one.take() == whole.digest()
    assert one.take() == xxhash.xxh3_128_digest(b"")


@pytest.mark.parametrize("hasher", HASHERS)
def test_a_copy_that_does_not_fit_is_refused(hasher: Callable[[], Hasher]) -> None:
    with pytest.raises((ValueError, TypeError)):
        hasher().copy(memoryview(b"abc"), memoryview(bytearray(4)), False)
    with pytest.raises((ValueError, TypeError, BufferError)):
        hasher().copy(memoryview(b"abc"), memoryview(b"xyz"), False)
