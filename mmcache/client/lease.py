"""Frames under a lease: zero-copy views of the arena, or whole frames received, with the same face."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType

from mmcache.client.link import Link
from mmcache.errors import FrameError, LeaseLost
from mmcache.frame import check_expected, parse_header
from mmcache.frame_view import Frame
from mmcache.transport.base import Found


class LeasedFrames:
    """`frames[i]` is the i-th key's Frame, or None for a miss. A context manager; leaving it gives the lease back.

    Tensors of a frame are seen with `mmcache.tensors.as_numpy(spec, frame.payload(tensor))`. Do not keep views after
    leaving: the memory is reused then. Raises LeaseLost on leaving if the lease had expired, since what the views
    showed may then have been another entry's bytes.
    """

    def __init__(
        self, frames: Sequence[Frame | None], lease_id: int = 0, release: Callable[[int], bool] | None = None
    ) -> None:
        self.frames = list(frames)
        self._lease_id, self._release = lease_id, release

    @classmethod
    def take(
        cls, link: Link, digests: Sequence[bytes], deadline: float, release: Callable[[int], bool]
    ) -> LeasedFrames:
        """Acquire over `link`. A frame whose header does not verify, or that is another key's, counts as a miss."""
        conversation, arena = link.conversation, link.arena
        acquired = link.run(conversation.acquire(b"".join(digests), inline=arena is None), deadline)
        frames: list[Frame | None] = []
        for key, found in zip(digests, acquired.entries, strict=True):
            if found is None:
                frames.append(None)
            elif arena is not None:
                end = found.offset + found.nbytes
                frames.append(_open(arena.view[found.offset : end], found, key) if end <= arena.data.nbytes else None)
            else:
                data = link.run(conversation.receive_whole(found), deadline)
                frames.append(_open(memoryview(data).toreadonly(), found, key))
        return cls(frames, acquired.lease_id, release)

    def __enter__(self) -> LeasedFrames:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        held = self.release()
        if not held and error is None:
            raise LeaseLost("the lease expired before it was given back: drop what was read; use it for less long")

    def release(self) -> bool:
        """Give the lease back; True if everything seen under it was right until now. Safe to call twice."""
        lease_id, self._lease_id = self._lease_id, 0
        self.frames = [None] * len(self.frames)
        return self._release(lease_id) if lease_id and self._release else True


def _open(view: memoryview, found: Found, key: bytes) -> Frame | None:
    try:
        header = parse_header(view, checksum=found.header_sum)
        check_expected(header, found.nbytes, found.header_nbytes, key)
    except FrameError:
        return None
    return Frame(header, view)
