"""Counting a message's fields before it is parsed: what is counted, and that nothing malformed passes or takes long."""

from __future__ import annotations

import contextlib

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from mmcache.pb import cache_pb2 as pb
from mmcache.server.weigh import Malformed, count_fields

PUT = pb.PutRequest.DESCRIPTOR
ENDLESS = 1 << 40


def count(message: pb.PutRequest) -> int:
    return count_fields(message.SerializeToString(), PUT, ENDLESS)


def test_fields_elements_and_messages_are_counted() -> None:
    assert count(pb.PutRequest()) == 0
    assert count(pb.PutRequest(kind="kv", namespace=bytes(32))) == 2
    assert count(pb.PutRequest(facts={"model": "m"})) == 3  # the entry, its key and its value
    tensor = pb.Tensor(name="x", shape=[1, 2, 300], data=bytes(1 << 20))
    assert count(pb.PutRequest(entries=[pb.PutEntry(key=b"k", tensors=[tensor])])) == 1 + 1 + 1 + 3 + 4


def test_counting_ends_past_the_limit() -> None:
    many = pb.PutRequest(entries=[pb.PutEntry()] * 1000).SerializeToString()
    assert count_fields(many, PUT, 10) == 11


@pytest.mark.parametrize(
    "body",
    [
        b"\x0a",
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        b"\x0a\x05ab",
        b"\x0b",
        b"\x0c",
        b"\x08",
        b"\xff" * 20,
        b"\x22\x02\x0a\x05",
        b"\x0d\x01",
    ],
    ids=bytes.hex,
)
def test_what_is_cut_off_or_of_another_kind_is_malformed(body: bytes) -> None:
    with pytest.raises(Malformed):
        count_fields(body, PUT, ENDLESS)


@given(st.binary(max_size=200))
def test_whatever_parses_is_counted(body: bytes) -> None:
    """Only groups, which the schema has none of, parse and are malformed here."""
    with contextlib.suppress(DecodeError):
        pb.PutRequest.FromString(body)
        with contextlib.suppress(Malformed):
            assert count_fields(body, PUT, ENDLESS) >= 0
            return
        assert any(byte & 7 in (3, 4) for byte in body)
