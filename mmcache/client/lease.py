"""Frames under a lease: zero-copy views of the arena, or whole frames received, with the same face."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType

from mmcache.client.link import Link
from mmcache.errors import FrameError, LeaseLost, RequestRefused
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
        self,
        frames: Sequence[Frame | None],
        lease_ids: Sequence[int] = (),
        release: Callable[[Sequence[int]], bool] | None = None,
    ) -> None:
        self.frames = list(frames)
        self._lease_ids, self._release = list(lease_ids), release

    @classmethod
    def take(
        cls, link: Link, digests: Sequence[bytes], deadline: float, release: Callable[[Sequence[int]], bool]
    ) -> LeasedFrames:
        """Acquire over `link`, in as many batches as the server's limits ask for.

        A frame whose header does not verify, or that is another key's, counts as a miss; so does an entry that the
        server cannot lease now because too much memory is leased. If the link breaks, what was leased expires.
        """
        frames: list[Frame | None] = []
        lease_ids: list[int] = []
        try:
            while len(frames) < len(digests):
                wanted = digests[len(frames) : len(frames) + link.joined.limits.batch_keys]
                flow = link.conversation.acquire(
                    b"".join(wanted), inline=link.arena is None, max_nbytes=link.joined.limits.inline_nbytes
                )
                acquired = link.run(flow, deadline)
                if acquired.lease_id:
                    lease_ids.append(acquired.lease_id)
                count = len(wanted) if acquired.later_from is None else acquired.later_from
                if count == 0:
                    break
                for key, found in zip(wanted[:count], acquired.entries, strict=False):
                    frames.append(_received(link, found, key, deadline) if found else None)
        except RequestRefused:
            for lease_id in lease_ids:
                link.run(link.conversation.release_quietly(lease_id), deadline)
            raise
        return cls(frames + [None] * (len(digests) - len(frames)), lease_ids, release)

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
        lease_ids, self._lease_ids = self._lease_ids, []
        self.frames = [None] * len(self.frames)
        return self._release(lease_ids) if lease_ids and self._release else True


def _received(link: Link, found: Found, key: bytes, deadline: float) -> Frame | None:
    if link.arena is None:
        data = memoryview(link.run(link.conversation.receive_whole(found), deadline)).toreadonly()
    else:
        data = link.arena.view[found.offset : found.offset + found.nbytes]
    return _open(data, found, key)


def _open(view: memoryview, found: Found, key: bytes) -> Frame | None:
    try:
        header = parse_header(view, checksum=found.header_sum)
        check_expected(header, found.nbytes, found.header_nbytes, key)
    except FrameError:
        return None
    return Frame(header, view)
