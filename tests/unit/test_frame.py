"""The byte format with honest input: round trips, where things lie, copies, and a flipped bit anywhere."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

import mmcache.frame
from mmcache.errors import CorruptFrame, FrameError, KeyInputError, TensorError
from mmcache.frame import (
    DTYPES,
    ENTRY_NBYTES,
    MAX_FRAME_NBYTES,
    MAX_HEADER_NBYTES,
    MAX_TENSORS,
    NO_KEY,
    PREFIX_NBYTES,
    FrameMeta,
    Kind,
    TensorSpec,
    align_up,
    check_expected,
    frame_segments,
    header_nbytes_of,
    layout_of,
    pack_header,
    parse_header,
)
from mmcache.frame_view import Frame, FrameCheck
from mmcache.tensors import as_numpy

META = FrameMeta(Kind.KV, b"k" * 32, b"n" * 32, b"p" * 32, b"h" * 32, 7, 1_700_000_000_000, 0, "test/1")


class Tensor(NamedTuple):
    spec: TensorSpec
    payload: bytes


def tensor(name: str, dtype: str, *shape: int) -> Tensor:
    """A tensor whose bytes depend on its name and no two of which are alike."""
    spec = TensorSpec(name, dtype, shape)
    return Tensor(spec, np.random.default_rng(list(name.encode())).bytes(spec.nbytes))


def frame_of(tensors: list[Tensor], alignment: int = 64, meta: FrameMeta = META) -> bytearray:
    sums = [xxhash.xxh3_128_digest(payload) for _, payload in tensors]
    header = pack_header(meta, [spec for spec, _ in tensors], sums, alignment)
    return bytearray(b"".join(frame_segments(header, [memoryview(payload) for _, payload in tensors], alignment)))


def names() -> st.SearchStrategy[str]:
    text = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=56)
    return text.filter(lambda name: len(name.encode()) <= 56)


@st.composite
def tensors(draw: st.DrawFn) -> list[Tensor]:
    found = []
    for name in draw(st.lists(names(), max_size=5, unique=True)):
        shape = draw(st.lists(st.integers(0, 3), max_size=8))
        found.append(tensor(name, draw(st.sampled_from(sorted(DTYPES))), *shape))
    return found


def metas() -> st.SearchStrategy[FrameMeta]:
    u64 = st.integers(0, 2**64 - 1)
    digest = st.binary(min_size=32, max_size=32)
    writer = st.text(st.characters(min_codepoint=1, max_codepoint=127), max_size=24)
    return st.builds(FrameMeta, st.sampled_from(Kind), digest, digest, digest, digest, u64, u64, u64, writer)


alignments = st.sampled_from([64, 128, 512, 4096])


@given(tensors(), metas(), alignments)
def test_what_is_packed_is_parsed(given_tensors: list[Tensor], meta: FrameMeta, alignment: int) -> None:
    data = frame_of(given_tensors, alignment, meta)
    frame = Frame.parse(data)
    frame.verify()
    header = frame.header
    assert header.meta == meta
    assert header.alignment == alignment
    assert [stored.spec for stored in header.tensors] == [spec for spec, _ in given_tensors]
    assert [bytes(frame.payload(stored)) for stored in header.tensors] == [payload for _, payload in given_tensors]
    assert header.frame_nbytes == len(data)
    assert header_nbytes_of(bytes(data[:PREFIX_NBYTES]), len(data)) == header.header_nbytes
    assert parse_header(bytes(data[: header.header_nbytes]), limit_nbytes=len(data), checksum=header.checksum) == header
    check_expected(header, len(data), header.header_nbytes, meta.key)


@given(tensors(), alignments)
def test_every_tensor_lies_at_the_next_aligned_offset_after_zeros(given_tensors: list[Tensor], alignment: int) -> None:
    data = frame_of(given_tensors, alignment)
    header = Frame.parse(data).header
    end = PREFIX_NBYTES + ENTRY_NBYTES * len(given_tensors)
    assert header.header_nbytes == align_up(end, alignment)
    for stored in header.tensors:
        assert stored.offset % alignment == 0
        assert 0 <= stored.offset - end < alignment
        assert not any(data[end : stored.offset])
        end = stored.offset + stored.nbytes
    assert max(end, header.header_nbytes) == len(data)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (2, 0, 3), (1, 2, 1, 2, 1, 2, 1, 3)])
def test_every_dtype_and_shape_comes_back(dtype: str, shape: tuple[int, ...]) -> None:
    given_tensor = tensor("x", dtype, *shape)
    frame = Frame.parse(frame_of([given_tensor]))
    frame.verify()
    (stored,) = frame.header.tensors
    assert stored.spec == given_tensor.spec
    array = as_numpy(stored.spec, frame.payload(stored))
    assert (array.shape, array.itemsize) == (shape, DTYPES[dtype][1])
    assert array.tobytes() == given_tensor.payload


def test_a_frame_may_hold_no_tensor_and_as_many_as_the_limit() -> None:
    assert Frame.parse(frame_of([])).header.tensors == ()
    many = [tensor(f"layer.{i}", "uint8", i % 3) for i in range(MAX_TENSORS)]
    data = frame_of(many, 65536)
    frame = Frame.parse(data)
    frame.verify()
    assert frame.header.header_nbytes == MAX_HEADER_NBYTES
    assert [stored.spec for stored in frame.header.tensors] == [spec for spec, _ in many]


@pytest.mark.parametrize("buffer", [bytes, bytearray, memoryview])
def test_parse_never_copies_a_payload(buffer: Any) -> None:
    data = buffer(frame_of([tensor("a", "float32", 5), tensor("b", "int64", 3, 2)]))
    whole = np.frombuffer(data, np.uint8)
    frame = Frame.parse(data)
    for stored in frame.header.tensors:
        array = as_numpy(stored.spec, frame.payload(stored))
        assert array.ctypes.data == whole.ctypes.data + stored.offset
        assert np.shares_memory(array, whole)
        assert array.flags.writeable == whole.flags.writeable


def test_a_frame_at_the_start_of_a_longer_buffer_sees_only_itself() -> None:
    data = frame_of([tensor("a", "int16", 5)])
    frame = Frame.parse(data + b"\xff" * 300)
    assert bytes(frame.data) == data
    frame.verify()


# ------------------------------------------------------------------------------------------ a flipped bit anywhere
def verified(data: bytes | bytearray | memoryview) -> None:
    Frame.parse(data).verify()


def flipped(data: bytearray, positions: Iterator[tuple[int, int]]) -> list[tuple[int, int]]:
    """The (byte, bit) positions whose flip goes unnoticed."""
    unnoticed = []
    for position, bit in positions:
        data[position] ^= 1 << bit
        try:
            verified(data)
            unnoticed.append((position, bit))
        except FrameError:
            pass
        data[position] ^= 1 << bit
    verified(data)
    return unnoticed


SMALL = [tensor("a", "float32", 5), tensor("empty", "int8", 0), tensor("b", "bfloat16", 3, 3), tensor("c", "bool")]
PAGED = [tensor("a", "uint8", 4090), tensor("b", "float8_e5m2", 100)]


@pytest.mark.parametrize(("tensors", "alignment"), [(SMALL, 64), (SMALL[:1], 128), ([], 64)])
def test_every_flipped_bit_is_noticed(tensors: list[Tensor], alignment: int) -> None:
    data = frame_of(tensors, alignment)
    assert flipped(data, itertools.product(range(len(data)), range(8))) == []


def test_every_flipped_bit_of_header_and_padding_is_noticed_at_alignment_4096() -> None:
    data = frame_of(PAGED, 4096)
    first, second = Frame.parse(data).header.tensors
    payload = set(range(first.offset, first.offset + first.nbytes, 97)) | {first.offset + first.nbytes - 1}
    payload |= set(range(second.offset, len(data), 7))
    padding = range(first.offset + first.nbytes, second.offset)
    assert len(padding) == 6
    positions = sorted({*range(first.offset), *padding, *payload})
    assert flipped(data, itertools.product(positions, range(8))) == []


# ------------------------------------------------------------------------------------------ checked while it lands
def verdict_of_cuts(data: bytearray, cuts: list[int]) -> str | None:
    extent = memoryview(bytearray(len(data)))
    check = FrameCheck(extent)
    landed = 0
    for end in [*sorted(cut % (len(data) + 1) for cut in cuts), len(data)]:
        extent[landed:end] = data[landed:end]
        landed = end
        try:
            check.advance(landed)
        except FrameError as error:
            assert not check.done
            return str(error)
    assert check.done
    assert check.header == Frame.parse(data).header
    return None


def verdict(data: bytearray) -> str | None:
    try:
        verified(data)
    except FrameError as error:
        return str(error)
    return None


@given(tensors(), alignments, st.lists(st.integers(0, 2**20), max_size=12))
def test_a_frame_that_lands_in_any_cuts_is_done(given_tensors: list[Tensor], alignment: int, cuts: list[int]) -> None:
    data = frame_of(given_tensors, alignment)
    assert verdict_of_cuts(data, cuts) is None


@given(st.integers(0, 2**20), st.integers(1, 255), st.lists(st.integers(0, 2**20), max_size=12))
def test_landing_and_whole_frames_get_the_same_verdict(place: int, change: int, cuts: list[int]) -> None:
    data = frame_of(SMALL, 64)
    data[place % len(data)] ^= change
    assert verdict(data) is not None
    assert verdict_of_cuts(data, cuts) == verdict(data)


def test_a_frame_that_has_not_landed_whole_is_not_done() -> None:
    data = frame_of([tensor("a", "float32", 5), tensor("empty", "int8", 0)])
    check = FrameCheck(memoryview(data))
    for landed in range(len(data)):
        check.advance(landed)
        assert not check.done
    check.advance(len(data))
    assert check.done


def test_a_frame_must_fill_its_extent() -> None:
    data = frame_of([tensor("a", "float32", 5)])
    with pytest.raises(FrameError, match="its extent has"):
        FrameCheck(memoryview(data + b"\0")).advance(len(data) + 1)
    with pytest.raises(FrameError, match="too few"):
        FrameCheck(memoryview(data)[:255]).advance(255)


# ------------------------------------------------------------------------------------------ what cannot be packed
@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([TensorSpec("", "bool", ())], "1 to 56"),
        ([TensorSpec("x" * 57, "bool", ())], "1 to 56"),
        ([TensorSpec("\N{GRINNING FACE}" * 15, "bool", ())], "1 to 56"),
        ([TensorSpec("a\0b", "bool", ())], "without NUL"),
        ([TensorSpec("\ud800", "bool", ())], "UTF-8"),
        ([TensorSpec("a", "complex64", ())], "complex64"),
        ([TensorSpec("a", "bool", (1,) * 9)], "9 dimensions"),
        ([TensorSpec("a", "bool", ()), TensorSpec("a", "int8", ())], "share a name"),
        ([TensorSpec(str(i), "bool", ()) for i in range(1025)], "1025 tensors"),
        ([TensorSpec("a", "bool", (2**40,))], str(MAX_FRAME_NBYTES)),
        ([TensorSpec("a", "int64", (2**20, 0, 2**18))], "beyond"),
        ([TensorSpec("a", "int64", (-1, 0))], "beyond"),
    ],
)
def test_what_a_frame_cannot_express_is_refused(specs: list[TensorSpec], message: str) -> None:
    with pytest.raises(TensorError, match=message):
        pack_header(META, specs, [bytes(16)] * len(specs))


@pytest.mark.parametrize("alignment", [0, 1, 32, 63, 65, 96, 1 << 17, 1 << 31, -64])
def test_alignments_out_of_range_are_refused(alignment: int) -> None:
    with pytest.raises(TensorError, match="power of two from 64 to 65536"):
        layout_of([1], alignment)


@pytest.mark.parametrize("field", ["key", "namespace", "parent", "home"])
@pytest.mark.parametrize("nbytes", [0, 31, 33, 64])
def test_a_digest_of_another_length_is_refused_not_padded_or_cut(field: str, nbytes: int) -> None:
    short: dict[str, Any] = {field: bytes(nbytes)}
    changed = META._replace(**short)
    with pytest.raises(KeyInputError, match=f"{nbytes} bytes"):
        pack_header(changed, [], [])


@pytest.mark.parametrize(
    ("writer", "kept"), [("a\0b", "a?b"), ("\N{GRINNING FACE}", "?"), ("x" * 30, "x" * 24), ("", "")]
)
def test_a_writer_is_made_to_fit(writer: str, kept: str) -> None:
    assert Frame.parse(frame_of([], meta=META._replace(writer=writer))).header.meta.writer == kept


def test_largest_name_shape_and_numbers_fit() -> None:
    meta = FrameMeta(Kind.LATENT, b"\xff" * 32, NO_KEY, NO_KEY, b"\0" * 31 + b"\1", 2**64 - 1, 2**64 - 1, 2**64 - 1, "")
    data = frame_of([tensor("é" * 28, "float8_e4m3fn", 1, 1, 1, 1, 1, 1, 1, 2)], 65536, meta)
    header = Frame.parse(data).header
    assert header.meta == meta
    assert header.tensors[0].spec.name == "é" * 28


# ------------------------------------------------------------------------------------------ what was announced
def test_a_frame_of_another_key_or_size_is_not_the_expected_one() -> None:
    data = frame_of(SMALL)
    header = Frame.parse(data).header
    with pytest.raises(CorruptFrame, match="another key"):
        check_expected(header, len(data), header.header_nbytes, bytes(32))
    with pytest.raises(FrameError, match="announced"):
        check_expected(header, len(data) + 1, header.header_nbytes, None)
    with pytest.raises(FrameError, match="announced"):
        check_expected(header, len(data), header.header_nbytes + 64, None)


def test_a_sound_header_that_is_not_the_acquired_one_is_refused() -> None:
    data, other = frame_of(SMALL), frame_of(SMALL, meta=META._replace(created_ms=1))
    checksum = Frame.parse(other).header.checksum
    with pytest.raises(CorruptFrame):
        Frame.parse(data, checksum=checksum)
    assert Frame.parse(other, checksum=checksum).header.meta.created_ms == 1


class Changing:
    """Bytes under an expired lease: what was read once is something else the next time."""

    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, part: slice) -> bytes:
        found = bytes(self.data[part])
        self.data[part] = bytes(len(found))
        return found


def test_every_byte_of_a_header_is_read_once() -> None:
    data = frame_of(SMALL)
    changing: Any = Changing(bytes(data))
    assert parse_header(changing) == Frame.parse(data).header


def test_what_is_remembered_of_frames_is_bounded_though_strangers_choose_them() -> None:
    count = 6
    tracemalloc.start()
    try:
        for form in range(count):
            sizes = range(2000 * form + 1000, 2000 * form + 1000 + MAX_TENSORS)
            specs = [
                TensorSpec(f"{size}".ljust(56, "x"), "uint8", (0, size, size + 1, 2, 2, 2, 2, 2)) for size in sizes
            ]
            pack_header(META, specs, None)
            del specs
        kept = tracemalloc.get_traced_memory()[0] // count
    finally:
        tracemalloc.stop()
    most = max(int(one.cache_info().maxsize or 1 << 40) for one in (mmcache.frame._check_specs, mmcache.frame._table))
    assert kept > MAX_TENSORS * ENTRY_NBYTES
    assert kept * most < 128 << 20
