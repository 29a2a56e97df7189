"""Whatever a server says over gRPC, a client does not believe it: no wrong byte is a hit, and nothing is raised."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

import mmcache
from mmcache.client.blocking import Client
from mmcache.errors import TransportError
from mmcache.pb import cache_pb2 as pb
from mmcache.transport.base import Outcome
from tests.integration.rogue_rpc import LIMITS, STAT, Rogue, entry_of, rogue_server
from tests.integration.support import MiB, blanks, keys_of, values_of

NBYTES = 1000
KEYS = keys_of(2, "rogue")
VALUES = values_of(KEYS, NBYTES)


@pytest.fixture
def rogue() -> Iterator[Rogue]:
    with rogue_server() as running:
        running.answers["Recheck"] = pb.RecheckReply(dropped=b"\0")
        yield running


@pytest.fixture
def cache(rogue: Rogue) -> Iterator[Client]:
    with mmcache.connect(rogue.url) as client:
        yield client


def good(at: int = 1) -> pb.Entry:
    return entry_of(KEYS, at, VALUES[at])


def twice() -> list[pb.Tensor]:
    return [good(0).tensors[0]] * 2


CORRUPT: list[dict[str, Any]] = [
    {"key": KEYS.digests[1]},
    {"key": b""},
    {"key": b"short"},
    {"data": VALUES[0].tobytes()[:-1] + b"?"},
    {"data": VALUES[0].tobytes()[:-1]},
    {"data": VALUES[0].tobytes() + b"?"},
    {"data": b""},
    {"xxh3_128": b""},
    {"xxh3_128": bytes(16)},
    {"xxh3_128": bytes(17)},
    {"shape": (1 << 40,)},
    {"shape": ((1 << 64) - 1,) * 8},
    {"shape": (1,) * 9 + (NBYTES,)},
    {"shape": (127,) * 500_000},  # multiplied, these would hold the interpreter for longer than the deadline
    {"shape": (0, 1 << 60), "data": b"", "xxh3_128": xxhash.xxh3_128_digest(b"")},
    {"dtype": "complex64"},
    {"dtype": ""},
    {"name": ""},
    {"name": "x" * 57},
    {"kind": "picture"},
    {"namespace": b"short"},
    {"home": b""},
    {"parent": b"short"},
    {"tensors": twice()},
]


@pytest.mark.parametrize("fields", CORRUPT, ids=lambda fields: "+".join(fields))
def test_an_entry_that_cannot_be_right_is_corrupt_and_the_next_one_is_read(
    rogue: Rogue, cache: Client, fields: dict[str, Any]
) -> None:
    rogue.answers["Get"] = pb.GetReply(entries=[entry_of(KEYS, 0, VALUES[0], **fields), good()])
    buffers = blanks(2, NBYTES)
    bad, hit = cache.get_into(KEYS, buffers)
    assert bad.outcome is Outcome.CORRUPT
    assert bad.reason
    assert hit
    assert np.array_equal(buffers[1], VALUES[1])
    assert rogue.count("Recheck") == 1, "the server is told to look at its bytes"
    assert cache.counters["verify_failures"] == 1
    with cache.acquire(KEYS) as lease:
        assert lease.frames[1] is not None
        lease.frames[1].verify()
        if lease.frames[0] is not None:  # the header makes sense: the bytes are for verify to judge
            with pytest.raises(mmcache.errors.CorruptFrame):
                lease.frames[0].verify()


def test_without_verify_only_the_sums_and_the_key_are_believed(rogue: Rogue, cache: Client) -> None:
    wrong = VALUES[0] ^ 1
    rogue.answers["Get"] = pb.GetReply(
        entries=[
            entry_of(KEYS, 0, VALUES[0], data=wrong.tobytes()),
            entry_of(KEYS, 1, VALUES[1], shape=(1 << 40,)),
        ]
    )
    buffers = blanks(2, NBYTES)
    hit, bad = cache.get_into(KEYS, buffers, verify=False)
    assert hit
    assert np.array_equal(buffers[0], wrong)
    assert bad.outcome is Outcome.CORRUPT
    assert np.array_equal(buffers[1], blanks(1, NBYTES)[0])


OTHER: list[dict[str, Any]] = [{"dtype": "int8"}, {"shape": (10, 100)}, {"name": "other"}, {"tensors": []}]


@pytest.mark.parametrize("fields", OTHER, ids=lambda fields: "".join(fields))
def test_an_entry_of_another_form_is_a_mismatch_and_nothing_is_written(
    rogue: Rogue, cache: Client, fields: dict[str, Any]
) -> None:
    rogue.answers["Get"] = pb.GetReply(entries=[entry_of(KEYS, 0, VALUES[0], **fields)])
    into = np.zeros(NBYTES // 2, np.float16)
    (result,) = cache.get_into(KEYS[:1], [into])
    assert result.outcome is Outcome.MISMATCH
    assert not into.any()


def many_fields() -> bytes:
    return pb.GetReply(entries=[pb.Entry(tensors=[pb.Tensor()] * 70_000)]).SerializeToString()


REPLIES: dict[str, tuple[Any, Outcome]] = {
    "no message": (b"\xff" * 50, Outcome.UNAVAILABLE),
    "cut": (pb.GetReply(entries=[good(0)]).SerializeToString()[:-3], Outcome.UNAVAILABLE),
    "no entries": (pb.GetReply(), Outcome.UNAVAILABLE),
    "more entries": (pb.GetReply(entries=[good(0), good()]), Outcome.UNAVAILABLE),
    "never now": (pb.GetReply(entries=[pb.Entry(status=pb.LATER)]), Outcome.MISS),
    "another status": (pb.GetReply(entries=[pb.Entry(status=77)]), Outcome.MISS),  # type: ignore[arg-type]
    "more fields than are read": (many_fields(), Outcome.MISS),
}


@pytest.mark.parametrize("name", REPLIES)
def test_a_reply_that_makes_no_sense_is_no_hit(rogue: Rogue, cache: Client, name: str) -> None:
    rogue.answers["Get"], outcome = REPLIES[name]
    buffers = blanks(1, NBYTES)
    (result,) = cache.get_into(KEYS[:1], buffers)
    assert result.outcome is outcome
    assert result.reason or name == "another status"
    assert np.array_equal(buffers[0], blanks(1, NBYTES)[0])
    with cache.acquire(KEYS[:1]) as lease:
        assert lease.frames == [None]


def test_any_bytes_in_a_reply_end_in_outcomes_and_no_wrong_byte_is_a_hit(rogue: Rogue, cache: Client) -> None:
    sound = pb.GetReply(entries=[good(0), good()]).SerializeToString()
    seen: set[str] = set()

    @settings(max_examples=400)
    @given(
        st.lists(st.tuples(st.integers(0, 300) | st.integers(0, len(sound) - 1), st.integers(0, 255)), max_size=4),
        st.integers(0, 30) | st.integers(0, len(sound)),
        st.binary(max_size=8),
    )
    def try_one(edits: list[tuple[int, int]], cut: int, more: bytes) -> None:
        body = bytearray(sound)
        for at, byte in edits:
            body[at] = byte
        rogue.answers["Get"] = bytes(body[: len(body) - cut]) + more
        cache._breaker.succeeded()
        buffers = blanks(2, NBYTES)
        for result, buffer, value in zip(cache.get_into(KEYS, buffers), buffers, VALUES, strict=True):
            assert not result or np.array_equal(buffer, value)
            seen.add(str(result.outcome))
        with cache.acquire(KEYS) as lease:
            for key, frame in zip(KEYS.digests, lease.frames, strict=True):
                assert frame is None or frame.header.meta.key == key

    try_one()
    assert seen >= {"hit", "corrupt", "unavailable"}


def test_a_server_that_never_gets_on_is_asked_key_by_key_and_no_longer(rogue: Rogue, cache: Client) -> None:
    rogue.answers["Get"] = lambda body: pb.GetReply(
        entries=[pb.Entry(status=pb.LATER)] * (len(pb.GetRequest.FromString(body).keys) // 32)
    )
    assert {result.outcome for result in cache.get_into(KEYS, blanks(2, NBYTES))} == {Outcome.MISS}
    assert rogue.count("Get") == 2


@pytest.mark.parametrize(
    "status", [b"", bytes([pb.STORED]) * 2, bytes([pb.WANTED]), bytes([99])], ids=["none", "two", "wanted", "unknown"]
)
def test_a_put_whose_answer_makes_no_sense_is_not_stored(rogue: Rogue, cache: Client, status: bytes) -> None:
    rogue.answers["Put"] = pb.PutReply(status=status)
    (result,) = cache.put(KEYS[:1], VALUES[:1])
    assert result.outcome is Outcome.UNAVAILABLE
    assert result.reason


def test_what_is_there_is_not_sent_and_a_wrong_count_stores_nothing(rogue: Rogue, cache: Client) -> None:
    keys = keys_of(3, "asked first")
    values = values_of(keys, MiB)
    rogue.answers |= {"Contains": pb.ContainsReply(present=b"\1\0\1"), "Put": pb.PutReply(status=bytes([pb.STORED]))}
    assert [str(result.outcome) for result in cache.put(keys, values)] == ["present", "stored", "present"]
    (sent,) = (body for name, body in rogue.asked if name == "Put")
    assert MiB < len(sent) < MiB + 1000
    rogue.answers["Contains"] = pb.ContainsReply(present=b"\1")
    assert {result.outcome for result in cache.put(keys, values)} == {Outcome.UNAVAILABLE}
    assert rogue.count("Put") == 1


@pytest.mark.parametrize(
    ("stat", "says"),
    [
        (pb.StatReply(server="old"), "upgrade it"),
        (pb.StatReply(limits=LIMITS), "make no sense"),
        (pb.StatReply(limits=LIMITS, alignment=3), "make no sense"),
        (pb.StatReply(limits=pb.Limits(batch_keys=1, inline_nbytes=1), alignment=64), "upgrade it"),
        (b"\xff", "cannot be read"),
    ],
)
def test_a_server_whose_limits_are_none_is_not_used(rogue: Rogue, stat: Any, says: str) -> None:
    rogue.answers["Stat"] = stat
    with pytest.raises(TransportError, match=says):
        mmcache.connect(rogue.url)
    with mmcache.connect(rogue.url, lazy=True) as cache:
        assert not any(cache.get_into(KEYS, blanks(2, NBYTES)))


def test_the_largest_limits_there_can_be_are_no_trouble(rogue: Rogue) -> None:
    limits = pb.Limits(batch_keys=(1 << 32) - 1, inline_nbytes=(1 << 64) - 1, message_nbytes=(1 << 64) - 1)
    rogue.answers["Stat"] = pb.StatReply(limits=limits, alignment=65536, server=STAT.server)
    rogue.answers["Get"] = pb.GetReply(entries=[good(0), good()])
    with mmcache.connect(rogue.url) as cache:
        assert all(cache.get_into(KEYS, blanks(2, NBYTES)))
