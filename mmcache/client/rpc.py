"""Every call over gRPC, as flows of calls: tensors instead of frames, and no lease, so nothing stays pinned.

A reply is not trusted: what came is made into the frame it says it was, which checks it as a frame is checked, and
the tensors' checksums are taken of the bytes as they lie in the destinations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Final, TypeVar

import numpy as np
import xxhash
from google.protobuf.message import DecodeError, Message

from mmcache.client.batch import described
from mmcache.client.plan import batches, runs_within
from mmcache.client.protocol import Conversation, Flow, Work, put_result, slices_of
from mmcache.client.session import Session
from mmcache.config import GiB
from mmcache.errors import CorruptFrame, FrameError, MMCacheError, ProtocolError, TensorError
from mmcache.frame import (
    MAX_DIMS,
    MAX_FRAME_NBYTES,
    NO_KEY,
    SUM_NBYTES,
    FrameHeader,
    FrameMeta,
    Kind,
    StoredTensor,
    TensorSpec,
    layout_of,
    pack_header,
    parse_header,
)
from mmcache.frame_view import Frame
from mmcache.keyset import Keys
from mmcache.media import Media
from mmcache.pb import cache_pb2 as pb
from mmcache.tensors import Bytes, HostTensor, destinations, specs_of
from mmcache.transport.base import HIT, MISS, Op, Outcome, Result
from mmcache.transport.large_bodies import (
    FIELDS_PER_KEY,
    EntryOut,
    Malformed,
    OverLimit,
    Piece,
    TooMany,
    entry_pieces,
    fields_of,
    open_get,
)

REPLY_FIELDS: Final = 1 << 20  # that one Get's reply may have: some tens of MiB while they are looked at
ASK_FIRST_NBYTES: Final = 1 << 20  # to store more than this, first ask what is there: less goes in the time of that
# A message's values, unless one alone is larger: glibc takes much larger blocks from the system and gives them back
# each time, and faulting them in costs more than copying (docs/grpc.md).
MESSAGE_NBYTES: Final = 8 << 20
REPLY_NBYTES_PER_KEY: Final = 16  # of an entry that is not there, and to spare
FULL: Final = "too much memory is leased; release leases or raise --memory"
Ask = Callable[[str, bytes], bytes]
M = TypeVar("M", bound=Message)


class RpcConversation(Conversation):
    """Requests as gRPC calls. Only `call` is there: what comes with payload is `get`, `put` and `take`."""

    __slots__ = ("_ask",)

    def __init__(self, ask: Ask) -> None:
        super().__init__()
        self._ask = ask

    def call(self, op: Op, message: Message, reply: M) -> Flow[M]:
        """As `Conversation.call`."""
        body = yield Work(partial(self._ask, op.name.capitalize(), message.SerializeToString()), 0, waits=True)
        _read(reply, body)
        if isinstance(reply, pb.ContainsReply):
            self.mode = reply.mode
        return reply


def limits_of(reply: pb.StatReply) -> pb.JoinReply:
    """What a session must know of its server, from the only call that tells it here. Raises ProtocolError."""
    limits = reply.limits
    if not (limits.batch_keys and limits.inline_nbytes and limits.message_nbytes):
        raise ProtocolError("the server does not say its limits over gRPC: upgrade it, or use the framed protocol")
    try:
        layout_of([], reply.alignment)
    except TensorError as error:
        raise ProtocolError(f"the server's frames make no sense: {error}") from None
    limits.message_nbytes = min(limits.message_nbytes, GiB)  # more is not received
    return pb.JoinReply(server=reply.server, server_id=reply.server_id, limits=limits, alignment=reply.alignment)


def get(
    session: Session,
    digests: Sequence[bytes],
    targets: Sequence[Mapping[str, HostTensor]],
    results: list[Result],
    verify: bool,
) -> Flow[None]:
    """Read into the destinations; one Result a key."""
    position = 0
    while position < len(digests):
        rest = digests[position:]
        layout = layout_of([one.data.nbytes for one in targets[position].values()], session.joined.alignment)
        room = layout.frame_nbytes + REPLY_NBYTES_PER_KEY * (1 + len(rest))
        for entry in (yield from _some(session, rest, max(MESSAGE_NBYTES, room))):
            if isinstance(entry, EntryOut):
                results[position] = _land(entry, session.joined, digests[position], targets[position], verify)
            else:
                results[position] = entry
            position += 1


def take(session: Session, digests: Sequence[bytes]) -> Flow[list[Frame | None]]:
    """Receive entries whole; a frame or None a key. The frames are this process's own: no lease is needed."""
    frames: list[Frame | None] = []
    while len(frames) < len(digests):
        for entry in (yield from _some(session, digests[len(frames) :], MESSAGE_NBYTES)):
            key = digests[len(frames)]
            frames.append(_frame(entry, session.joined, key) if isinstance(entry, EntryOut) else None)
    return frames


def _some(session: Session, digests: Sequence[bytes], room: int) -> Flow[list[EntryOut | Result]]:
    """What one Get answers of the first keys: at least one, as many as the limits and `room` bytes allow; one that is
    larger than that is asked for again, alone."""
    limits = session.joined.limits
    keys, room = digests[: limits.batch_keys], min(room, limits.message_nbytes)
    request = pb.GetRequest(keys=b"".join(keys), max_nbytes=room)
    try:
        body = yield from _ask(session, "Get", request.SerializeToString())
        reply, entries = open_get(body, REPLY_FIELDS)
    except (OverLimit, TooMany) as error:
        if len(keys) > 1 or room < limits.message_nbytes:
            return (yield from _some(session, keys[:1], limits.message_nbytes))
        return [Result(Outcome.MISS, str(error) or "an entry of more parts than this client reads over gRPC")]
    except Malformed as error:
        raise ProtocolError(f"the server's reply cannot be read: {error}") from None
    if len(entries) != len(keys):
        raise ProtocolError(f"the server answered {len(entries)} of {len(keys)} keys")
    session.conversation.mode = reply.mode
    status = [entry.message.status for entry in entries]
    count = status.index(pb.LATER) if pb.LATER in status else len(keys)
    if not count:
        return [Result(Outcome.MISS, FULL)]
    return [entry if entry.message.status == pb.FOUND else MISS for entry in entries[:count]]


def _ask(session: Session, method: str, body: bytes) -> Flow[bytes]:
    assert session.rpc is not None
    answer: bytes = yield Work(partial(session.rpc, method, body), len(body), waits=True)
    return answer


def _header(entry: EntryOut, joined: pb.JoinReply) -> tuple[bytes, FrameHeader]:
    """The header of the frame that an entry says it was, but for who wrote it. Raises FrameError, or UsageError."""
    message = entry.message
    try:
        kind = Kind[message.kind.upper()]
    except KeyError:
        raise FrameError(f"kind {message.kind[:40]!r} is unknown") from None
    meta = FrameMeta(
        kind=kind,
        key=message.key,
        namespace=message.namespace,
        parent=message.parent or NO_KEY,
        home=message.home,
        chain_index=message.chain_index,
        created_ms=message.created_ms,
        expires_ms=message.expires_ms,
        writer="",
    )
    if any(len(one.shape) > MAX_DIMS for one, _ in entry.tensors):  # else multiplying a million sizes takes minutes
        raise FrameError(f"a tensor of more than {MAX_DIMS} dimensions")
    specs = [TensorSpec(one.name, one.dtype, tuple(one.shape)) for one, _ in entry.tensors]
    for spec, (one, data) in zip(specs, entry.tensors, strict=True):
        if len(data) != spec.nbytes or len(one.xxh3_128) != SUM_NBYTES:
            raise FrameError(f"tensor {spec.name!r}: its bytes, or its checksum's, are not as many as they must be")
    header = pack_header(meta, specs, [one.xxh3_128 for one, _ in entry.tensors], joined.alignment)
    return header, parse_header(header, limit_nbytes=MAX_FRAME_NBYTES)


def _land(entry: EntryOut, joined: pb.JoinReply, key: bytes, buffers: Mapping[str, HostTensor], verify: bool) -> Result:
    try:
        _, header = _header(entry, joined)
        if verify and header.meta.key != key:
            raise CorruptFrame("the frame belongs to another key")
    except MMCacheError as error:
        return Result(Outcome.CORRUPT, str(error))
    targets = destinations(header, buffers)
    if isinstance(targets, str):
        return Result(Outcome.MISMATCH, targets)
    good = True
    for stored, (_, data), target in zip(header.tensors, entry.tensors, targets, strict=True):
        good &= _fill(target, data, stored.checksum if verify else None)
    return HIT if good else Result(Outcome.CORRUPT, "a tensor's checksum does not match")


def _fill(target: Bytes, data: memoryview, checksum: bytes | None) -> bool:
    """Copy into a destination, and say whether what lies there has the checksum."""
    state, position = xxhash.xxh3_128(), 0
    for views in slices_of(target):
        for view in views:
            view[:] = data[position : position + len(view)]
            position += len(view)
            if checksum is not None:
                state.update(view)
    return checksum is None or state.digest() == checksum


def _frame(entry: EntryOut, joined: pb.JoinReply, key: bytes) -> Frame | None:
    try:
        head, header = _header(entry, joined)
    except MMCacheError:
        return None
    if header.meta.key != key:
        return None
    try:
        data = np.zeros(header.frame_nbytes, np.uint8).data
    except MemoryError:
        raise ProtocolError(f"a frame of {header.frame_nbytes} bytes does not fit this process's memory") from None
    data[: len(head)] = head
    for stored, (_, payload) in zip(header.tensors, entry.tensors, strict=True):
        data[stored.offset : stored.offset + stored.nbytes] = payload
    return Frame(header, data.toreadonly())


def put(
    session: Session,
    rows: Keys,
    values: Sequence[Mapping[str, HostTensor]],
    results: list[Result],
    ttl_s: float | None,
    media: Sequence[Media | None],
) -> Flow[None]:
    """Store what is not there yet, call by call: each says the facts of its namespace, as each may reach another
    server."""
    limits, alignment = session.joined.limits, session.joined.alignment
    sizes = [layout_of([t.data.nbytes for t in value.values()], alignment).frame_nbytes for value in values]
    waiting = list(range(len(rows)))
    if sum(sizes) > ASK_FIRST_NBYTES:
        present = yield from _present(session, rows.digests)
        waiting = [at for at in waiting if not present[at]]
        for at, there in enumerate(present):
            if there:
                results[at] = put_result(pb.PRESENT)
    heads = {namespace: _opening(namespace) for namespace in set(rows.namespaces)}
    room = limits.message_nbytes - max(map(len, heads.values()), default=0)
    for at in waiting:
        if sizes[at] > room:
            results[at] = Result(
                Outcome.REFUSED,
                f"{sizes[at]} bytes, and a gRPC message to this server has at most {limits.message_nbytes}; raise "
                "MMCACHE_MAX_GRPC_NBYTES there, split the tensor, or use the framed protocol",
            )
    costs = [(1, size, fields_of(specs_of(value))) for size, value in zip(sizes, values, strict=True)]
    most = (
        limits.batch_keys,
        min(limits.inline_nbytes, room, MESSAGE_NBYTES),
        FIELDS_PER_KEY * limits.batch_keys - max(map(_facts_of, heads), default=0),
    )
    for run in _runs(rows, [at for at in waiting if sizes[at] <= room], costs, most):
        pieces: list[Piece] = [heads[rows.namespaces[run[0]]]]
        for at in run:
            pieces += _pieces(rows, at, values[at], ttl_s, media[at] if media else None)
        for at, result in zip(run, (yield from _send(session, b"".join(pieces), len(run))), strict=True):
            results[at] = result


def _send(session: Session, body: bytes, count: int) -> Flow[list[Result]]:
    try:
        reply = _read(pb.PutReply(), (yield from _ask(session, "Put", body)))
    except OverLimit as error:
        return [Result(Outcome.REFUSED, str(error))] * count
    if len(reply.status) != count:
        raise ProtocolError(f"the server answered {len(reply.status)} of {count} entries")
    session.conversation.mode = reply.mode
    return [put_result(status) for status in reply.status]


def _runs(
    rows: Keys, waiting: Sequence[int], costs: Sequence[tuple[int, int, int]], most: tuple[int, int, int]
) -> Iterator[list[int]]:
    """Which entries go in one Put: those that follow each other in one namespace, within the limits."""
    for _, group in groupby(waiting, key=rows.namespaces.__getitem__):
        places = list(group)
        for run in runs_within([costs[at] for at in places], most):
            yield places[run.start : run.stop]


def _present(session: Session, digests: Sequence[bytes]) -> Flow[list[bool]]:
    flags: list[bool] = []
    for run in batches(len(digests), session.joined.limits.batch_keys):
        request = pb.ContainsRequest(keys=b"".join(digests[run.start : run.stop]))
        reply = yield from session.conversation.call(Op.CONTAINS, request, pb.ContainsReply())
        if len(reply.present) != len(run):
            raise ProtocolError(f"the server answered {len(reply.present)} of {len(run)} keys")
        flags += map(bool, reply.present)
    return flags


def _facts_of(namespace: bytes) -> int:
    """How many fields a Put spends on its namespace."""
    return 2 + len(described(namespace).facts)


def _opening(namespace: bytes) -> bytes:
    known = described(namespace)
    return pb.PutRequest(kind=known.kind, namespace=known, facts=known.facts).SerializeToString()


def _pieces(
    rows: Keys, at: int, value: Mapping[str, HostTensor], ttl_s: float | None, medium: Media | None
) -> list[Piece]:
    entry = pb.PutEntry(
        key=rows.digests[at],
        parent=b"" if rows.parents[at] == NO_KEY else rows.parents[at],
        home=rows.homes[at],
        chain_index=rows.indices[at],
        ttl_ms=max(1, int(ttl_s * 1000)) if ttl_s is not None else 0,
        modality=medium.code if medium else 0,  # type: ignore[arg-type]
        media_units=medium.units if medium else 0,
    )
    tensors = []
    for spec, tensor in zip(specs_of(value), value.values(), strict=True):
        data = tensor.data.data
        tensors.append((StoredTensor(spec, 0, len(data), xxhash.xxh3_128_digest(data)), data))
    return entry_pieces(entry, tensors)


def _read(reply: M, body: bytes) -> M:
    try:
        reply.ParseFromString(body)
    except DecodeError as error:
        raise ProtocolError(f"the server's reply cannot be read: {error}") from None
    return reply
