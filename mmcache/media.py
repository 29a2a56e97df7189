"""Content digests of media: of an encoded file's bytes, and of decoded samples.

The two never agree for the same picture, on purpose: what decoded it is part of what the model saw. PURE: bytes in,
32 bytes out; nothing is opened, fetched or decoded here.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from mmcache.encoding import canonical, digest, exact_float, text_bytes
from mmcache.errors import KeyInputError, UsageError

SAMPLE_DTYPES: Final = (
    *("bool", "uint8", "uint16", "uint32", "uint64"),
    *("int8", "int16", "int32", "int64", "float16", "float32", "float64"),
)
_MODALITY: Final = re.compile(r"[a-z][a-z0-9_]{0,31}")


MODALITIES: Final = ("text", "image", "video", "audio")


@dataclass(frozen=True, slots=True)
class Media:
    """What a value was computed from, where it is known, for the server's metrics; it decides nothing.

    `modality` is "text", "image", "video" or "audio"; `pixels` of an image, `frames` of a video, `audio_s` of a sound
    are what need not be encoded again when the value is found. Raises UsageError for anything else.
    """

    modality: str
    pixels: int = 0
    frames: int = 0
    audio_s: float = 0.0

    def __post_init__(self) -> None:
        if self.modality not in MODALITIES:
            raise UsageError(f"modality {self.modality!r} is unknown; give one of {', '.join(MODALITIES)}")
        if not (self.pixels >= 0 and self.frames >= 0 and 0 <= self.audio_s < 1e9):
            raise UsageError(f"{self} is no amount of media; give numbers that are not negative")

    @property
    def code(self) -> int:
        """The number of the modality in the schema."""
        return MODALITIES.index(self.modality) + 1

    @property
    def units(self) -> int:
        """Pixels, frames or milliseconds, as the modality has it, at most 2^32 - 1."""
        amounts = {"image": self.pixels, "video": self.frames, "audio": round(1000 * self.audio_s)}
        return min(int(amounts.get(self.modality, 0)), 0xFFFFFFFF)


def media_digest(data: bytes | bytearray | memoryview, modality: str) -> bytes:
    """32 bytes that identify an encoded medium (a JPEG, an MP4, a prompt in UTF-8) by its bytes and modality.

    `data` is anything with the buffer protocol, contiguous; it is read, never copied. `modality` is a lower-case word:
    "image", "video", "audio", "text". Raises KeyInputError for a path, an array of samples or a malformed modality.
    """
    if isinstance(data, (str, np.ndarray)):
        remedy = "open(path, 'rb').read()" if isinstance(data, str) else "samples_digest for decoded samples"
        raise KeyInputError(f"data: {type(data).__name__} is not the bytes of an encoded file; use {remedy}")
    try:
        view = memoryview(data)
        content = view.cast("B") if view.nbytes else b""
    except (TypeError, ValueError, BufferError) as error:
        raise KeyInputError(f"data: {error}; pass the encoded file's bytes") from None
    return digest("k1.media", _modality_bytes(modality), content)


def samples_digest(
    samples: npt.NDArray[Any], modality: str, mode: str, sample_rate: int | float | None = None
) -> bytes:
    """32 bytes that identify decoded samples: modality, mode, dtype, shape, sample rate, and the samples in C order.

    `mode` says what the numbers mean ("RGB", "BGR", "L", "mono", "stereo"), exactly as written. `sample_rate` is in
    Hz, and must be given for audio. Byte order and strides do not matter. Raises KeyInputError for another dtype than
    bool, (u)int8..64 and float16..64, or something that is no ndarray (its mode or layout would be guessed).
    """
    if not isinstance(samples, np.ndarray):
        found = type(samples).__name__
        raise KeyInputError(f"samples: {found} is no ndarray; convert it with numpy.asarray and say its mode")
    if isinstance(samples, np.ma.MaskedArray):
        raise KeyInputError("samples: a masked array's mask would be lost; pass samples.filled(value)")
    if samples.dtype.name not in SAMPLE_DTYPES:
        wanted = ", ".join(SAMPLE_DTYPES)
        raise KeyInputError(f"samples: dtype {samples.dtype} is none of {wanted}; convert it, or .view() its bits")
    if not isinstance(mode, str) or not mode:
        raise KeyInputError('mode: expected what the samples mean, such as "RGB" or "BGR"; the same bytes differ by it')
    if sample_rate is None and modality == "audio":
        raise KeyInputError("sample_rate is missing: the same samples at another rate are another sound; pass it in Hz")
    rate = None if sample_rate is None else _hertz(sample_rate)
    little = np.ascontiguousarray(samples, dtype=samples.dtype.newbyteorder("<"))
    return digest(
        "k1.samples",
        _modality_bytes(modality),
        text_bytes(mode, "mode"),
        samples.dtype.name.encode(),
        struct.pack(f"<{samples.ndim}Q", *samples.shape),
        canonical(rate, "sample_rate"),
        little.reshape(-1).view(np.uint8).data,
    )


def _hertz(rate: object) -> float:
    number = exact_float(rate, "sample_rate") if isinstance(rate, (int, float)) else 0.0
    if isinstance(rate, bool) or not number > 0:
        raise KeyInputError(f"sample_rate={rate!r} is no positive number; pass it in Hz")
    return number


def _modality_bytes(modality: object) -> bytes:
    if not isinstance(modality, str) or not _MODALITY.fullmatch(modality):
        raise KeyInputError(f'modality={modality!r} is no lower-case word; pass "image", "video", "audio" or "text"')
    return modality.encode()
