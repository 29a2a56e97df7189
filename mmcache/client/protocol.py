"""The client's side of the conversation, without I/O: generators that yield what to send or receive next.

A driver (blocking sockets in link.py, asyncio in aio_link.py) runs them: it performs each yielded effect and sends its
result back in, or throws its error. Effects are `Send(buffers)`, `Recv(nbytes)` answered with bytes, `RecvInto(views)`
answered when all are full, and `Work(call, nbytes)` answered with what the call returns.
Everything received is checked here: a reply that does not fit its request raises ProtocolError, and the driver must
then drop the connection. Payload checks (checksums, key echo) end in an Outcome, never in an exception.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from operator import gt
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np
import xxhash
from google.protobuf.message import DecodeError, Message

from mmcache.errors import AccessDenied, FrameError, ProtocolError, RequestRefused
from mmcache.frame import (
    MAX_FRAME_NBYTES,
    MAX_HEADER_NBYTES,
    FrameHeader,
    check_expected,
    parse_header,
)
from mmcache.pb import cache_pb2 as pb
from mmcache.tensors import Bytes, HostTensor, destinations
from mmcache.transport.base import (
    HIT,
    MAX_BODY_NBYTES,
    PLACE,
    PRELUDE_NBYTES,
    SLICE_NBYTES,
    SLOT_DONE,
    Found,
    Op,
    Outcome,
    Prelude,
    Result,
    pack_prelude,
    parse_prelude,
)

KEY_NBYTES: Final = 32
STOPPED_WRITES, STOPPED_READS = 1, 2  # bits of a Mode
_TELL_THE_MODE: Final = frozenset({Op.CONTAINS, Op.ACQUIRE, Op.RESERVE, Op.PUT_DONE})
_new = tuple.__new__
_FOUND, _LATER = int(pb.FOUND), int(pb.LATER)
PLANNING_NBYTES: Final = 64 << 10  # reading a frame's header takes about as long as copying this
MAX_FORKS_NBYTES: Final = 512 * KEY_NBYTES
RIDER_NBYTES: Final = 1 << 20  # an idle client may pin this much until its lease expires


class Send(NamedTuple):
    """Send these buffers in order."""

    buffers: Sequence[bytes | memoryview]


class Recv(NamedTuple):
    """Receive exactly this many bytes; the answer is the bytes."""

    nbytes: int


class RecvInto(NamedTuple):
    """Fill these views, in order."""

    views: Sequence[memoryview]


class Work(NamedTuple):
    """Call this, which copies or hashes about `nbytes` bytes, mostly outside the GIL; with `waits`, it also waits for
    somebody, until the session's deadline at most. It is over when the answer comes, and when an error does: nothing is
    written afterwards."""

    call: Callable[[], Any]
    nbytes: int
    waits: bool = False


class SendWithFds(NamedTuple):
    """Send these bytes, file descriptors beside the first (unix sockets only)."""

    data: bytes
    fds: Sequence[int]


class RecvWithFds(NamedTuple):
    """Receive exactly this many bytes; the answer is the bytes and the descriptors beside them, now the flow's."""

    nbytes: int


Effect = Send | Recv | RecvInto | Work | SendWithFds | RecvWithFds
Segments = Sequence[bytes | memoryview]
_T = TypeVar("_T")
_M = TypeVar("_M", bound=Message)
Flow = Generator[Effect, Any, _T]


class Acquired(NamedTuple):
    """An Acquire reply: one entry a key (None: not pinned), the lease, and from which entry on to ask again."""

    lease_id: int
    entries: list[Found | None]
    later_from: int | None


class Conversation:
    """The state of one connection: the request counter, and a lease to give back with the next Acquire.

    One request is under way at a time.
    """

    __slots__ = ("_request_id", "forks", "mode", "rider")

    def __init__(self) -> None:
        self._request_id = 0
        # What the server said is stopped: STOPPED_WRITES, STOPPED_READS. None: it said nothing since that was noted.
        self.mode: int | None = None
        self.rider = 0
        self.forks = b""  # what the server said are forks, 32 bytes each, since that was noted

    def request(self, op: Op, message: Message) -> bytes:
        """The bytes that ask `op`."""
        self._request_id = self._request_id % 0xFFFFFFFF + 1
        body = message.SerializeToString()
        return pack_prelude(op, self._request_id, len(body)) + body

    def reply(self, op: Op, reply: _M, head: bytes = b"") -> Flow[tuple[_M, Prelude]]:
        """Receive the reply to the last request into `reply`. Raises RequestRefused with the server's words.

        `head` is what of it was received already.
        """
        prelude = parse_prelude(head + (yield Recv(PRELUDE_NBYTES - len(head))), MAX_BODY_NBYTES)
        body = (yield Recv(prelude.body_nbytes)) if prelude.body_nbytes else b""
        try:
            if prelude.op == Op.ERROR and not prelude.payload_nbytes:
                raise refusal_of(pb.ErrorReply.FromString(body))
            if prelude.op != op or prelude.request_id != self._request_id:
                raise ProtocolError(f"the server answered {prelude.op.name} to {op.name}")
            reply.ParseFromString(body)
        except DecodeError as error:
            raise ProtocolError(f"the server's reply cannot be read: {error}") from None
        if op in _TELL_THE_MODE:
            self.mode = reply.mode  # type: ignore[attr-defined]
            if op is not Op.PUT_DONE and (forks := reply.forks) and len(self.forks) < MAX_FORKS_NBYTES:  # type: ignore[attr-defined]
                self.forks += forks[:MAX_FORKS_NBYTES]
        return reply, prelude

    def call(self, op: Op, message: Message, reply: _M) -> Flow[_M]:
        """One request and its reply, neither with payload."""
        yield Send((self.request(op, message),))
        answer, prelude = yield from self.reply(op, reply)
        if prelude.payload_nbytes:
            raise ProtocolError(f"unexpected payload after {op.name}")
        return answer

    def release_quietly(self, lease_id: int) -> Flow[None]:
        """Give a lease back without an answer (request id 0 asks for none)."""
        body = pb.FinishRequest(lease_id=lease_id).SerializeToString()
        yield Send((pack_prelude(Op.FINISH, 0, len(body)) + body,))

    def acquire(
        self, keys: bytes, *, prefix: bool = False, inline: bool = False, max_nbytes: int = 0
    ) -> Flow[Acquired]:
        """Look up and pin `keys` (32 bytes each). With inline, payload follows: receive it frame by frame."""
        message = pb.AcquireRequest(keys=keys, prefix=prefix, inline=inline, release=self.rider, max_nbytes=max_nbytes)
        self.rider = 0
        yield Send((self.request(Op.ACQUIRE, message),))
        reply, prelude = yield from self.reply(Op.ACQUIRE, pb.AcquireReply())
        acquired = _read_acquired(reply, len(keys) // KEY_NBYTES, prefix)
        sizes = [found.nbytes for found in acquired.entries if found]
        if prelude.payload_nbytes != (sum(sizes) if inline else 0):
            raise ProtocolError(f"{prelude.payload_nbytes} payload bytes announced, {sum(sizes)} listed")
        if max_nbytes and len(sizes) > 1 and sum(sizes) > max_nbytes:
            raise ProtocolError(f"{sum(sizes)} bytes came where at most {max_nbytes} were asked for")
        if sizes and not inline and not acquired.lease_id:
            raise ProtocolError("the server said where frames lie, and pinned none of them")
        return acquired

    def receive_frame(self, found: Found, key: bytes, buffers: Mapping[str, HostTensor], verify: bool) -> Flow[Result]:
        """Receive one inline frame straight into its destinations, verified as it lands."""
        header_bytes = yield Recv(found.header_nbytes)
        try:
            header = parse_header(header_bytes, limit_nbytes=found.nbytes, checksum=found.header_sum, verify=verify)
            check_expected(header, found.nbytes, found.header_nbytes, key if verify else None)
        except FrameError as error:
            yield from _drain(found.nbytes - found.header_nbytes)
            return Result(Outcome.CORRUPT, str(error))
        targets = destinations(header, buffers)
        if isinstance(targets, str):
            yield from _drain(found.nbytes - found.header_nbytes)
            return Result(Outcome.MISMATCH, targets)
        good = yield from _receive_tensors(header, targets, verify)
        return HIT if good else Result(Outcome.CORRUPT, "a tensor's checksum or padding does not match")

    def receive_whole(self, found: Found) -> Flow[memoryview]:
        """Receive one inline frame as bytes, unchecked. Memory is taken as they arrive, not as they are announced."""
        try:
            data = np.empty(found.nbytes, np.uint8).data
        except MemoryError:
            raise ProtocolError(f"a frame of {found.nbytes} bytes does not fit this process's memory") from None
        yield RecvInto((data,))
        return data

    def reserve(
        self,
        keys: bytes,
        parents: bytes,
        frame_nbytes: Sequence[int],
        kinds: bytes,
        ring: bool,
        **columns: Any,
    ) -> Flow[bytes]:
        """Ask to store frames of these sizes and kinds; the answer is one PutStatus byte a key.

        `columns` are those of protocol 2: namespaces, modalities, media_units.
        """
        message = pb.ReserveRequest(
            keys=keys, parents=parents, frame_nbytes=frame_nbytes, kinds=kinds, ring=ring, **columns
        )
        reply = yield from self.call(Op.RESERVE, message, pb.ReserveReply())
        if len(reply.status) != len(frame_nbytes):
            raise ProtocolError("the server answered another number of keys than asked")
        if pb.STORED in reply.status:
            raise ProtocolError("the server says a frame is stored that was not sent yet")
        return reply.status

    def put_done(self, sending: Flow[None], count: int) -> Flow[bytes]:
        """Send the wanted frames; the answer is one PutStatus byte a frame."""
        yield from sending
        reply, prelude = yield from self.reply(Op.PUT_DONE, pb.PutReply())
        if len(reply.status) != count or prelude.payload_nbytes:
            raise ProtocolError("the server answered another number of frames than sent")
        return reply.status

    def slot_done(self) -> Flow[None]:
        """Wait for the server's note that the oldest slot of the ring is free again."""
        note = yield Recv(len(SLOT_DONE))
        if note != SLOT_DONE:
            words = "it cannot be read"
            with contextlib.suppress(ProtocolError):
                try:
                    yield from self.reply(Op.ERROR, pb.ErrorReply(), note)
                except RequestRefused as refusal:
                    words = str(refusal)
            raise ProtocolError(f"instead of a note about a ring slot the server said: {words}")


def refusal_of(reply: pb.ErrorReply) -> RequestRefused:
    """What an ERROR says, to be raised."""
    kind = AccessDenied if reply.code == pb.ErrorReply.DENIED else RequestRefused
    return kind(reply.message or "the server refused without a reason")


def _read_acquired(reply: pb.AcquireReply, asked: int, prefix: bool) -> Acquired:
    status, places = reply.status, reply.places
    count = status.count(_FOUND)
    if len(status) > asked or (not prefix and len(status) != asked):
        raise ProtocolError(f"{len(status)} statuses for {asked} keys")
    if len(places) != count * PLACE.size:
        raise ProtocolError(f"{len(places)} bytes of places for {count} found keys")
    found = [_new(Found, place) for place in PLACE.iter_unpack(places)]
    if found:
        _, sizes, header_sizes, _ = zip(*found, strict=True)
        possible = min(header_sizes) > 0 and max(header_sizes) <= MAX_HEADER_NBYTES and max(sizes) <= MAX_FRAME_NBYTES
        if not possible or any(map(gt, header_sizes, sizes)):
            raise ProtocolError("a frame or a header of an impossible size")
    entries: list[Found | None] = [*found]
    if count != asked:
        present = iter(found)
        entries = [next(present) if code == _FOUND else None for code in status] + [None] * (asked - len(status))
    later = status.find(_LATER)
    return Acquired(reply.lease_id, entries, None if later < 0 else later)


def _drain(nbytes: int) -> Flow[None]:
    scratch = memoryview(bytearray(min(nbytes, SLICE_NBYTES)))
    while nbytes:
        yield RecvInto((scratch[:nbytes],))
        nbytes -= min(nbytes, len(scratch))


def slices_of(target: Bytes) -> Iterator[list[memoryview]]:
    """A destination's memory in order, about SLICE_NBYTES at a time: cut, or several of its pieces."""
    if target.ndim == 2:
        step = max(1, SLICE_NBYTES // max(1, target.shape[1]))
        for start in range(0, len(target), step):
            yield [piece.data for piece in target[start : start + step]]
    else:
        view = target.data
        for start in range(0, len(view), SLICE_NBYTES):
            yield [view[start : start + SLICE_NBYTES]]


def _receive_tensors(header: FrameHeader, targets: Sequence[Bytes], verify: bool) -> Flow[bool]:
    good, end = True, header.header_nbytes
    for stored, target in zip(header.tensors, targets, strict=True):
        if stored.offset > end:
            good &= not any((yield Recv(stored.offset - end)))
        state = xxhash.xxh3_128()
        for views in slices_of(target):
            yield RecvInto(views)
            if verify:
                for view in views:
                    state.update(view)
        good &= not verify or state.digest() == stored.checksum
        end = stored.offset + stored.nbytes
    return good


STOPPED_WORDS: Final = {
    0: "",
    STOPPED_WRITES: "an operator has stopped writes (mmcache mode)",
    STOPPED_READS: "an operator has stopped reads (mmcache mode)",
}
_PUT_RESULTS: Final = {
    pb.STORED: Result(Outcome.STORED),
    pb.PRESENT: Result(Outcome.PRESENT),
    pb.BUSY: Result(Outcome.REFUSED, "another client is writing this key"),
    pb.FULL: Result(Outcome.REFUSED, "no room: every entry is leased, being written or has children; raise --memory"),
    pb.TOO_LARGE: Result(Outcome.REFUSED, "larger than the server stores; raise --memory or split the tensor"),
    pb.NO_ENTRIES: Result(Outcome.REFUSED, "the index is full; raise --max-entries"),
    pb.BAD_FRAME: Result(Outcome.REFUSED, "the bytes that arrived were not the frame that was sent"),
    pb.LOST: Result(Outcome.REFUSED, "the reservation expired before all bytes arrived"),
    pb.EXPIRED: Result(
        Outcome.REFUSED,
        "its time to live had passed by the server's clock before it was stored: the clocks of this host and the "
        "server's differ, set them; or raise ttl_s",
    ),
    pb.QUOTA: Result(Outcome.REFUSED, "the tenant's quota, or the namespace's, is used up; remove entries or raise it"),
    pb.STOPPED: Result(Outcome.REFUSED, STOPPED_WORDS[STOPPED_WRITES]),
    pb.OVERLOADED: Result(Outcome.REFUSED, "too many bytes in flight at the server; try again later"),
}


def put_result(status: int) -> Result:
    """The Result that a PutStatus byte means. Raises ProtocolError for one this release does not know."""
    try:
        return _PUT_RESULTS[status]  # type: ignore[index]
    except KeyError:
        raise ProtocolError(f"put status {status} is unknown to this release") from None
