"""The public carrier's operations, in tensors: what Get and Put mean, and that the others mean what they always do.

No gRPC here: a method's name and body in, a message out. Frames are packed, reserved and landed as those that come
over a socket are, so limits, refusals and checks are the same.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import chain
from typing import Final, NamedTuple

import xxhash

from mmcache._version import __version__
from mmcache.errors import FrameError, KeyInputError, TensorError
from mmcache.frame import (
    MAX_DIMS,
    NO_KEY,
    SUM_NBYTES,
    FrameMeta,
    Kind,
    TensorSpec,
    check_specs,
    frame_segments,
    layout_of,
    pack_header,
    parse_header,
)
from mmcache.keys import namespace_id
from mmcache.pb import cache_pb2 as pb
from mmcache.server.caller import Caller
from mmcache.server.refuse import BadRequest, parse
from mmcache.server.service import KEY_NBYTES, Service, status_of
from mmcache.store.answers import Found, Refusal
from mmcache.store.landing import Landing
from mmcache.transport.base import Op
from mmcache.transport.large_bodies import (
    FIELDS_PER_KEY,
    EntryIn,
    Malformed,
    Piece,
    TooMany,
    entry_pieces,
    open_put,
)

log = logging.getLogger("mmcache.server")
WRITER: Final = f"mmcache/{__version__} grpc"
KINDS: Final = {kind.name.lower(): kind for kind in Kind}
METHODS: Final = tuple(method.name for method in pb.DESCRIPTOR.services_by_name["Cache"].methods)
ENTRY_NBYTES: Final = 8  # at most, of a reply's entry that was not found; one that was takes no more than its frame
MODALITIES: Final = frozenset(pb.Modality.values())
_MAX_MS: Final = 1 << 62


class Gone(Exception):
    """The caller has left, or its deadline has passed: nobody waits for the answer."""


Outgoing = tuple[list[Piece], tuple[bytes, ...]]
"""An entry of a Get's reply: its pieces, and its tensors' checksums."""


class Incoming(NamedTuple):
    """One checked entry of a Put: what its frame's header says, and the tensors' bytes."""

    meta: FrameMeta
    specs: tuple[TensorSpec, ...]
    payloads: tuple[memoryview, ...]
    sums: tuple[bytes, ...]  # as the client gave them; b"": it did not

    @property
    def sizes(self) -> list[int]:
        """Bytes of each tensor."""
        return [len(payload) for payload in self.payloads]


class TensorService:
    """Answers the methods of `service Cache` for one shard. Thread-safe."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.limit_nbytes = service.config.max_grpc_nbytes

    def call(
        self,
        method: str,
        caller: Caller,
        body: bytes,
        held: ExitStack,
        alive: Callable[[], bool] = lambda: True,
    ) -> bytes:
        """The reply to a method's request, as bytes. Raises BadRequest, or Gone once `alive` says no; nothing else.

        What a reply takes of the bytes in flight is given back when `held` is closed: close it when the reply is sent.
        """
        limit = self.limit_nbytes if method == "Put" else self.service.config.max_body_nbytes
        if len(body) > limit:
            raise BadRequest(
                f"a {method} of {len(body)} bytes is over the limit of {limit}; send fewer keys at once, "
                + ("raise MMCACHE_MAX_GRPC_NBYTES, " if method == "Put" else "")
                + "or use the framed protocol",
                pb.ErrorReply.LIMIT,
            )
        if method == "Get":
            return self._get(caller, parse(pb.GetRequest(), body), held, alive)
        if method == "Put":
            return self._put(caller, body, alive)
        reply = self.service.handle(Op[method.upper()], caller, body)
        if isinstance(reply, pb.StatReply):
            self._tell_limits(reply)
        return reply.SerializeToString()

    def _tell_limits(self, reply: pb.StatReply) -> None:
        """What the framed protocol's Join tells, which is not here."""
        config = self.service.config
        reply.alignment = config.alignment
        reply.limits.batch_keys = config.max_batch_keys
        reply.limits.inline_nbytes = config.max_batch_nbytes
        reply.limits.message_nbytes = self.limit_nbytes

    # Get

    def _get(self, caller: Caller, request: pb.GetRequest, held: ExitStack, alive: Callable[[], bool]) -> bytes:
        keys = self.service.split(request.keys)
        limit = min(self.limit_nbytes, request.max_nbytes or self.limit_nbytes)
        room = limit - ENTRY_NBYTES * (len(keys) + 1)
        if room <= 0:
            raise BadRequest(
                f"a reply of {limit} bytes has no room for {len(keys)} keys; ask for fewer, or raise max_nbytes",
                pb.ErrorReply.LIMIT,
            )
        asked = pb.AcquireRequest(keys=request.keys, prefix=request.prefix, inline=True, max_nbytes=room)
        reply, found, _ = self.service.acquire(caller, asked.SerializeToString())
        try:
            if found and found[0].nbytes > room:
                key = keys[reply.status.index(pb.FOUND)]
                raise BadRequest(
                    f"{key.hex()} has {found[0].nbytes} bytes, and this reply may have {limit}: raise the request's "
                    "max_nbytes or the server's MMCACHE_MAX_GRPC_NBYTES, or read it over the framed protocol",
                    pb.ErrorReply.LIMIT,
                )
            if not held.enter_context(self.service.inflight(sum(place.nbytes for place in found))):
                raise BadRequest("too many bytes are in flight; try again", pb.ErrorReply.LIMIT)
            answer, bad = self._copy_out(keys, reply, found, alive)
        finally:
            if reply.lease_id:
                self.service.shard.release(caller.tenant, reply.lease_id)
        for key in bad:
            log.warning("%s: what is stored does not match its checksum; checking it", key.hex())
            self.service.shard.recheck(caller.tenant, key)
        return answer

    def _copy_out(
        self, keys: Sequence[bytes], reply: pb.AcquireReply, found: Sequence[Found], alive: Callable[[], bool]
    ) -> tuple[bytes, list[bytes]]:
        """The reply, in which every tensor was hashed; and the keys whose entries are bad, and so are misses."""
        bad: list[bytes] = []
        places = iter(found)
        entries = [
            self._pieces(key, status, next(places) if status == pb.FOUND else None, bad)
            for key, status in zip(keys, reply.status, strict=False)
        ]
        end = pb.GetReply(mode=reply.mode).SerializeToString()
        while True:
            if not alive():
                raise Gone
            answer = b"".join([*chain.from_iterable(pieces for pieces, _ in entries), end])
            wrong = _wrong_entries(answer, entries)
            if not wrong:
                return answer, bad
            for place in wrong:
                bad.append(keys[place])
                entries[place] = self._pieces(keys[place], pb.MISS, None, bad)

    def _pieces(self, key: bytes, status: int, found: Found | None, bad: list[bytes]) -> Outgoing:
        """An entry's pieces and its tensors' checksums. A header that is not right makes it a miss, and `key` bad."""
        if found is None:
            return entry_pieces(pb.Entry(status=status), ()), ()  # type: ignore[arg-type]
        view = self.service.shard.view(found)
        try:
            header = parse_header(
                bytes(view[: found.header_nbytes]), limit_nbytes=found.nbytes, checksum=found.header_sum
            )
            if header.meta.key != key:
                raise FrameError("another key's frame")
        except FrameError:
            bad.append(key)
            return self._pieces(key, pb.MISS, None, bad)
        meta = header.meta
        entry = pb.Entry(
            status=pb.FOUND,
            kind=meta.kind.name.lower(),
            namespace=meta.namespace,
            parent=b"" if meta.parent == NO_KEY else meta.parent,
            home=meta.home,
            chain_index=meta.chain_index,
            created_ms=meta.created_ms,
            expires_ms=meta.expires_ms,
            key=meta.key,
        )
        tensors = [(one, view[one.offset : one.offset + one.nbytes]) for one in header.tensors]
        return entry_pieces(entry, tensors), tuple(one.checksum for one in header.tensors)

    # Put

    def _put(self, caller: Caller, body: bytes, alive: Callable[[], bool]) -> bytes:
        request, given = self._open(body)
        kind, namespace = namespace_of(request)
        now_ms = time.time_ns() // 1_000_000
        entries = [
            checked_entry(entry, kind, namespace, now_ms, f"entries[{place}]") for place, entry in enumerate(given)
        ]
        if request.facts:
            declared = pb.DeclareRequest(namespace=namespace, kind=request.kind, facts=request.facts)
            self.service.handle(Op.DECLARE, caller, declared.SerializeToString())
        status, landings = self.service.reserve(caller, self._reserve_request(given, entries))
        answer = bytearray(status)
        try:
            for place, landing in zip(_wanted(status), landings, strict=True):
                if not alive():
                    raise Gone
                answer[place] = self._land(entries[place], landing)
        finally:
            for landing in landings:
                landing.abort()
        return pb.PutReply(status=bytes(answer), mode=self.service.mode).SerializeToString()

    def _open(self, body: bytes) -> tuple[pb.PutRequest, list[EntryIn]]:
        most_keys = self.service.config.max_batch_keys
        try:
            request, entries = open_put(body, FIELDS_PER_KEY * most_keys)
        except Malformed as error:
            raise BadRequest(f"the request body cannot be read as PutRequest: {error}") from None
        except TooMany:
            raise BadRequest(
                f"a Put of more than {FIELDS_PER_KEY * most_keys} fields; put fewer entries at once",
                pb.ErrorReply.LIMIT,
            ) from None
        if len(entries) > most_keys:
            raise BadRequest(
                f"{len(entries)} entries in one Put; the limit is {most_keys}: split it", pb.ErrorReply.LIMIT
            )
        return request, entries

    def _reserve_request(self, given: Sequence[EntryIn], entries: Sequence[Incoming]) -> pb.ReserveRequest:
        alignment = self.service.config.alignment
        return pb.ReserveRequest(
            keys=b"".join(entry.meta.key for entry in entries),
            parents=b"".join(entry.meta.parent for entry in entries),
            frame_nbytes=[layout_of(entry.sizes, alignment).frame_nbytes for entry in entries],
            kinds=bytes(entry.meta.kind for entry in entries),
            namespaces=entries[0].meta.namespace if entries else b"",
            modalities=bytes(entry.message.modality for entry in given),
            media_units=[entry.message.media_units for entry in given],
        )

    def _land(self, entry: Incoming, landing: Landing) -> int:
        """Pack the frame, copy it into its extent, where it is checked again, and commit; its PutStatus."""
        sums = [xxhash.xxh3_128_digest(payload) for payload in entry.payloads]
        if any(given not in (b"", found) for given, found in zip(entry.sums, sums, strict=True)):
            landing.refusal = Refusal.BAD_FRAME
            return status_of(landing.commit())
        alignment = self.service.config.alignment
        header = pack_header(entry.meta, entry.specs, sums, alignment)
        for segment in frame_segments(header, entry.payloads, alignment):
            landing.land_from(memoryview(segment))
        return status_of(landing.commit())


def _wrong_entries(answer: bytes, entries: Sequence[Outgoing]) -> list[int]:
    """Which entries have a tensor that does not match its checksum, in the bytes that are to be sent."""
    wrong, view, position = [], memoryview(answer), 0
    for place, (pieces, sums) in enumerate(entries):
        start = position
        for number, piece in enumerate(pieces):
            # As entry_pieces lays them out: data are the fourth, sixth, ...
            tensor = (number - 3) // 2 if number >= 3 and number % 2 else -1
            end = start + len(piece)
            if tensor >= 0 and xxhash.xxh3_128_digest(view[start:end]) != sums[tensor]:
                wrong.append(place)
                break
            start = end
        position += sum(map(len, pieces))
    return wrong


def _wanted(status: bytes) -> Iterator[int]:
    return (place for place, one in enumerate(status) if one == pb.WANTED)


def namespace_of(request: pb.PutRequest) -> tuple[Kind, bytes]:
    """A Put's kind and namespace id. Raises BadRequest unless it names both, and the id is the facts' digest."""
    kind = KINDS.get(request.kind)
    if kind is None:
        raise BadRequest(f"kind {request.kind[:40]!r} is unknown; use one of {', '.join(KINDS)}")
    if not request.facts:
        return kind, _digest(request.namespace, "namespace")
    try:
        found = namespace_id(request.kind, request.facts)
    except KeyInputError as error:
        raise BadRequest(str(error)) from None
    if request.namespace not in (b"", found):
        raise BadRequest(
            "the namespace id is not the digest of these facts; the client must be of another keys version"
        )
    return kind, found


def checked_entry(given: EntryIn, kind: Kind, namespace: bytes, now_ms: int, where: str) -> Incoming:
    """An entry of a Put, checked but for its checksums. Raises BadRequest, which names the entry and the tensor."""
    entry = given.message
    key = _digest(entry.key, f"{where}.key")
    if entry.ttl_ms > _MAX_MS:
        raise BadRequest(f"{where}.ttl_ms is {entry.ttl_ms}; leave it out for no limit")
    if entry.modality not in MODALITIES:
        raise BadRequest(f"{where}.modality {entry.modality} is unknown to this release; leave it out")
    specs = []
    for tensor, _ in given.tensors:
        if len(tensor.shape) > MAX_DIMS:
            raise BadRequest(f"{where}: tensor {tensor.name!r} has {len(tensor.shape)} sizes; the limit is {MAX_DIMS}")
        specs.append(TensorSpec(tensor.name, tensor.dtype[:40], tuple(tensor.shape)))
    try:
        check_specs(specs)
    except TensorError as error:
        raise BadRequest(f"{where}: {error}") from None
    for spec, (tensor, data) in zip(specs, given.tensors, strict=True):
        if spec.nbytes != len(data):
            raise BadRequest(
                f"{where}: tensor {spec.name!r} has {len(data)} bytes of data; "
                f"{spec.dtype} of shape {list(spec.shape)} has {spec.nbytes}"
            )
        if len(tensor.xxh3_128) not in (0, SUM_NBYTES):
            raise BadRequest(f"{where}: tensor {spec.name!r} has an xxh3_128 of {len(tensor.xxh3_128)} bytes, not 16")
    meta = FrameMeta(
        kind=kind,
        key=key,
        namespace=namespace,
        parent=_digest(entry.parent, f"{where}.parent") if entry.parent else NO_KEY,
        home=_digest(entry.home, f"{where}.home") if entry.home else key,
        chain_index=entry.chain_index,
        created_ms=now_ms,
        expires_ms=now_ms + entry.ttl_ms if entry.ttl_ms else 0,
        writer=WRITER,
    )
    return Incoming(
        meta,
        tuple(specs),
        tuple(data for _, data in given.tensors),
        tuple(tensor.xxh3_128 for tensor, _ in given.tensors),
    )


def _digest(value: bytes, where: str) -> bytes:
    if len(value) != KEY_NBYTES:
        raise BadRequest(f"{where} has {len(value)} bytes; it must be a whole digest of {KEY_NBYTES}")
    return value
