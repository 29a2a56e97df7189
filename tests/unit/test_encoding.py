"""mmcache.encoding: one encoding for a value, none for what has no single one, and framing that is injective."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmcache.encoding import MAX_DEPTH, canonical, digest
from mmcache.errors import KeyInputError

plain_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


def decode(data: bytes) -> Any:
    """The value of a canonical encoding; asserts that nothing is left over."""
    value, rest = decode_one(data)
    assert not rest
    return value


def decode_one(data: bytes) -> tuple[Any, bytes]:
    tag, rest = data[0], data[1:]
    if tag < 3:
        return (None, False, True)[tag], rest
    if tag == 4:
        return struct.unpack("<d", rest[:8])[0], rest[8:]
    (length,) = struct.unpack("<Q", rest[:8])
    rest = rest[8:]
    if tag < 7:
        body = rest[:length]
        scalar: Any = int(body) if tag == 3 else body.decode() if tag == 5 else body
        return scalar, rest[length:]
    items: list[Any] = []
    for _ in range(length):
        name = ""
        if tag == 8:
            (size,) = struct.unpack("<Q", rest[:8])
            name, rest = rest[8 : 8 + size].decode(), rest[8 + size :]
        item, rest = decode_one(rest)
        items.append((name, item))
    return (dict(items) if tag == 8 else [item for _, item in items]), rest


@given(plain_values)
def test_canonical_encoding_decodes_to_the_value_so_no_two_values_share_one(value: Any) -> None:
    decoded = decode(canonical(value, "value"))
    assert decoded == value
    assert repr(decoded) == repr(value) or isinstance(value, dict | list)  # 1, 1.0 and True are told apart


@given(st.dictionaries(st.text(max_size=4), plain_values, max_size=6))
def test_canonical_encoding_ignores_the_order_of_a_mapping(value: dict[str, Any]) -> None:
    assert canonical(dict(reversed(value.items())), "value") == canonical(value, "value")


class Foo:
    """A type nobody can encode."""


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ({"size": {"x": Foo()}}, "value.size.x: object of type Foo cannot be part of a key"),
        ([1, {"a": [object]}], r"value\[1\].a\[0\]: object of type type"),
        ({"a": float("nan")}, "value.a: nan is not finite"),
        ([float("-inf")], r"value\[0\]: -inf is not finite"),
        ({1: 2}, "value: key of type int"),
        ({"a": {1, 2}}, "value.a: object of type set"),
        ({"a": np.zeros(2)}, "value.a: object of type ndarray .*tolist"),
        (np.int64(1), "value: object of type int64"),
        (1 << 64, "value: integer outside"),
        (-(1 << 63) - 1, "value: integer outside"),
        ([1 << 20_000], r"value\[0\]: integer outside"),
        ("\ud800", "value: text holds a lone surrogate"),
        ({"\ud800": 1}, "value: text holds a lone surrogate"),
        (bytearray(b"x"), "value: object of type bytearray"),
        (bytes(5 << 20), "value: encodes to more than"),
    ],
)
def test_canonical_encoding_refuses_and_names_the_place(value: Any, complaint: str) -> None:
    with pytest.raises(KeyInputError, match=complaint):
        canonical(value, "value")


def test_canonical_encoding_is_bounded_in_depth_and_in_work() -> None:
    nested: list[Any] = []
    for _ in range(MAX_DEPTH):
        nested = [nested]
    canonical(nested, "value")
    with pytest.raises(KeyInputError, match="levels deep"):
        canonical([nested], "value")
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(KeyInputError, match="levels deep"):
        canonical(loop, "value")
    wide: list[Any] = ["leaf"]
    for _ in range(30):
        wide = [wide, wide]  # 2^30 leaves
    with pytest.raises(KeyInputError, match="more than"):
        canonical(wide, "value")


@given(st.lists(st.binary(max_size=6), max_size=4), st.lists(st.binary(max_size=6), max_size=4))
def test_digest_fields_never_run_into_each_other(left: list[bytes], right: list[bytes]) -> None:
    assert (digest("d", *left) == digest("d", *right)) == (left == right)
    assert digest("d", *left) != digest("e", *left)
