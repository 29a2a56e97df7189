"""Frames over memory: a parsed frame with views of its tensors, and the check of a frame while its bytes land. Pure."""

from __future__ import annotations

import xxhash

from mmcache.errors import CorruptFrame, FrameError
from mmcache.frame import PREFIX_NBYTES, FrameHeader, StoredTensor, header_nbytes_of, parse_header


class Frame:
    """A whole frame over a buffer: header parsed, tensors as zero-copy views. Parsing copies no payload.

    Until `verify()` returns, only the header is verified; tensor bytes are whatever the buffer holds.
    """

    __slots__ = ("data", "header")

    def __init__(self, header: FrameHeader, data: memoryview) -> None:
        self.header = header
        self.data = data

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

    Call `advance(landed_nbytes)` as more of the front is filled: it hashes what is new and raises FrameError as soon
    as something is wrong. `header` is set once the header has landed; `done` once all is there and verified.
    """

    __slots__ = ("_checked", "_index", "_state", "done", "extent", "header")

    def __init__(self, extent: memoryview) -> None:
        self.extent = extent
        self.header: FrameHeader | None = None
        self.done = False
        self._checked = 0
        self._index = 0
        self._state = xxhash.xxh3_128()

    def advance(self, landed_nbytes: int) -> None:
        """`landed_nbytes` bytes from the start of the extent are in place. Raises FrameError."""
        if self.header is None and not self._try_header(landed_nbytes):
            return
        assert self.header is not None
        tensors = self.header.tensors
        while self._index < len(tensors):
            tensor = tensors[self._index]
            if self._checked < tensor.offset:
                if landed_nbytes < tensor.offset:
                    return
                if any(self.extent[self._checked : tensor.offset]):
                    raise CorruptFrame(f"padding before tensor {tensor.spec.name!r} is not zero")
                self._checked = tensor.offset
            end = min(landed_nbytes, tensor.offset + tensor.nbytes)
            if end > self._checked:
                self._state.update(self.extent[self._checked : end])
                self._checked = end
            if end < tensor.offset + tensor.nbytes:
                return
            if self._state.digest() != tensor.checksum:
                raise CorruptFrame(f"tensor {tensor.spec.name!r}: its checksum does not match its bytes")
            self._state.reset()
            self._index += 1
        self.done = True

    def _try_header(self, landed_nbytes: int) -> bool:
        if landed_nbytes < PREFIX_NBYTES:
            if landed_nbytes >= len(self.extent):
                raise FrameError(f"{landed_nbytes} bytes are too few for a frame")
            return False
        header_nbytes = header_nbytes_of(self.extent[:PREFIX_NBYTES], len(self.extent))
        if landed_nbytes < header_nbytes:
            return False
        self.header = parse_header(self.extent[:header_nbytes], limit_nbytes=len(self.extent))
        if self.header.frame_nbytes != len(self.extent):
            raise FrameError(f"the frame says {self.header.frame_nbytes} bytes, its extent has {len(self.extent)}")
        self._checked = header_nbytes
        return True
