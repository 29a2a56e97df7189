"""Many headers at once: accepted together exactly where each is accepted by itself, in whatever they are damaged."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from mmcache.errors import FrameError
from mmcache.frame import FrameMeta, Kind, TensorSpec, check_expected, header_checksum, pack_header, parse_header
from mmcache.frame_run import checksums_of, parse_run
from mmcache.tensors import named_tensors
from mmcache.transport.base import Found
from mmcache.transport.planned import RUN_FRAMES, RUN_NBYTES, Planned, plan_frames

COUNT = 9
SPECS = [TensorSpec("k", "bfloat16", (2, 3)), TensorSpec("scale", "float32", (5,))]


def header(row: int, specs: Sequence[TensorSpec] = SPECS, alignment: int = 64, writer: str = "w") -> bytes:
    """A header that differs from the next row's in all that may differ."""
    key, parent, home = (bytes([row, what]) * 16 for what in range(3))
    meta = FrameMeta(Kind.KV, key, b"n" * 32, parent, home, row, 1000 + row, row and 9_000 + row, writer)
    return pack_header(meta, specs, [bytes([row + 1, which]) * 8 for which in range(len(specs))], alignment)


def parsed(rows: NDArray[np.uint8], sums: bytes, keys: bytes, nbytes: int) -> bool:
    """Whether each header is right by itself."""
    try:
        for at, row in enumerate(rows):
            checksum = sums[16 * at : 16 * at + 16]
            one = parse_header(row.tobytes(), limit_nbytes=nbytes, checksum=checksum)
            check_expected(one, nbytes, rows.shape[1], keys[32 * at : 32 * at + 32])
    except FrameError:
        return False
    return True


def columns(headers: Sequence[bytes]) -> tuple[NDArray[np.uint8], bytes, bytes, int]:
    """(rows, checksums, keys, the size of a frame) as a client has them."""
    rows = np.frombuffer(b"".join(headers), np.uint8).reshape(len(headers), -1).copy()
    found = [parse_header(one, limit_nbytes=1 << 40) for one in headers]
    sums = b"".join(one.checksum for one in found)
    return rows, sums, b"".join(one.meta.key for one in found), found[0].frame_nbytes


def test_headers_of_one_form_are_read_at_once() -> None:
    given = columns([header(row) for row in range(COUNT)])
    first = parse_run(*given)
    assert first == parse_header(header(0), limit_nbytes=1 << 40)
    for number in range(len(SPECS)):
        wanted = [parse_header(header(row), limit_nbytes=1 << 40).tensors[number].checksum for row in range(COUNT)]
        assert checksums_of(given[0], number) == wanted


@pytest.mark.parametrize("row", [0, 4, COUNT - 1])
def test_no_flipped_bit_is_accepted(row: int) -> None:
    rows, sums, keys, nbytes = columns([header(row) for row in range(COUNT)])
    for bit in range(8 * rows.shape[1]):
        rows[row, bit // 8] ^= 1 << bit % 8
        assert parse_run(rows, sums, keys, nbytes) is None, bit
        rows[row, bit // 8] ^= 1 << bit % 8
    assert parse_run(rows, sums, keys, nbytes) is not None


@pytest.mark.parametrize("row", [0, 4, COUNT - 1])
def test_forged_headers_with_right_checksums_are_accepted_only_if_each_is(row: int) -> None:
    """Whoever can write the arena can write a checksum too: what it covers must still make sense."""
    rows, sums, keys, nbytes = columns([header(row) for row in range(COUNT)])
    random, accepted = np.random.default_rng(row), 0
    for place in range(rows.shape[1]):
        forged, forged_sums = rows.copy(), bytearray(sums)
        forged[row, place] ^= random.integers(1, 256)
        forged[row, 32:48] = np.frombuffer(header_checksum(forged[row].tobytes()), np.uint8)
        forged_sums[16 * row : 16 * row + 16] = forged[row, 32:48].tobytes()
        found = parse_run(forged, bytes(forged_sums), keys, nbytes)
        assert found is None or parsed(forged, bytes(forged_sums), keys, nbytes), place
        accepted += found is not None
    assert accepted, "other times, parents and checksums are right"


@pytest.mark.parametrize(
    "odd",
    [
        header(4, [TensorSpec("k", "float16", (2, 3)), SPECS[1]]),
        header(4, [TensorSpec("k", "bfloat16", (3, 2)), SPECS[1]]),
        header(4, [TensorSpec("q", "bfloat16", (2, 3)), SPECS[1]]),
        header(4, writer="another"),
    ],
)
def test_headers_of_several_forms_are_left_to_be_read_one_by_one(odd: bytes) -> None:
    headers = [header(row) for row in range(COUNT)]
    headers[4] = odd
    given = columns(headers)
    assert parse_run(*given) is None
    assert parsed(*given)


def test_more_headers_than_are_read_at_once_are_read_one_by_one() -> None:
    key, wide = b"k" * 32, header(0, alignment=65536)
    one = np.frombuffer(wide, np.uint8)
    nbytes = parse_header(wide, limit_nbytes=1 << 40).frame_nbytes
    memory = np.zeros(len(wide) + nbytes, np.uint8)
    memory[: len(one)] = one
    count = RUN_NBYTES // len(wide) + 1
    found = [Found(0, nbytes, len(wide), parse_header(wide, limit_nbytes=1 << 40).checksum)] * count
    into = [named_tensors({"k": np.zeros(12, np.uint8), "scale": np.zeros(20, np.uint8)}, writable=True)] * count
    right, wrong = parse_header(wide, limit_nbytes=1 << 40).meta.key, key
    for some in (RUN_FRAMES - 1, RUN_FRAMES, count):
        plans = plan_frames(memory, found[:some], [right] * some, into[:some], True)
        assert all(isinstance(plan, Planned) and len(plan.moves) == 2 for plan in plans)
        plans = plan_frames(memory, found[:some], [*[right] * (some - 1), wrong], into[:some], True)
        assert [isinstance(plan, Planned) for plan in plans] == [True] * (some - 1) + [False]


def test_another_size_or_key_than_announced_is_not_accepted() -> None:
    rows, sums, keys, nbytes = columns([header(row) for row in range(COUNT)])
    assert parse_run(rows, sums, keys, nbytes + 1) is None
    assert parse_run(rows, sums, keys[32:] + keys[:32], nbytes) is None
    assert parse_run(rows, sums[16:] + sums[:16], keys, nbytes) is None
    wider = np.concatenate([rows, np.zeros((COUNT, 64), np.uint8)], axis=1)
    assert parse_run(wider, sums, keys, nbytes) is None


def test_headers_without_tensors_or_with_the_widest_alignment() -> None:
    for specs, alignment in (([], 64), (SPECS, 65536)):
        given = columns([header(row, specs, alignment) for row in range(COUNT)])
        assert parse_run(*given) is not None
