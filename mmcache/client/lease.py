"""Frames under a lease: zero-copy views of the arena, or whole frames received, with the same face."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Final

from mmcache.client import rpc
from mmcache.client.protocol import PLANNING_NBYTES, Flow, Work
from mmcache.client.session import Session
from mmcache.errors import FrameError, LeaseLost, RequestRefused
from mmcache.frame import check_expected, parse_header
from mmcache.frame_view import Frame
from mmcache.transport.base import Found
from mmcache.transport.planned import headers_of_run

LEASE_LOST: Final = "the lease expired before it was given back: drop what was read; use it for less long"
Taken = tuple[list[Frame | None], list[int]]  # a frame or None for each key, and the leases' ids


def nothing_taken(count: int) -> Taken:
    """What a server that cannot be asked leases of `count` keys."""
    return [None] * count, []


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

    def __enter__(self) -> LeasedFrames:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        held = self.release()
        if not held and error is None:
            raise LeaseLost(LEASE_LOST)

    def release(self) -> bool:
        """Give the lease back; True if everything seen under it was right until now. Safe to call twice."""
        lease_ids, self._lease_ids = self._lease_ids, []
        self.frames = [None] * len(self.frames)
        return self._release(lease_ids) if lease_ids and self._release else True


def take_lease(session: Session, digests: Sequence[bytes]) -> Flow[Taken]:
    """Acquire, in as many batches as the server's limits ask for.

    A frame whose header does not verify, or that is another key's, counts as a miss; so does an entry that the
    server cannot lease now because too much memory is leased. If the link breaks, what was leased expires.
    """
    if session.rpc is not None:
        return (yield from rpc.take(session, digests)), []
    frames: list[Frame | None] = []
    lease_ids: list[int] = []
    limits = session.joined.limits
    try:
        while len(frames) < len(digests):
            wanted = digests[len(frames) : len(frames) + limits.batch_keys]
            acquired = yield from session.conversation.acquire(
                b"".join(wanted), inline=session.arena is None, max_nbytes=limits.inline_nbytes
            )
            if acquired.lease_id:
                lease_ids.append(acquired.lease_id)
            count = len(wanted) if acquired.later_from is None else acquired.later_from
            if count == 0:
                break
            places = acquired.entries[:count]
            if session.arena is not None:
                opening = partial(_open_mapped, session.arena.view, places, wanted)
            else:
                views = yield from _receive(session, places)
                opening = partial(_open_all, views, places, wanted)
            frames += yield Work(opening, count * PLANNING_NBYTES)
    except RequestRefused:
        for lease_id in lease_ids:
            yield from session.conversation.release_quietly(lease_id)
        raise
    return frames + [None] * (len(digests) - len(frames)), lease_ids


def _receive(session: Session, places: Sequence[Found | None]) -> Flow[list[memoryview | None]]:
    views: list[memoryview | None] = []
    for place in places:
        views.append((yield from session.conversation.receive_whole(place)).toreadonly() if place else None)
    return views


def _open_mapped(memory: memoryview, places: Sequence[Found | None], keys: Sequence[bytes]) -> list[Frame | None]:
    """The frames where they lie in the arena's memory."""
    found = [place for place in places if place is not None]
    if len(found) == len(places) and (run := headers_of_run(memory, found, keys[: len(found)])) is not None:
        data, (_, _, _, header_nbytes, nbytes, _) = run
        headers = [data[at : at + header_nbytes] for at in range(0, len(data), header_nbytes)]
        rows = zip(headers, found, strict=True)
        return [Frame(header, memory[place[0] : place[0] + nbytes]) for header, place in rows]
    views = [place and memory[place.offset : place.offset + place.nbytes] for place in places]
    return _open_all(views, places, keys)


def _open_all(
    views: Sequence[memoryview | None], places: Sequence[Found | None], keys: Sequence[bytes]
) -> list[Frame | None]:
    rows = zip(views, places, keys, strict=False)
    return [_open(view, place, key) if view is not None and place else None for view, place, key in rows]


def _open(view: memoryview, found: Found, key: bytes) -> Frame | None:
    try:
        header = parse_header(view, checksum=found.header_sum)
        check_expected(header, found.nbytes, found.header_nbytes, key)
    except FrameError:
        return None
    return Frame(header, view)
