"""Tensors in and out of frames: numpy, torch, labelled words and buffers, bit for bit; and destinations that fit."""

from __future__ import annotations

import array
import mmap
import re
from typing import Any

import numpy as np
import pytest
import xxhash

from mmcache.errors import TensorError
from mmcache.frame import DTYPES, NO_KEY, FrameHeader, FrameMeta, Kind, TensorSpec, pack_header, parse_header
from mmcache.tensors import (
    Labelled,
    Pieces,
    as_dtype,
    as_numpy,
    as_torch,
    check_count,
    destinations,
    host_tensor,
    named_tensors,
    specs_of,
)

try:
    import torch as installed_torch
except ImportError:
    torch: Any = None
else:
    torch = installed_torch

needs_torch = pytest.mark.skipif(torch is None, reason="torch is not installed")
RAW = sorted({"bfloat16", "float8_e4m3fn", "float8_e5m2"})
NATIVE = sorted(set(DTYPES) - set(RAW))
WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SHAPES = [(), (0,), (1,), (7,), (3, 5), (2, 0, 3), (1, 2, 1, 2, 1, 2, 1, 3)]


def every_bit_pattern(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Bytes with NaNs, infinities and negative zeros among them; for bool, zeros and ones."""
    spec = TensorSpec("", dtype, shape)
    if dtype == "bool":
        return bytes(i % 2 for i in range(spec.nbytes))
    return np.random.default_rng(spec.nbytes).bytes(spec.nbytes)


def header_of(**tensors: tuple[str, tuple[int, ...]]) -> FrameHeader:
    """A header as it would be read from a shard."""
    specs = [TensorSpec(name, dtype, shape) for name, (dtype, shape) in tensors.items()]
    meta = FrameMeta(Kind.KV, bytes(32), NO_KEY, NO_KEY, bytes(32), 0, 0, 0, "")
    return parse_header(pack_header(meta, specs, [bytes(16)] * len(specs)), limit_nbytes=1 << 30)


# ------------------------------------------------------------------------------------------ numpy
@pytest.mark.parametrize("dtype", NATIVE)
@pytest.mark.parametrize("shape", SHAPES)
def test_numpy_bit_for_bit(dtype: str, shape: tuple[int, ...]) -> None:
    data = every_bit_pattern(dtype, shape)
    source = np.frombuffer(data, dtype).reshape(shape)
    found = host_tensor(source)
    assert (found.dtype, found.shape, found.data.tobytes()) == (dtype, shape, data)
    back = as_numpy(TensorSpec("x", dtype, shape), found.data.data)
    assert (back.dtype, back.shape, back.tobytes()) == (source.dtype, shape, data)


def test_a_contiguous_array_is_not_copied() -> None:
    source = np.arange(12.0).reshape(3, 4)
    assert np.shares_memory(host_tensor(source).data, source)
    assert np.shares_memory(host_tensor(source[1:]).data, source)


@pytest.mark.parametrize(
    "view",
    [
        np.arange(24.0).reshape(4, 6)[:, ::2],
        np.arange(24.0).reshape(4, 6).T,
        np.asfortranarray(np.arange(24.0).reshape(4, 6)),
        np.arange(24.0)[::-1],
        np.broadcast_to(np.arange(3.0), (5, 3)),
        np.arange(24.0)[::5][:1],
    ],
)
def test_a_view_is_stored_as_its_elements_in_order(view: Any) -> None:
    found = host_tensor(view)
    assert found.shape == view.shape
    assert found.data.tobytes() == view.tobytes()


@pytest.mark.parametrize("dtype", [">f4", ">i8", "u2", "u4", "u8", "c8", "c16", "S3", "M8[s]", "f4,i4", "O", "V2"])
def test_other_numpy_dtypes_are_refused_with_the_remedy(dtype: str) -> None:
    with pytest.raises(TensorError, match=r"native-order .*float32.*as_dtype"):
        host_tensor(np.zeros(2, dtype))


def test_numpy_names_of_one_type_are_one_type() -> None:
    assert host_tensor(np.zeros(1, np.longlong)).dtype == "int64"
    assert host_tensor(np.zeros(1, np.dtype("i4", metadata={"a": 1}))).dtype == "int32"


def test_a_stored_array_is_read_only_exactly_if_its_bytes_are() -> None:
    spec = TensorSpec("x", "int16", (2,))
    assert not as_numpy(spec, memoryview(b"\1\0\2\0")).flags.writeable
    buffer = bytearray(4)
    as_numpy(spec, memoryview(buffer))[:] = [1, 2]
    assert buffer == b"\1\0\2\0"


# ------------------------------------------------------------------------------------------ labelled words
@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("shape", SHAPES)
def test_labelled_words_bit_for_bit(dtype: str, shape: tuple[int, ...]) -> None:
    data = every_bit_pattern(dtype, shape)
    words = np.frombuffer(data, WORDS[DTYPES[dtype][1]]).reshape(shape)
    found = host_tensor(as_dtype(words, dtype))
    assert (found.dtype, found.shape, found.data.tobytes()) == (dtype, shape, data)
    assert as_numpy(TensorSpec("x", dtype, shape), found.data.data).tobytes() == data


@pytest.mark.parametrize(
    ("words", "dtype"),
    [
        (np.zeros(2, np.uint8), "bfloat16"),
        (np.zeros(2, np.uint32), "bfloat16"),
        (np.zeros(2, np.uint16), "float8_e5m2"),
        (np.zeros(2, np.uint16), "bf16"),
        (np.zeros(2, ">u2"), "bfloat16"),
        (np.zeros(2, object), "int64"),
        ([1, 2], "bfloat16"),
    ],
)
def test_words_that_are_not_of_the_type_are_refused(words: Any, dtype: str) -> None:
    with pytest.raises(TensorError, match=r"native words of the same size|list is no ndarray of words"):
        as_dtype(words, dtype)


# ------------------------------------------------------------------------------------------ buffers
@pytest.mark.parametrize(
    "buffer",
    [b"abcd", bytearray(b"abcd"), memoryview(b"abcd"), memoryview(b"abcd").cast("H"), array.array("b", b"abcd")],
)
def test_a_buffer_is_its_bytes(buffer: Any) -> None:
    found = host_tensor(buffer)
    assert (found.dtype, found.shape, found.data.tobytes()) == ("uint8", (4,), b"abcd")


def test_buffers_of_any_shape_and_none() -> None:
    assert host_tensor(b"").shape == (0,)
    assert host_tensor(np.arange(6.0).reshape(2, 3).data).data.tobytes() == np.arange(6.0).tobytes()
    assert host_tensor(np.zeros((2, 0, 3)).data).shape == (0,)
    with mmap.mmap(-1, 4096) as mapped:
        assert host_tensor(mapped).shape == (4096,)


def test_a_buffer_that_is_not_contiguous_is_refused() -> None:
    with pytest.raises(TensorError, match="contiguous"):
        host_tensor(memoryview(b"abcdef")[::2])
    with pytest.raises(TensorError, match="contiguous"):
        host_tensor(np.asfortranarray(np.zeros((2, 3))).data)


@pytest.mark.parametrize("value", [None, 3, 2.5, "text", object(), {1, 2}, [1, 2], {"a": "b"}])
def test_what_is_no_tensor_is_refused(value: Any) -> None:
    with pytest.raises(TensorError, match="is not a tensor"):
        named_tensors(value)


# ------------------------------------------------------------------------------------------ several tensors of one key
def test_names_of_several_tensors() -> None:
    one, two = np.zeros(2), np.ones((1, 3), np.int8)
    assert list(named_tensors(one)) == ["0"]
    assert list(named_tensors([one, two])) == list(named_tensors((one, two))) == ["0", "1"]
    named = named_tensors({"keys": one, "values": two})
    assert specs_of(named) == [TensorSpec("keys", "float64", (2,)), TensorSpec("values", "int8", (1, 3))]
    assert named_tensors({}) == {}


def test_two_names_of_the_same_text_are_refused() -> None:
    with pytest.raises(TensorError, match="share a name"):
        named_tensors({1: np.zeros(2), "1": np.ones(2)})


def test_one_value_per_key() -> None:
    check_count([1, 2], [3, 4], "tensors")
    with pytest.raises(TensorError, match="2 keys but 1 tensors"):
        check_count([1, 2], [3], "tensors")


# ------------------------------------------------------------------------------------------ destinations
def fit(header: FrameHeader, buffers: Any) -> Any:
    return destinations(header, named_tensors(buffers, writable=True))


def test_destinations_come_in_stored_order() -> None:
    header = header_of(a=("float32", (2,)), b=("int8", (3,)))
    first, second = np.zeros(2, np.float32), np.zeros(3, np.int8)
    found = fit(header, {"b": second, "a": first})
    assert [np.shares_memory(data, wanted) for data, wanted in zip(found, (first, second), strict=True)] == [True, True]
    found[0][:] = 255
    assert np.isnan(first).all()


@pytest.mark.parametrize(
    "buffer", [np.zeros((2, 3), np.float32), bytearray(24), memoryview(bytearray(24)), np.zeros(24, np.uint8)]
)
def test_an_array_of_the_same_kind_or_bare_bytes_fit(buffer: Any) -> None:
    (found,) = fit(header_of(**{"0": ("float32", (2, 3))}), buffer)
    found[:] = 7
    assert bytes(memoryview(buffer).cast("B")) == b"\7" * 24


@pytest.mark.parametrize(
    ("buffers", "why"),
    [
        (np.zeros((3, 2), np.float32), r"stored float32\[2, 3\], destination float32\[3, 2\]"),
        (np.zeros(6, np.float32), r"destination float32\[6\]"),
        (np.zeros((2, 3), np.int32), r"destination int32\[2, 3\]"),
        (np.zeros((2, 3), np.float64), r"destination float64"),
        (np.zeros((4, 6), np.uint8), r"destination uint8\[4, 6\]"),
        (bytearray(23), r"destination bytes\[23\]"),
        (bytearray(25), r"destination bytes\[25\]"),
        ({"x": bytearray(24)}, "'0', which has no destination"),
        ([bytearray(24), bytearray(1)], "holds 1 tensors, 2 destinations"),
        ([], "holds 1 tensors, 0 destinations"),
    ],
)
def test_what_does_not_fit_is_told(buffers: Any, why: str) -> None:
    found = fit(header_of(**{"0": ("float32", (2, 3))}), buffers)
    assert isinstance(found, str)
    assert re.search(why, found)


@pytest.mark.parametrize(
    "buffer",
    [
        np.zeros((4, 6))[:, ::2],
        np.asfortranarray(np.zeros((2, 3))),
        np.frombuffer(bytes(8), np.float32),
        b"abcd",
        memoryview(b"abcd"),
        memoryview(bytearray(8))[::2],
        np.zeros(2, ">f4"),
        Pieces(np.zeros((2, 8), np.uint8)[:, ::2], "uint8", (8,)),
        Pieces(np.zeros(8, np.uint8), "uint8", (8,)),
        Pieces(np.zeros((2, 4), np.uint16), "uint16", (8,)),
        Pieces(np.broadcast_to(np.uint8(0), (2, 1)), "uint8", (2,)),
    ],
)
def test_what_can_never_be_filled_is_refused(buffer: Any) -> None:
    with pytest.raises(TensorError):
        host_tensor(buffer, writable=True)


def test_pieces_are_no_value_to_store() -> None:
    with pytest.raises(TensorError, match="destination only"):
        host_tensor(Pieces(np.zeros((2, 4), np.uint8), "uint8", (8,)))


@pytest.mark.parametrize("dtype", RAW)
def test_raw_words_are_filled_where_they_are_labelled(dtype: str) -> None:
    words = np.zeros((2, 3), WORDS[DTYPES[dtype][1]])
    (found,) = fit(header_of(**{"0": (dtype, (2, 3))}), as_dtype(words, dtype))
    found[:] = 255
    assert words.all()
    other = {"bfloat16": "float16"}.get(dtype, "int8")
    assert isinstance(fit(header_of(**{"0": (other, (2, 3))}), Labelled(words, dtype)), str)


def test_plain_words_take_what_numpy_has_no_type_for() -> None:
    for dtype in RAW:
        words = np.zeros((2, 3), WORDS[DTYPES[dtype][1]])
        (found,) = fit(header_of(**{"0": (dtype, (2, 3))}), words)
        found[:] = 255
        assert words.all()
        assert isinstance(fit(header_of(**{"0": (dtype, (3, 2))}), words), str)
    for dtype in ("float16", "int16"):
        assert isinstance(fit(header_of(**{"0": (dtype, (2, 3))}), np.zeros((2, 3), np.uint16)), str)


def test_masks_inside_labels_and_lists_are_not_dropped() -> None:
    masked = np.ma.masked_array(np.zeros(2, np.uint16), mask=[True, False])
    for value in (as_dtype(masked, "bfloat16"), [masked], {"x": masked}):
        with pytest.raises(TensorError, match=r"mask would be lost; pass array\.filled"):
            named_tensors(value)


# ------------------------------------------------------------------------------------------ torch
@needs_torch
@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("shape", SHAPES)
def test_torch_bit_for_bit(dtype: str, shape: tuple[int, ...]) -> None:
    data = bytearray(every_bit_pattern(dtype, shape))
    kind = getattr(torch, dtype)
    source = torch.frombuffer(data, dtype=kind).reshape(shape) if data else torch.empty(shape, dtype=kind)
    found = host_tensor(source)
    assert (found.dtype, found.shape, found.data.tobytes()) == (dtype, shape, bytes(data))
    back = as_torch(TensorSpec("x", dtype, shape), memoryview(bytearray(found.data)))
    assert (back.dtype, tuple(back.shape)) == (kind, shape)
    assert host_tensor(back).data.tobytes() == bytes(data)


@needs_torch
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_numpy_and_torch_read_each_others_bytes(dtype: str) -> None:
    data = every_bit_pattern(dtype, (4, 6))
    words = np.frombuffer(data, WORDS[DTYPES[dtype][1]]).reshape(4, 6)
    stored = host_tensor(as_dtype(words, dtype))
    target = torch.zeros((4, 6), dtype=getattr(torch, dtype))
    found = fit(header_of(**{"0": (dtype, (4, 6))}), target)
    found[0][:] = stored.data
    assert host_tensor(target).data.tobytes() == data
    assert specs_of({"x": host_tensor(target)}) == specs_of({"x": stored})


@needs_torch
def test_torch_views_are_stored_as_their_elements_in_order() -> None:
    base = torch.arange(24.0).reshape(4, 6)
    negated = torch.imag(torch.complex(torch.ones(1), torch.ones(1)).conj())
    assert negated.is_neg()
    for view in (base.T, base[:, ::2], base.expand(2, 4, 6), base[1:, :1], torch.arange(10.0)[::5][:1], negated):
        found = host_tensor(view)
        assert found.shape == tuple(view.shape)
        assert found.data.tobytes() == view.numpy(force=True).tobytes()


@needs_torch
def test_a_contiguous_torch_tensor_is_not_copied_and_can_be_filled() -> None:
    target = torch.zeros((2, 3), requires_grad=True)
    host_tensor(target, writable=True).data[:] = 255
    assert target.isnan().all()
    strided = torch.arange(10.0)[::5][:1]
    assert strided.is_contiguous()
    host_tensor(strided, writable=True).data[:] = 255
    assert strided.isnan().all()
    assert np.shares_memory(host_tensor(target).data, target.detach().numpy())


@needs_torch
def test_torch_tensors_that_cannot_be_stored_or_filled_say_why() -> None:
    for value, message in (
        (torch.zeros(2, dtype=torch.complex64), "complex64 cannot be stored"),
        (torch.zeros(2, dtype=torch.uint16), "uint16 cannot be stored"),
        (torch.zeros(2, device="meta"), r"on meta.*\.cpu\(\)"),
        (torch.eye(2).to_sparse(), "sparse or nested"),
    ):
        with pytest.raises(TensorError, match=message):
            host_tensor(value)
    with pytest.raises(TensorError, match="contiguous"):
        host_tensor(torch.zeros(4, 6).T, writable=True)


@needs_torch
def test_a_stored_tensor_is_a_torch_view_without_a_copy() -> None:
    buffer = bytearray(8)
    view = as_torch(TensorSpec("x", "bfloat16", (2, 2)), memoryview(buffer))
    view.fill_(1)
    assert bytes(buffer) == b"\x80\x3f" * 4


def test_a_checksum_of_a_host_tensor_is_one_of_its_bytes() -> None:
    for value in (np.zeros((0, 3)), np.arange(6.0).reshape(2, 3).T, b"", b"abc"):
        found = host_tensor(value)
        assert xxhash.xxh3_128_digest(found.data.data) == xxhash.xxh3_128_digest(found.data.tobytes())
