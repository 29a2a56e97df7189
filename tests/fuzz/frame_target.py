"""Any bytes as a frame: a FrameError, or a frame that packs to the same bytes again; memory stays bounded."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Final

import xxhash

from mmcache.errors import FrameError
from mmcache.frame import MAX_FRAME_NBYTES, PREFIX_NBYTES, frame_segments, header_nbytes_of, pack_header, parse_header
from mmcache.frame_view import Frame, FrameCheck
from mmcache.tensors import as_numpy
from tests.fuzz.bed import Mutate, memory_below
from tests.fuzz.edits import edit_frame

GOLDEN: Final = Path(__file__).resolve().parents[1] / "golden" / "frame_v1.json"
ROOM_NBYTES: Final = 256 << 10  # of memory, for any input


class FrameTarget:
    """See the top of this file."""

    max_nbytes = 16384

    def seeds(self) -> list[bytes]:
        """The golden frames that are short enough."""
        frames = [bytes.fromhex(vector["expected"]) for vector in json.loads(GOLDEN.read_text())["vectors"]]
        return [frame for frame in frames if len(frame) <= self.max_nbytes]

    def mutate(self, data: bytes, random: Random, blind: Mutate) -> bytes:
        """Numbers of the header changed and sums made right, or blindly changed bytes with or without right sums."""
        if random.random() < 0.3:
            data = blind(data)
        return edit_frame(data, random, self.max_nbytes)

    def check(self, data: bytes) -> None:
        """Feed it to every function that reads frames."""
        with memory_below(ROOM_NBYTES + 8 * len(data)):
            for verify in (True, False):
                _check_header(data, verify)
            frame = _check_whole(data)
            _check_landing(data, frame)

    def close(self) -> None:
        """Nothing was started."""


def _check_header(data: bytes, verify: bool) -> None:
    try:
        announced = header_nbytes_of(data, MAX_FRAME_NBYTES)
    except FrameError:
        announced = None
    try:
        header = parse_header(data, verify=verify)
    except FrameError:
        return
    assert header.header_nbytes == announced
    assert header.header_nbytes <= header.frame_nbytes <= len(data)
    specs = [stored.spec for stored in header.tensors]
    packed = pack_header(header.meta, specs, [stored.checksum for stored in header.tensors], header.alignment)
    if verify:
        assert packed == data[: header.header_nbytes], "what was read is not what packs to these bytes"
    else:
        assert packed[:32] + packed[48:] == data[:32] + data[48 : header.header_nbytes]


def _check_whole(data: bytes) -> Frame | None:
    """The frame at the start of the data, if it is one."""
    try:
        frame = Frame.parse(data)
        frame.verify()
    except FrameError:
        return None
    header = frame.header
    payloads = [frame.payload(stored) for stored in header.tensors]
    for stored, payload in zip(header.tensors, payloads, strict=True):
        array = as_numpy(stored.spec, payload)
        assert (array.shape, array.nbytes) == (stored.spec.shape, stored.nbytes)
    sums = [xxhash.xxh3_128_digest(payload) for payload in payloads]
    packed = pack_header(header.meta, [stored.spec for stored in header.tensors], sums, header.alignment)
    whole = b"".join(frame_segments(packed, payloads, header.alignment))
    assert whole == data[: header.frame_nbytes], "a verified frame does not pack to the same bytes"
    return frame


def _check_landing(data: bytes, frame: Frame | None) -> None:
    """The check of a frame while it lands comes to the same verdict, however the bytes are cut."""
    random = Random(xxhash.xxh32_intdigest(data))
    check = FrameCheck(memoryview(data))
    landed = 0
    try:
        while landed < len(data):
            landed = min(len(data), landed + random.choice((63, PREFIX_NBYTES, 1000, len(data))))
            check.advance(landed)
    except FrameError:
        assert not check.done
    assert check.done == (frame is not None and frame.header.frame_nbytes == len(data))
