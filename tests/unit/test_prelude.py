"""The 24 bytes before every message: what they hold, and what is said to bytes that are not an mmcache message."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmcache.errors import ProtocolError
from mmcache.transport.base import MAX_BODY_NBYTES, PRELUDE_NBYTES, Op, is_http, pack_prelude, parse_prelude


@given(st.sampled_from(Op), st.integers(0, 2**32 - 1), st.integers(0, MAX_BODY_NBYTES), st.integers(0, 2**64 - 1))
def test_a_prelude_comes_back(op: Op, request_id: int, body_nbytes: int, payload_nbytes: int) -> None:
    packed = pack_prelude(op, request_id, body_nbytes, payload_nbytes)
    assert len(packed) == PRELUDE_NBYTES
    assert parse_prelude(packed, MAX_BODY_NBYTES) == (op, request_id, body_nbytes, payload_nbytes)


def test_the_bytes_of_a_prelude() -> None:
    expected = b"MMC1" + b"\x01" + b"\x04" + b"\0\0" + b"\x04\x03\x02\x01" + b"\x05\0\0\0" + b"\x06\0\0\0\0\0\0\x80"
    assert pack_prelude(Op.ACQUIRE, 0x01020304, 5, 6 + 2**63) == expected


GOOD = pack_prelude(Op.STAT, 1, 10)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"MMC2" + GOOD[4:], "is this an mmcache port"),
        (bytes(24), "is this an mmcache port"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(13), "is this an mmcache port"),
        (b"GET / HTTP/1.1\r\nHost: me\r\n", "not HTTP; use mmcache://HOST:PORT"),
        (b"POST /v1/chat HTTP/1.1\r\nx", "not HTTP"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "not HTTP"),
        (GOOD[:4] + b"\0" + GOOD[5:], "version 0 is not supported; this release reads 1"),
        (GOOD[:4] + b"\2" + GOOD[5:], "version 2"),
        (GOOD[:5] + b"\x13" + GOOD[6:], "operation 19"),
        (GOOD[:5] + b"\xff" + GOOD[6:], "operation 255"),
        (GOOD[:6] + b"\1\0" + GOOD[8:], "flags 1"),
        (GOOD[:6] + b"\0\x80" + GOOD[8:], "flags 32768"),
        (pack_prelude(Op.STAT, 1, 11), "11 bytes is over the limit of 10; send fewer keys"),
        (pack_prelude(Op.STAT, 1, 2**32 - 1), "over the limit"),
    ],
)
def test_a_bad_prelude_says_what_is_wrong(data: bytes, message: str) -> None:
    assert parse_prelude(GOOD, 10).body_nbytes == 10
    with pytest.raises(ProtocolError, match=message):
        parse_prelude(data[:24], 10)


@given(st.binary(min_size=24, max_size=24))
def test_any_24_bytes_are_a_prelude_or_a_protocol_error(data: bytes) -> None:
    for candidate in (data, GOOD[:4] + data[4:], GOOD[:8] + data[8:]):
        try:
            parsed = parse_prelude(candidate, MAX_BODY_NBYTES)
        except ProtocolError:
            continue
        assert pack_prelude(*parsed) == candidate


def test_http_is_told_apart() -> None:
    for start in (b"GET /", b"HEAD ", b"PUT /x", b"DELETE", b"OPTIONS", b"PATCH", b"CONNECT", b"TRACE"):
        assert is_http(start)
    assert not is_http(GOOD)
    assert not is_http(b"GE")
