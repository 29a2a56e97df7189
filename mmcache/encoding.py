"""The bytes a key is hashed from: length framing, the canonical encoding of plain values, and BLAKE3-256 over both.

docs/keys.md is the specification; this file is its only implementation. Nothing here knows what a key is for.
PURE: values in, bytes out. No `hash()`, no pickle, no digest shorter than 32 bytes.
"""

from __future__ import annotations

import math
import operator
import struct
from collections.abc import Mapping
from typing import Any, Final

from blake3 import blake3

from mmcache.errors import KeyInputError

DIGEST_NBYTES: Final = 32
MAX_DEPTH: Final = 32
MAX_ENCODED_NBYTES: Final = 4 << 20
INT_MIN: Final = -(1 << 63)
INT_MAX: Final = (1 << 64) - 1

_NULL, _FALSE, _TRUE, _INT, _FLOAT, _STR, _BYTES, _LIST, _MAP = (bytes([tag]) for tag in range(9))
_U64: Final = struct.Struct("<Q")
_F64: Final = struct.Struct("<d")


def framed(field: bytes) -> bytes:
    """The field behind its length: u64 little-endian, then the bytes."""
    return _U64.pack(len(field)) + field


def digest(domain: str, *fields: bytes | memoryview) -> bytes:
    """BLAKE3-256 over the framed domain and then each framed field; fields may be large, they are not copied."""
    hasher = blake3(framed(domain.encode()))
    for field in fields:
        hasher.update(_U64.pack(len(field)))
        hasher.update(field)
    return hasher.digest()


def text_bytes(value: str, path: str) -> bytes:
    """UTF-8 of the text as it is (no normalisation, no case folding); a lone surrogate raises KeyInputError."""
    try:
        return value.encode("utf-8")
    except UnicodeEncodeError:
        raise KeyInputError(f"{path}: text holds a lone surrogate, which has no UTF-8 form; repair it first") from None


def check_digest(value: object, path: str) -> bytes:
    """The value itself if it is exactly 32 bytes; a shorter one (a truncated hash) or another type raises."""
    if not isinstance(value, bytes) or len(value) != DIGEST_NBYTES:
        found = f"{len(value)} bytes" if isinstance(value, bytes) else f"object of type {type(value).__name__}"
        raise KeyInputError(f"{path}: a digest is exactly {DIGEST_NBYTES} bytes, got {found}; pass it whole")
    return value


def exact_float(value: Any, path: str) -> float:
    """The number as a float, if a float holds it exactly: two numbers must not become one. Raises KeyInputError."""
    try:
        number = float(value)
    except OverflowError:
        number = math.nan
    if number != value and value == value:  # NaN is the caller's to refuse
        raise KeyInputError(f"{path}: the number does not fit a 64-bit float exactly; round it first")
    return number


def check_count(value: object, path: str, *, minimum: int = 0) -> int:
    """The value as an int in minimum .. 2^63 - 1; bool, float and anything without `__index__` raise KeyInputError."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise KeyInputError(f"{path}: expected an integer, got object of type {type(value).__name__}; pass a plain int")
    if not minimum <= number < 1 << 63:
        found = number if number.bit_length() <= 64 else f"an integer of {number.bit_length()} bits"
        raise KeyInputError(f"{path}: {found} is outside {minimum} .. 2^63 - 1; check how it was computed")
    return number


def canonical(value: object, path: str) -> bytes:
    """The one encoding of a plain value: None, bool, int, float, str, bytes, list or tuple, and mapping with str keys.

    Two values encode alike only if they are equal and of the same kind (1, 1.0 and True are three values; a tuple is a
    list). Mapping order does not matter. NaN, infinities, ints outside -2^63 .. 2^64-1, more than 32 levels, more than
    4 MiB, and every other type raise KeyInputError naming `path` and the place inside the value.
    """
    pieces: list[bytes] = []
    _encode(value, path, 0, pieces, [MAX_ENCODED_NBYTES])
    return b"".join(pieces)


def _encode(value: object, path: str, depth: int, out: list[bytes], room: list[int]) -> None:
    if depth > MAX_DEPTH:
        raise KeyInputError(f"{path}: nested more than {MAX_DEPTH} levels deep; flatten it, or pass a digest of it")
    if isinstance(value, (Mapping, list, tuple)):
        _emit(_MAP if isinstance(value, Mapping) else _LIST, _U64.pack(len(value)), path, out, room)
        if isinstance(value, Mapping):
            _encode_items(value, path, depth, out, room)
        else:
            for place, item in enumerate(value):
                _encode(item, f"{path}[{place}]", depth + 1, out, room)
    else:
        _emit(*_scalar(value, path), path, out, room)


def _encode_items(value: Mapping[object, object], path: str, depth: int, out: list[bytes], room: list[int]) -> None:
    entries: dict[bytes, tuple[str, object]] = {}
    for name, item in value.items():
        if not isinstance(name, str):
            raise KeyInputError(f"{path}: key of type {type(name).__name__}; every key must be a str, convert it first")
        entries[text_bytes(name, path)] = (name, item)
    for encoded, (name, item) in sorted(entries.items()):
        _emit(framed(encoded), b"", path, out, room)
        _encode(item, f"{path}.{name}", depth + 1, out, room)


def _scalar(value: object, path: str) -> tuple[bytes, bytes]:
    if value is None:
        return _NULL, b""
    if isinstance(value, bool):
        return (_TRUE if value else _FALSE), b""
    if isinstance(value, int):
        if not INT_MIN <= value <= INT_MAX:
            raise KeyInputError(f"{path}: integer outside -2^63 .. 2^64-1; pass it as str or bytes")
        return _INT, framed(b"%d" % value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise KeyInputError(f"{path}: {value!r} is not finite and has no one encoding; pass None or a str")
        return _FLOAT, _F64.pack(value)
    if isinstance(value, str):
        return _STR, framed(text_bytes(value, path))
    if isinstance(value, bytes):
        return _BYTES, framed(value)
    raise KeyInputError(
        f"{path}: object of type {type(value).__name__} cannot be part of a key; pass None, bool, int, float, "
        "str, bytes, a list or a mapping of these (for an array or tensor: .tolist(), or a digest of its bytes)"
    )


def _emit(tag: bytes, body: bytes, path: str, out: list[bytes], room: list[int]) -> None:
    room[0] -= len(tag) + len(body)
    if room[0] < 0:
        raise KeyInputError(f"{path}: encodes to more than {MAX_ENCODED_NBYTES} bytes; pass a digest of it instead")
    out += (tag, body)
