"""The abuse catalogue: bytes made to harm a reader of frames. Each attack is refused with FrameError and little memory.

An attacker computes the header's checksum like anybody else, so the attacks here carry a right one: only the check of
the structure itself can catch them.
"""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from typing import NamedTuple

import pytest
import xxhash
from hypothesis import example, given
from hypothesis import strategies as st

from mmcache.errors import CorruptFrame, FrameError
from mmcache.frame import (
    MAX_FRAME_NBYTES,
    MAX_HEADER_NBYTES,
    PREFIX_NBYTES,
    FrameMeta,
    Kind,
    TensorSpec,
    frame_segments,
    header_nbytes_of,
    pack_header,
    parse_header,
)
from mmcache.frame_view import Frame, FrameCheck
from mmcache.tensors import as_numpy

# Where the fields lie, from docs/wire-format.md: (offset, struct format).
VERSION, KIND, RESERVED_1, HEADER_NBYTES = (8, "<H"), (10, "<B"), (11, "<B"), (12, "<I")
FRAME_NBYTES, ALIGNMENT, COUNT, RESERVED_2 = (16, "<Q"), (24, "<I"), (28, "<H"), (30, "<H")
SUM, WRITER, RESERVED_3 = 32, 72, 224
DTYPE, NDIM, NAME_NBYTES, RESERVED_4 = (0, "<B"), (1, "<B"), (2, "<H"), (4, "<I")
OFFSET, NBYTES, SIZES, NAME = (8, "<Q"), (16, "<Q"), 40, 104
U64_MAX = 2**64 - 1


def frame_of(specs: list[TensorSpec], alignment: int = 64) -> bytes:
    payloads = [bytes(range(1, 1 + spec.nbytes)) for spec in specs]
    meta = FrameMeta(Kind.EMBEDDING, b"k" * 32, b"n" * 32, b"p" * 32, b"h" * 32, 1, 2, 3, "test/1")
    header = pack_header(meta, specs, [xxhash.xxh3_128_digest(payload) for payload in payloads], alignment)
    return b"".join(frame_segments(header, [memoryview(payload) for payload in payloads], alignment))


# The first tensor ends at 824, inside the 64 bytes before the second.
SPECS = [
    TensorSpec("first", "float32", (2, 7)),
    TensorSpec("second", "bool", (3,)),
    TensorSpec("third", "int8", (0, 4)),
]
GOOD = frame_of(SPECS)
assert (len(GOOD), GOOD[12:14]) == (896, b"\x00\x03")
PAGED = frame_of(SPECS[:2], 4096)


class Edit(NamedTuple):
    offset: int
    data: bytes


def put(field: tuple[int, str], value: int, tensor: int | None = None) -> Edit:
    """Write a number into a field of the prefix or of a tensor's entry."""
    base = 0 if tensor is None else PREFIX_NBYTES + 160 * tensor
    return Edit(base + field[0], struct.pack(field[1], value))


def sizes(tensor: int, *numbers: int) -> Edit:
    return Edit(PREFIX_NBYTES + 160 * tensor + SIZES, struct.pack(f"<{len(numbers)}Q", *numbers))


def name(tensor: int, data: bytes) -> Edit:
    return Edit(PREFIX_NBYTES + 160 * tensor + NAME, data)


def forge(frame: bytes, *edits: Edit) -> bytes:
    """The frame with these edits and a header checksum that is right again."""
    forged = bytearray(frame)
    for offset, data in edits:
        forged[offset : offset + len(data)] = data
    (header_nbytes,) = struct.unpack_from("<I", frame, 12)
    forged[SUM : SUM + 16] = bytes(16)
    forged[SUM : SUM + 16] = xxhash.xxh3_128_digest(bytes(forged[:header_nbytes]))
    return bytes(forged)


ATTACKS: dict[str, tuple[list[Edit], str]] = {
    "another magic": ([Edit(0, b"MMCFRAMF")], "magic"),
    "no magic": ([Edit(0, bytes(8))], "magic"),
    "version 0": ([put(VERSION, 0)], "version 0"),
    "version 2": ([put(VERSION, 2)], "version 2"),
    "version 65535": ([put(VERSION, 65535)], "version 65535"),
    "kind 0": ([put(KIND, 0)], "kind 0"),
    "kind 5": ([put(KIND, 5)], "kind 5"),
    "kind 255": ([put(KIND, 255)], "kind 255"),
    "first reserved byte": ([put(RESERVED_1, 1)], "reserved"),
    "second reserved field": ([put(RESERVED_2, 0x8000)], "reserved"),
    "third reserved field, first byte": ([Edit(RESERVED_3, b"\1")], "reserved"),
    "third reserved field, last byte": ([Edit(RESERVED_3 + 31, b"\x80")], "reserved"),
    "header of 0 bytes": ([put(HEADER_NBYTES, 0)], "header size 0"),
    "header of 256 bytes": ([put(HEADER_NBYTES, 256)], "header size 256"),
    "header one alignment short": ([put(HEADER_NBYTES, 768 - 64)], "header size 704"),
    "header one alignment long": ([put(HEADER_NBYTES, 768 + 64)], "header size 832"),
    "header off by one": ([put(HEADER_NBYTES, 769)], "header size 769"),
    "header of 4 GiB": ([put(HEADER_NBYTES, 2**32 - 1)], "header size 4294967295"),
    "frame of 0 bytes": ([put(FRAME_NBYTES, 0)], "past the frame's 0"),
    "frame one byte short": ([put(FRAME_NBYTES, 895)], "past the frame's 895"),
    "frame one byte long": ([put(FRAME_NBYTES, 897)], "over the limit"),
    "frame smaller than its header": ([put(FRAME_NBYTES, 767)], "past the frame's 767"),
    "frame of 2^63 bytes": ([put(FRAME_NBYTES, 2**63)], "over the limit"),
    "frame of 2^64-1 bytes": ([put(FRAME_NBYTES, U64_MAX)], "over the limit"),
    "alignment 0": ([put(ALIGNMENT, 0)], "alignment 0"),
    "alignment 1": ([put(ALIGNMENT, 1)], "alignment 1"),
    "alignment 3": ([put(ALIGNMENT, 3)], "alignment 3"),
    "alignment 32": ([put(ALIGNMENT, 32)], "alignment 32"),
    "alignment 96": ([put(ALIGNMENT, 96)], "alignment 96"),
    "alignment 128 for a layout of 64": ([put(ALIGNMENT, 128)], "offset 832 is not where"),
    "alignment 2^17": ([put(ALIGNMENT, 2**17)], "alignment 131072"),
    "alignment 2^31": ([put(ALIGNMENT, 2**31)], "alignment 2147483648"),
    "alignment 2^32-1": ([put(ALIGNMENT, 2**32 - 1)], "alignment 4294967295"),
    "no tensors though there are": ([put(COUNT, 0)], "header size 768 does not fit 0"),
    "one tensor fewer": ([put(COUNT, 2)], "header size 768 does not fit 2"),
    "one tensor fewer, header to match": ([put(COUNT, 2), put(HEADER_NBYTES, 576)], "checksum"),
    "1024 tensors": ([put(COUNT, 1024)], "does not fit 1024"),
    "1025 tensors": ([put(COUNT, 1025)], "1025 tensors"),
    "65535 tensors": ([put(COUNT, 65535)], "65535 tensors"),
    "writer of high bytes": ([Edit(WRITER, b"\xff\xfe")], "writer is not ASCII"),
    "writer with a NUL inside": ([Edit(WRITER, b"a\0b")], "writer holds a NUL"),
    "padding after the table": ([Edit(767, b"\1")], "header padding"),
    "padding right behind the table": ([Edit(736, b"\x80")], "header padding"),
    "dtype 0": ([put(DTYPE, 0, 0)], "dtype code 0"),
    "dtype 13": ([put(DTYPE, 13, 1)], "dtype code 13"),
    "dtype 255": ([put(DTYPE, 255, 2)], "dtype code 255"),
    "wider dtype": ([put(DTYPE, 10, 0)], "not what its shape gives"),
    "9 dimensions": ([put(NDIM, 9, 0)], "9 dimensions"),
    "255 dimensions": ([put(NDIM, 255, 0)], "255 dimensions"),
    "one dimension fewer": ([put(NDIM, 1, 0)], "malformed"),
    "one dimension more, of 0": ([put(NDIM, 3, 0)], "not what its shape gives"),
    "a size beyond the dimensions": ([sizes(0, 2, 7, 0, 0, 0, 0, 0, 1)], "malformed"),
    "reserved bytes of an entry": ([put(RESERVED_4, 1, 1)], "malformed"),
    "offset 0: over the header": ([put(OFFSET, 0, 0)], "offset 0"),
    "offset inside the header": ([put(OFFSET, 704, 0)], "offset 704"),
    "offset unaligned": ([put(OFFSET, 769, 0)], "offset 769"),
    "overlapping tensors": ([put(OFFSET, 768, 1)], "offset 768 is not where"),
    "tensors in backward order": ([put(OFFSET, 832, 0), put(OFFSET, 768, 1)], "offset 832 is not where"),
    "a gap before a tensor": ([put(OFFSET, 896, 1)], "offset 896 is not where"),
    "offset 2^63": ([put(OFFSET, 2**63, 1)], "is not where"),
    "offset 2^64-1": ([put(OFFSET, U64_MAX, 1)], "is not where"),
    "bytes 0": ([put(NBYTES, 0, 0)], "0 bytes are not"),
    "bytes 2^63": ([put(NBYTES, 2**63, 0)], "are not what its shape gives"),
    "bytes 2^64-1": ([put(NBYTES, U64_MAX, 0)], "are not what its shape gives"),
    "bytes and shape 2^63": ([put(NBYTES, 2**63, 1), sizes(1, 2**63)], "are not what its shape gives"),
    "bytes and shape past the frame": ([put(NBYTES, 68, 1), sizes(1, 68)], "past the frame's 896"),
    "a longer last tensor": ([put(NBYTES, 4, 2), sizes(2, 1, 4)], "past the frame's 896"),
    "a shorter last tensor": ([put(NBYTES, 2, 1), put(FRAME_NBYTES, 895), sizes(1, 2)], "past the frame's 895"),
    "shape times itemsize is 2^64: wraps to 0": ([put(NBYTES, 0, 0), sizes(0, 2**31, 2**31)], "0 bytes are not"),
    "shape wraps to its bytes": ([sizes(0, 2**62, 2**62 + 14)], "56 bytes are not"),
    "eight sizes of 2^64-1": ([put(NDIM, 8, 1), sizes(1, *[U64_MAX] * 8)], "are not what its shape gives"),
    "zero size beside 2^63": ([sizes(2, 0, 2**63)], "0 bytes are not"),
    "zero size beside two that overflow together": ([put(NDIM, 3, 2), sizes(2, 2**32, 2**32, 0)], "0 bytes are not"),
    "empty name": ([name(0, bytes(5)), put(NAME_NBYTES, 0, 0)], "empty"),
    "name that begins with NUL": ([name(0, b"\0irst")], "NUL"),
    "name with a NUL inside": ([name(0, b"fi\0st")], "NUL"),
    "name shorter than declared": ([put(NAME_NBYTES, 6, 0)], "another length"),
    "name longer than declared": ([put(NAME_NBYTES, 4, 0)], "another length"),
    "name of 65535 bytes": ([put(NAME_NBYTES, 65535, 0)], "another length"),
    "name hidden behind its end": ([name(0, b"first\0\0x")], "NUL"),
    "name that is not UTF-8": ([name(0, b"\xff\xff\xff\xff\xff")], "not UTF-8"),
    "name of an overlong encoding": ([name(0, b"\xc0\xafabc")], "not UTF-8"),
    "name of a surrogate": ([name(0, b"\xed\xa0\x80ab")], "not UTF-8"),
    "duplicate names": ([name(1, b"first\0"), put(NAME_NBYTES, 5, 1)], "share a name"),
}


@pytest.mark.parametrize(("edits", "message"), ATTACKS.values(), ids=ATTACKS.keys())
def test_attack(edits: list[Edit], message: str) -> None:
    forged = forge(GOOD, *edits)
    with pytest.raises(FrameError, match=message):
        Frame.parse(forged)
    extent = memoryview(forged)
    check = FrameCheck(extent)
    with pytest.raises(FrameError):
        check.advance(len(extent))
    assert not check.done


@pytest.mark.parametrize("edits", [edits for edits, message in ATTACKS.values() if message != "checksum"])
def test_an_attack_is_refused_where_checksums_are_not_asked_for(edits: list[Edit]) -> None:
    forged = forge(GOOD, *edits)
    with pytest.raises(FrameError):
        parse_header(forged, verify=False)


def test_the_forger_forges_well() -> None:
    assert forge(GOOD) == GOOD
    forged = Frame.parse(forge(GOOD, Edit(48, b"\x09"), put(KIND, 4)))
    forged.verify()
    assert (forged.header.meta.chain_index, forged.header.meta.kind) == (9, Kind.LATENT)


@pytest.mark.parametrize("frame", [GOOD, frame_of([]), frame_of(SPECS[:1])])
def test_truncated_anywhere(frame: bytes) -> None:
    for length in range(len(frame)):
        with pytest.raises(FrameError):
            Frame.parse(frame[:length])
        check = FrameCheck(memoryview(frame)[:length])
        with pytest.raises(FrameError):
            check.advance(length)


def test_a_header_alone_is_not_a_frame_unless_the_limit_says_so() -> None:
    with pytest.raises(FrameError, match="over the limit of 768"):
        parse_header(GOOD[:768])
    with pytest.raises(FrameError, match="over the limit of 895"):
        parse_header(GOOD[:768], limit_nbytes=895)
    assert parse_header(GOOD[:768], limit_nbytes=896) == Frame.parse(GOOD).header
    with pytest.raises(FrameError, match="does not fit"):
        parse_header(GOOD, limit_nbytes=700)


@pytest.mark.parametrize(
    ("frame", "position"), [(GOOD, 824), (GOOD, 831), (GOOD, 895), (PAGED, 4096 + 56), (PAGED, 8191)]
)
def test_padding_between_tensors_that_is_not_zero(frame: bytes, position: int) -> None:
    assert frame[position] == 0
    dirty = bytearray(frame)
    dirty[position] = 1
    parsed = Frame.parse(dirty)
    with pytest.raises(CorruptFrame, match="padding before tensor"):
        parsed.verify()


def test_payload_of_another_frame_under_this_header() -> None:
    mixed = bytearray(GOOD)
    mixed[768:824], mixed[832:835] = bytes(56), GOOD[768:771]
    with pytest.raises(CorruptFrame, match="'first'"):
        Frame.parse(mixed).verify()
    mixed[768:824], mixed[832] = GOOD[768:824], 9
    with pytest.raises(CorruptFrame, match="'second'"):
        Frame.parse(mixed).verify()


@pytest.mark.parametrize("hidden", [b"x", bytes(64)])
def test_bytes_hidden_behind_the_last_tensor(hidden: bytes) -> None:
    forged = forge(GOOD + hidden, put(FRAME_NBYTES, len(GOOD + hidden)))
    with pytest.raises(FrameError, match="tensors end at 896 but"):
        Frame.parse(forged)
    nothing = frame_of([])
    with pytest.raises(FrameError, match="tensors end at 256 but"):
        Frame.parse(forge(nothing + hidden, put(FRAME_NBYTES, 256 + len(hidden))))


def test_a_payload_may_hold_a_whole_frame() -> None:
    inner = xxhash.xxh3_128_digest(GOOD)
    meta = Frame.parse(GOOD).header.meta
    header = pack_header(meta, [TensorSpec("x", "uint8", (len(GOOD),))], [inner])
    outer = Frame.parse(b"".join(frame_segments(header, [memoryview(GOOD)], 64)))
    outer.verify()
    assert [stored.spec.name for stored in outer.header.tensors] == ["x"]


def peak_nbytes(call: Callable[[], object]) -> int:
    """Of memory, the least of some calls: what other threads of this process take meanwhile counts, too."""
    return min(_peak_nbytes(call) for _ in range(5))


def _peak_nbytes(call: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        call()
    except FrameError:
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return peak


@pytest.mark.parametrize("edits", [edits for edits, _ in ATTACKS.values()], ids=ATTACKS.keys())
def test_an_untrusted_length_costs_no_memory(edits: list[Edit]) -> None:
    forged = forge(GOOD, *edits)
    assert peak_nbytes(lambda: Frame.parse(forged)) < 32_768
    assert peak_nbytes(lambda: parse_header(forged, limit_nbytes=U64_MAX)) < 32_768
    assert peak_nbytes(lambda: header_nbytes_of(forged, U64_MAX)) < 32_768


def test_the_largest_header_costs_little_memory() -> None:
    claim = forge(GOOD, put(COUNT, 1024), put(ALIGNMENT, 65536), put(HEADER_NBYTES, MAX_HEADER_NBYTES))
    assert header_nbytes_of(claim, MAX_FRAME_NBYTES) == MAX_HEADER_NBYTES
    assert peak_nbytes(lambda: parse_header(claim, limit_nbytes=MAX_FRAME_NBYTES)) < 32_768
    whole = claim + bytes(MAX_HEADER_NBYTES - len(claim))
    assert MAX_HEADER_NBYTES < peak_nbytes(lambda: parse_header(whole)) < 4 * MAX_HEADER_NBYTES


# ------------------------------------------------------------------------------- any bytes: FrameError or a sound frame
def survives(data: bytes) -> None:
    """No function raises anything but FrameError; what is accepted is what pack writes, and can be viewed."""
    for verify in (True, False):
        try:
            header = parse_header(data, verify=verify)
        except FrameError:
            continue
        specs = [stored.spec for stored in header.tensors]
        packed = pack_header(header.meta, specs, [stored.checksum for stored in header.tensors], header.alignment)
        assert packed[:SUM] == data[:SUM]
        assert packed[SUM + 16 :] == data[SUM + 16 : header.header_nbytes]
        frame = Frame(header, memoryview(data))
        for stored in header.tensors:
            array = as_numpy(stored.spec, frame.payload(stored))
            assert (array.shape, array.nbytes) == (stored.spec.shape, stored.nbytes)
    check = FrameCheck(memoryview(data))
    try:
        check.advance(len(data) // 2)
        check.advance(len(data))
    except FrameError:
        assert not check.done
    else:
        assert check.done
        Frame.parse(data).verify()


@given(st.binary(max_size=1024))
@example(b"")
@example(bytes(256))
@example(b"MMCFRAME\x01\x00")
@example(b"\xff" * 1024)
def test_random_bytes(data: bytes) -> None:
    survives(data)


@given(st.binary(max_size=1024))
def test_random_bytes_behind_a_sound_prefix(data: bytes) -> None:
    survives(forge((GOOD[:256] + data).ljust(896, b"\0")[:896]))


interesting = st.sampled_from([0, 1, 2, 63, 64, 255, 2**31, 2**32 - 1, 2**40, 2**63, U64_MAX]) | st.integers(0, U64_MAX)
edits = st.one_of(
    st.builds(Edit, st.integers(0, 895), st.binary(min_size=1, max_size=8)),
    st.builds(Edit, st.integers(0, 92).map(lambda word: 8 * word), interesting.map(lambda n: struct.pack("<Q", n))),
    st.builds(put, st.sampled_from([KIND, COUNT, ALIGNMENT, VERSION]), st.integers(0, 255)),
    st.builds(put, st.sampled_from([DTYPE, NDIM]), st.integers(0, 16), st.integers(0, 2)),
    st.builds(sizes, st.integers(0, 2), st.integers(0, 8), st.integers(0, 8), interesting),
)


@given(st.lists(edits, min_size=1, max_size=4), st.booleans())
@example([put(DTYPE, 8, 0), sizes(0, 4, 7)], True)
@example([sizes(2, 0, 2**40)], True)
def test_mutations_of_a_frame(changes: list[Edit], fix_checksum: bool) -> None:
    forged = forge(GOOD, *changes)[: len(GOOD)]
    survives(forged if fix_checksum else forged[:SUM] + GOOD[SUM : SUM + 16] + forged[SUM + 16 :])


@given(st.integers(0, 896), st.integers(0, 896), st.integers(0, 896))
def test_spliced_frames(first: int, second: int, length: int) -> None:
    survives(forge((GOOD[:first] + PAGED[second:])[: max(length, 256)].ljust(896, b"\0")))
