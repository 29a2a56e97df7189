"""Content digests: what they depend on, what they must not depend on, and what they refuse."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmcache.errors import KeyInputError
from mmcache.media import SAMPLE_DTYPES, media_digest, samples_digest

PICTURE = np.arange(2 * 4 * 3, dtype=np.uint8).reshape(2, 4, 3)


@given(st.binary(max_size=64), st.binary(max_size=64))
def test_a_file_is_its_bytes_and_modality(left: bytes, right: bytes) -> None:
    assert (media_digest(left, "image") == media_digest(right, "image")) == (left == right)
    assert media_digest(left, "image") != media_digest(left, "video")
    assert len(media_digest(left, "image")) == 32


def test_any_buffer_of_the_same_bytes_is_the_same_file(tmp_path: Path) -> None:
    data = bytes(range(256)) * 40
    path = tmp_path / "file"
    path.write_bytes(data)
    wanted = media_digest(data, "audio")
    assert media_digest(bytearray(data), "audio") == wanted
    assert media_digest(memoryview(b"x" + data)[1:], "audio") == wanted
    assert media_digest(memoryview(data).cast("I"), "audio") == wanted
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert media_digest(mapped, "audio") == wanted  # type: ignore[arg-type]
    assert media_digest(memoryview(bytearray()), "audio") == media_digest(b"", "audio")


def released() -> memoryview:
    view = memoryview(b"x")
    view.release()
    return view


@pytest.mark.parametrize(
    ("data", "modality", "complaint"),
    [
        ("photo.jpg", "image", r"str is not the bytes of an encoded file; use open"),
        (PICTURE, "image", "ndarray is not the bytes of an encoded file; use samples_digest"),
        (released(), "image", "data: .*released.*pass the encoded file's bytes"),
        (None, "image", "data: .*pass the encoded file's bytes"),
        (memoryview(b"abcdef")[::2], "image", "data: .*pass the encoded file's bytes"),
        (b"x", "Image", "modality='Image' is no lower-case word"),
        (b"x", "", "modality=''"),
        (b"x", "image ", "modality='image '"),
        (b"x", b"image", "modality=b'image'"),
        (b"x", None, "modality=None"),
    ],
)
def test_media_digest_refuses(data: Any, modality: Any, complaint: str) -> None:
    with pytest.raises(KeyInputError, match=complaint):
        media_digest(data, modality)


def test_everything_about_samples_is_in_their_digest() -> None:
    variants = [
        samples_digest(PICTURE, "image", "RGB"),
        samples_digest(PICTURE, "image", "BGR"),
        samples_digest(PICTURE, "image", "rgb"),
        samples_digest(PICTURE, "video", "RGB"),
        samples_digest(PICTURE, "image", "RGB", 1),
        samples_digest(PICTURE.reshape(4, 2, 3), "image", "RGB"),
        samples_digest(PICTURE.reshape(24), "image", "RGB"),
        samples_digest(PICTURE.reshape(1, 2, 4, 3), "image", "RGB"),
        samples_digest(PICTURE.view(np.int8), "image", "RGB"),
        samples_digest(PICTURE.astype(np.uint16), "image", "RGB"),
        samples_digest(PICTURE.astype(np.float32), "image", "RGB"),
        samples_digest(PICTURE[::-1], "image", "RGB"),
        samples_digest(PICTURE[:, ::-1], "image", "RGB"),
        samples_digest(PICTURE.transpose(1, 0, 2), "image", "RGB"),
        media_digest(PICTURE.tobytes(), "image"),
    ]
    assert len(set(variants)) == len(variants)


def test_a_single_sample_changes_the_digest() -> None:
    seen = {samples_digest(PICTURE, "image", "RGB")}
    for place in range(PICTURE.size):
        other = PICTURE.copy()
        other.flat[place] ^= 1
        seen.add(samples_digest(other, "image", "RGB"))
    assert len(seen) == PICTURE.size + 1


@pytest.mark.parametrize("dtype", SAMPLE_DTYPES)
def test_strides_and_byte_order_do_not_matter(dtype: str) -> None:
    samples = PICTURE.astype(dtype)
    wanted = samples_digest(samples, "image", "RGB")
    assert samples_digest(np.asfortranarray(samples), "image", "RGB") == wanted
    assert samples_digest(samples[:, ::-1][:, ::-1], "image", "RGB") == wanted
    assert samples_digest(samples.astype(samples.dtype.newbyteorder(">")), "image", "RGB") == wanted


def test_a_whole_sample_rate_may_be_written_as_int_or_float() -> None:
    samples = np.zeros(8, np.float32)
    assert samples_digest(samples, "audio", "mono", 16000) == samples_digest(samples, "audio", "mono", 16000.0)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), ()])
def test_samples_of_any_shape_have_a_digest(shape: tuple[int, ...]) -> None:
    samples = np.zeros(shape, np.uint8)
    assert samples_digest(samples, "image", "L") != samples_digest(samples[None], "image", "L")


@pytest.mark.parametrize(
    ("samples", "mode", "rate", "complaint"),
    [
        ([[1, 2]], "L", 1, "samples: list is no ndarray"),
        (np.array([None]), "L", 1, "dtype object is none of bool, uint8"),
        (np.zeros(2, "c16"), "L", 1, "dtype complex128 is none of"),
        (np.zeros(2, "datetime64[s]"), "L", 1, "dtype datetime64"),
        (np.zeros(2, [("r", "u1")]), "L", 1, "is none of"),
        (np.zeros(2), "", 1, "mode: expected"),
        (np.zeros(2), None, 1, "mode: expected"),
        (np.zeros(2), "mono", None, "sample_rate is missing"),
        (np.zeros(2), "mono", 0, "sample_rate=0 is no positive number"),
        (np.zeros(2), "mono", True, "sample_rate=True"),
        (np.zeros(2), "mono", "16000", "sample_rate='16000'"),
        (np.zeros(2), "mono", -(10**400), "sample_rate: the number does not fit a 64-bit float"),
        (np.zeros(2), "mono", float("inf"), "sample_rate: inf is not finite"),
        (np.zeros(2), "mono", float("nan"), "sample_rate=nan"),
    ],
)
def test_samples_digest_refuses(samples: Any, mode: Any, rate: Any, complaint: str) -> None:
    with pytest.raises(KeyInputError, match=complaint):
        samples_digest(samples, "audio", mode, rate)
