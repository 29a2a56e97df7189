"""What to copy out of a mapped arena, and where to: all headers are read and checked before a tensor is moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np

from mmcache.errors import FrameError
from mmcache.frame import FrameHeader, check_expected, parse_header
from mmcache.frame_run import checksums_of, parse_run
from mmcache.tensors import Bytes, HostTensor, destinations
from mmcache.transport.base import Found, Outcome, Result

RUN_FRAMES: Final = 8  # of fewer, each header is read by itself
RUN_NBYTES: Final = 4 << 20  # of more, too: they are in memory several times at once


class Move(NamedTuple):
    """One tensor to copy: from the arena, to its destination, and the checksum it must have there."""

    source: Bytes
    target: Bytes
    checksum: bytes


class Planned(NamedTuple):
    """A frame whose header was read and found right: what to copy, and the gaps between that must hold zeros."""

    moves: list[Move]
    gaps: list[Bytes]


def plan_frames(
    memory: Bytes,
    found: Sequence[Found],
    keys: Sequence[bytes],
    buffers: Sequence[Mapping[str, HostTensor]],
    verify: bool,
) -> list[Planned | Result]:
    """Read and check all headers in the arena's `memory`, and match tensors to destinations; a Result where that fails.

    Nothing of a header is used but what was checked: each is copied once.
    """
    run = _read_run(memory, found, keys) if verify else None
    if run is None:
        return [_plan(memory, *row, verify) for row in zip(found, keys, buffers, strict=True)]
    header, checksums = run
    columns = zip(found, checksums, buffers, strict=True)
    return [_moves(memory, place.offset, header, sums, into) for place, sums, into in columns]


def _read_run(
    memory: Bytes, found: Sequence[Found], keys: Sequence[bytes]
) -> tuple[FrameHeader, Sequence[tuple[bytes, ...]]] | None:
    """The header that all these have but for keys and checksums, and each one's checksums; None if they differ more."""
    run = headers_of_run(memory.data, found, keys)
    if run is None:
        return None
    headers = np.frombuffer(run.data, np.uint8).reshape(len(found), run.header.header_nbytes)
    columns = [checksums_of(headers, number) for number in range(len(run.header.tensors))]
    return run.header, list(zip(*columns, strict=True)) if columns else [()] * len(found)


class Run(NamedTuple):
    """The headers of frames of one form, all of them checked: their bytes, and the first of them parsed."""

    data: bytes
    header: FrameHeader


def headers_of_run(memory: memoryview, found: Sequence[Found], keys: Sequence[bytes]) -> Run | None:
    """A copy of the headers in the arena's `memory` if all are right and of one form, for RUN_FRAMES or more; else
    None: each is to be looked at by itself."""
    if len(found) < RUN_FRAMES:
        return None
    _, nbytes, header_nbytes, _ = found[0]
    if len(found) * header_nbytes > RUN_NBYTES:
        return None
    starts, sizes, header_sizes, sums = zip(*found, strict=True)
    if sizes.count(nbytes) != len(sizes) or header_sizes.count(header_nbytes) != len(sizes):
        return None
    if max(starts) + nbytes > len(memory):
        return None
    data = b"".join([memory[start : start + header_nbytes] for start in starts])
    headers = np.frombuffer(data, np.uint8).reshape(len(found), header_nbytes)
    header = parse_run(headers, b"".join(sums), b"".join(keys), nbytes)
    return Run(data, header) if header is not None else None


def _plan(memory: Bytes, found: Found, key: bytes, buffers: Mapping[str, HostTensor], verify: bool) -> Planned | Result:
    start, nbytes, header_nbytes, header_sum = found
    try:
        if start + nbytes > memory.nbytes:
            raise FrameError(f"a frame of {nbytes} bytes at {start} is outside the arena")
        data = memory[start : start + header_nbytes].tobytes()
        header = parse_header(data, limit_nbytes=nbytes, checksum=header_sum if verify else None, verify=verify)
        check_expected(header, nbytes, header_nbytes, key if verify else None)
    except FrameError as error:
        return Result(Outcome.CORRUPT, str(error))
    return _moves(memory, start, header, [stored.checksum for stored in header.tensors], buffers)


def _moves(
    memory: Bytes, start: int, header: FrameHeader, checksums: Sequence[bytes], buffers: Mapping[str, HostTensor]
) -> Planned | Result:
    """What to copy of the frame at `start`, which has this header, but for the checksums of its tensors."""
    targets = destinations(header, buffers)
    if isinstance(targets, str):
        return Result(Outcome.MISMATCH, targets)
    moves, gaps, end = [], [], start + header.header_nbytes
    for (_, offset, nbytes, _), target, checksum in zip(header.tensors, targets, checksums, strict=True):
        begin = start + offset
        if begin != end:
            gaps.append(memory[end:begin])
        end = begin + nbytes
        moves.append(Move(memory[begin:end], target, checksum))
    return Planned(moves, gaps)
