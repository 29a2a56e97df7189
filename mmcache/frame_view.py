"""Frames over memory: a parsed frame with views of its tensors, and the check of a frame while its bytes land. Pure."""

from __future__ import annotations

from typing import Final

from mmcache.errors import CorruptFrame, FrameError
from mmcache.frame import (
    PREFIX_NBYTES,
    SUM_NBYTES,
    SUM_OFFSET,
    FrameHeader,
    StoredTensor,
    header_nbytes_of,
    parse_header,
    sealed,
    sum_of_sums,
)
from mmcache.hashing import STEP_NBYTES, Hasher, PlainHasher

STREAM_NBYTES: Final = 128 << 10  # a part as long as this is one of many: past the caches


class Frame:
    """A whole frame over a buffer: header parsed, tensors as zero-copy views. Parsing copies no payload.

    Until `verify()` returns, only the header is verified; tensor bytes are whatever the buffer holds. A header that was
    checked already, with others of its run, is given as its bytes, and parsed when it is first asked for.
    """

    __slots__ = ("_header", "data")

    def __init__(self, header: FrameHeader | bytes, data: memoryview) -> None:
        self._header = header
        self.data = data

    @property
    def header(self) -> FrameHeader:
        """What the frame says of itself."""
        header = self._header
        if isinstance(header, bytes):
            header = self._header = parse_header(header, limit_nbytes=len(self.data))
        return header

    @classmethod
    def parse(cls, data: bytes | bytearray | memoryview, *, checksum: bytes | None = None) -> Frame:
        """The frame at the start of `data`, which may be longer. Raises FrameError."""
        view = memoryview(data).cast("B") if not isinstance(data, bytes) else memoryview(data)
        header = parse_header(view, checksum=checksum)
        return cls(header, view[: header.frame_nbytes])

    def payload(self, tensor: StoredTensor) -> memoryview:
        """The tensor's bytes, a view."""
        return self.data[tensor.offset : tensor.offset + tensor.nbytes]

    def verify(self, *, step_nbytes: int | None = None) -> None:
        """Check every tensor's checksum and every gap's zeros. Raises CorruptFrame naming the first that fails.

        `step_nbytes`: hash so much at a time, not as much as there is; 1 or more.
        """
        check, nbytes = FrameCheck(self.data), self.header.frame_nbytes
        for end in range(step_nbytes or nbytes, nbytes, step_nbytes or nbytes):
            check.advance(end)
        check.advance(nbytes)


class FrameCheck:
    """Checks a frame while it lands in `extent` (a buffer of exactly the frame's size), front to back.

    Call `advance(landed_nbytes)` as more of the front is filled: it hashes what is new. Or have the next bytes copied
    there by `copy`, which hashes them on the way. Both raise FrameError as soon as something is wrong. `header` is set
    once the header has landed; `done` once all is there and verified.

    With `sums_last` the header comes without the tensors' checksums: `seal`, when all has landed, puts them there.
    """

    __slots__ = ("_checked", "_hasher", "_header_nbytes", "_index", "_landed", "_sums", "done", "extent", "header")

    def __init__(self, extent: memoryview, hasher: Hasher | None = None, *, sums_last: bool = False) -> None:
        self.extent = extent
        self.header: FrameHeader | None = None
        self.done = False
        self._landed = self._checked = self._header_nbytes = 0
        self._index = 0
        self._hasher: Hasher = hasher or PlainHasher()
        self._sums: list[bytes] | None = [] if sums_last else None

    def advance(self, landed_nbytes: int) -> None:
        """`landed_nbytes` bytes from the start of the extent are in place. Raises FrameError."""
        self._landed = landed_nbytes
        if self.header is None and not self._try_header(landed_nbytes):
            return
        assert self.header is not None
        tensors, sums = self.header.tensors, self._sums
        while self._index < len(tensors):
            spec, offset, nbytes, checksum = tensors[self._index]
            if self._checked < offset:
                if landed_nbytes < offset:
                    return
                if any(self.extent[self._checked : offset]):
                    raise CorruptFrame(f"padding before tensor {spec.name!r} is not zero")
                self._checked = offset
            end = min(landed_nbytes, offset + nbytes)
            if end > self._checked:
                self._hasher.update(self.extent[self._checked : end])
                self._checked = end
            if end < offset + nbytes:
                return
            found = self._hasher.take()
            if sums is not None:
                sums.append(found)
            elif found != checksum:
                raise CorruptFrame(f"tensor {spec.name!r}: its checksum does not match its bytes")
            self._index += 1
        self.done = sums is None

    def copy(self, source: memoryview) -> None:
        """Copy `source`, at most what is still to come, to where the next bytes belong, and check it there. Raises
        FrameError; what is wrong has landed then."""
        at, nbytes = 0, len(source)
        while at < nbytes:
            start, header = self._landed, self.header
            if header is None:
                end = self._header_end(start, source[at:])
                hashed = False
            else:
                _, offset, tensor_nbytes, _ = header.tensors[self._index]
                hashed = start >= offset
                end = offset + tensor_nbytes if hashed else offset
            stop = min(end, start + nbytes - at)
            part = source[at : at + stop - start]
            at += stop - start
            if not hashed:
                self.extent[start:stop] = part
            else:
                copy, extent, stream = self._hasher.copy, self.extent, stop - start >= STREAM_NBYTES
                for step in range(0, stop - start, STEP_NBYTES):
                    piece = part[step : step + STEP_NBYTES]
                    copy(piece, extent[start + step : start + step + len(piece)], stream)
                self._landed = self._checked = stop
                if stop < end:
                    continue
            self.advance(stop)

    def _header_end(self, start: int, source: memoryview) -> int:
        """Up to where to copy before the header can be looked at. What it says of its size decides only that: it is
        checked where it lies, and must say the same there."""
        if not self._header_nbytes and start == 0 and len(source) >= PREFIX_NBYTES:
            self._header_nbytes = header_nbytes_of(source[:PREFIX_NBYTES].tobytes(), len(self.extent))
        return self._header_nbytes or PREFIX_NBYTES

    def seal(self, sum_of_all: bytes) -> bytes:
        """The header with the checksums of what has landed, to be written over the one that came, if those have this
        `sum_of_sums`: their writer's. Raises FrameError."""
        header, sums = self.header, self._sums
        if header is None or sums is None or self._index < len(header.tensors):
            raise FrameError("the frame is not complete")
        if sum_of_sums(sums) != sum_of_all:
            raise CorruptFrame("the tensors' checksums are not those of their writer")
        whole = sealed(bytes(self.extent[: header.header_nbytes]), sums)
        tensors = tuple([StoredTensor(*tensor[:3], one) for tensor, one in zip(header.tensors, sums, strict=True)])
        self.header = FrameHeader(*header[:2], tensors, *header[3:5], whole[SUM_OFFSET : SUM_OFFSET + SUM_NBYTES])
        self.done = True
        return whole

    def _try_header(self, landed_nbytes: int) -> bool:
        nbytes = len(self.extent)
        if not self._header_nbytes:
            if landed_nbytes < PREFIX_NBYTES:
                if landed_nbytes >= nbytes:
                    raise FrameError(f"{landed_nbytes} bytes are too few for a frame")
                return False
            self._header_nbytes = header_nbytes_of(self.extent[:PREFIX_NBYTES].tobytes(), nbytes)
        if landed_nbytes < self._header_nbytes:
            return False
        header = parse_header(self.extent[: self._header_nbytes], limit_nbytes=nbytes)
        if header.frame_nbytes != nbytes or header.header_nbytes != self._header_nbytes:
            raise FrameError(f"the frame says {header.frame_nbytes} bytes, its extent has {nbytes}")
        self.header = header
        self._checked = self._header_nbytes
        return True
