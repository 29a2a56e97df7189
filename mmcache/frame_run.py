"""Many frame headers at once: the blocks of a prompt differ in their keys and checksums and in little else. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import xxhash
from numpy.typing import NDArray

from mmcache.errors import FrameError
from mmcache.frame import ENTRY_NBYTES, PREFIX_NBYTES, SUM_NBYTES, SUM_OFFSET, FrameHeader, parse_header

_KEY: Final = slice(96, 128)
_ENTRY_SUM_OFFSET: Final = 24
# Of a prefix, what differs within one form: checksum, index, times; key; parent, home.
_FREE: Final = (slice(SUM_OFFSET, 72), _KEY, slice(160, 224))


def parse_run(headers: NDArray[np.uint8], sums: bytes, keys: bytes, frame_nbytes: int) -> FrameHeader | None:
    """The first of these headers, uint8 `[count, header_nbytes]`, if every one is right and of its form: the same but
    for key, parent, home, index, times and checksums. None if not: `parse_header` says of each what is wrong.

    Right is what it is for `parse_header` and `check_expected` with that row's checksum of `sums` (16 bytes each), that
    key of `keys` (32 bytes each) and a frame of `frame_nbytes`.
    """
    try:
        first = parse_header(headers[0].data, limit_nbytes=frame_nbytes)
    except FrameError:
        return None
    if first.frame_nbytes != frame_nbytes or first.header_nbytes != headers.shape[1]:
        return None
    if headers[:, SUM_OFFSET : SUM_OFFSET + SUM_NBYTES].tobytes() != sums or headers[:, _KEY].tobytes() != keys:
        return None
    same = headers.copy()
    same[:, SUM_OFFSET : SUM_OFFSET + SUM_NBYTES] = 0
    digest = xxhash.xxh3_128_digest
    if b"".join([digest(row) for row in same]) != sums:
        return None
    for free in (*_FREE, *map(_entry_sum, range(len(first.tensors)))):
        same[:, free] = 0
    return first if bool((same == same[0]).all()) else None


def checksums_of(headers: NDArray[np.uint8], tensor: int) -> Sequence[bytes]:
    """Each row's checksum of its tensor with this number."""
    column = headers[:, _entry_sum(tensor)].tobytes()
    return [column[start : start + SUM_NBYTES] for start in range(0, len(column), SUM_NBYTES)]


def _entry_sum(tensor: int) -> slice:
    start = PREFIX_NBYTES + ENTRY_NBYTES * tensor + _ENTRY_SUM_OFFSET
    return slice(start, start + SUM_NBYTES)
