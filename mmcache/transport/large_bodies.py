"""Messages with tensors in them, read and made without copying the tensors. Pure: bytes in, bytes out.

A parsed message holds its own copy of all its bytes, and every look at a bytes field makes another; of small fields it
can take forty times what came. So a Put, and a Get's reply, is walked over first: counted, up to a limit, and cut into
what is parsed, which is little, and the tensors' data, which stays where it is. Both are joined from pieces.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple, TypeVar

from google.protobuf.message import DecodeError, Message

from mmcache.errors import FrameError, RequestRefused
from mmcache.frame import StoredTensor, TensorSpec
from mmcache.pb import cache_pb2 as pb

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
MESSAGE_FIELDS: Final = 16  # an entry's or tensor's message takes as much memory as so many fields, about a KiB
FIELDS_PER_KEY: Final = 128  # of a Put, as open_put counts: three tensors of four dimensions an entry take less
_M = TypeVar("_M", bound=Message)
Piece = bytes | memoryview


def _number(message: type[Message], field: str) -> int:
    return int(message.DESCRIPTOR.fields_by_name[field].number)


def _tag(message: type[Message], field: str) -> bytes:
    return bytes([_number(message, field) << 3 | _BYTES])


_ENTRIES, _TENSORS = _number(pb.PutRequest, "entries"), _number(pb.PutEntry, "tensors")
_REPLY_ENTRIES, _REPLY_TENSORS = _number(pb.GetReply, "entries"), _number(pb.Entry, "tensors")
_SHAPE, _DATA = _number(pb.Tensor, "shape"), _number(pb.Tensor, "data")
_TENSOR_DATA = _tag(pb.Tensor, "data")
_OPENINGS: Final[dict[type[Message], tuple[bytes, bytes]]] = {
    pb.Entry: (_tag(pb.GetReply, "entries"), _tag(pb.Entry, "tensors")),
    pb.PutEntry: (_tag(pb.PutRequest, "entries"), _tag(pb.PutEntry, "tensors")),
}


class Malformed(FrameError):
    """The bytes are no message of this schema."""


class TooMany(FrameError):
    """There are more fields than the limit."""


class OverLimit(RequestRefused):
    """The server refused a call as too large or one too many; less may pass."""


class Budget:
    """How many fields may still come."""

    def __init__(self, fields: int) -> None:
        self.left = fields

    def spend(self, fields: int) -> None:
        """Raises TooMany."""
        self.left -= fields
        if self.left < 0:
            raise TooMany


class Field(NamedTuple):
    """Where a field lies: all of it, and its value."""

    number: int
    wire: int
    start: int
    value: int
    end: int


class TensorIn(NamedTuple):
    """A tensor: its message, without data, and the data."""

    message: pb.Tensor
    data: memoryview


class EntryIn(NamedTuple):
    """An entry of a Put: its message, without tensors, and the tensors."""

    message: pb.PutEntry
    tensors: tuple[TensorIn, ...]


class EntryOut(NamedTuple):
    """An entry of a Get's reply: its message, without tensors, and the tensors."""

    message: pb.Entry
    tensors: tuple[TensorIn, ...]


def walk(body: bytes, start: int, end: int, budget: Budget) -> Iterator[Field]:
    """The fields of the message that lies from `start` to `end`. Raises Malformed, or TooMany."""
    position = start
    while position < end:
        budget.spend(1)
        begin = position
        tag, position = _varint(body, position, end)
        wire, value = tag & 7, position
        if wire == _BYTES:
            nbytes, value = _varint(body, position, end)
            position = value + nbytes
        elif wire == _VARINT:
            _, position = _varint(body, position, end)
        elif wire in (_FIXED32, _FIXED64):
            position += 4 if wire == _FIXED32 else 8
        else:
            raise Malformed(f"wire type {wire} is not one of this schema")
        if position > end:
            raise Malformed("a field ends beyond its message")
        yield Field(tag >> 3, wire, begin, value, position)


def _varint(body: bytes, position: int, end: int) -> tuple[int, int]:
    number = shift = 0
    while position < end and shift < 70:
        byte = body[position]
        position += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, position
        shift += 7
    raise Malformed("a number does not end")


def open_put(body: bytes, limit: int) -> tuple[pb.PutRequest, list[EntryIn]]:
    """A PutRequest without its entries, and these, of at most `limit` fields in all: equal to what parsing gives.

    An element of a list counts as a field, an entry or tensor as MESSAGE_FIELDS more. Raises Malformed, or TooMany
    before more than that is in memory.
    """
    rest, entries = _cut(body, limit, _ENTRIES, _TENSORS)
    opened = [EntryIn(_parsed(pb.PutEntry(), pieces), tensors) for pieces, tensors in entries]
    return _parsed(pb.PutRequest(), rest), opened


def open_get(body: bytes, limit: int) -> tuple[pb.GetReply, list[EntryOut]]:
    """A GetReply in the same way."""
    rest, entries = _cut(body, limit, _REPLY_ENTRIES, _REPLY_TENSORS)
    opened = [EntryOut(_parsed(pb.Entry(), pieces), tensors) for pieces, tensors in entries]
    return _parsed(pb.GetReply(), rest), opened


_Cut = tuple[list[bytes], tuple[TensorIn, ...]]


def _cut(body: bytes, limit: int, entries_at: int, tensors_at: int) -> tuple[list[bytes], list[_Cut]]:
    """The fields that are no entries, and each entry's that are no tensors, with its tensors."""
    budget = Budget(limit)
    rest: list[bytes] = []
    entries: list[_Cut] = []
    for field in walk(body, 0, len(body), budget):
        if field.number == entries_at and field.wire == _BYTES:
            entries.append(_cut_entry(body, field, budget, tensors_at))
        else:
            rest.append(body[field.start : field.end])
    return rest, entries


def _cut_entry(body: bytes, entry: Field, budget: Budget, tensors_at: int) -> _Cut:
    budget.spend(MESSAGE_FIELDS)
    rest, tensors = [], []
    for field in walk(body, entry.value, entry.end, budget):
        if field.number == tensors_at and field.wire == _BYTES:
            tensors.append(_open_tensor(body, field, budget))
        else:
            rest.append(body[field.start : field.end])
    return rest, tuple(tensors)


def _open_tensor(body: bytes, tensor: Field, budget: Budget) -> TensorIn:
    budget.spend(MESSAGE_FIELDS)
    rest, data = [], memoryview(b"")
    for field in walk(body, tensor.value, tensor.end, budget):
        if field.number == _DATA and field.wire == _BYTES:
            data = memoryview(body)[field.value : field.end]
        else:
            if field.number == _SHAPE and field.wire == _BYTES:
                budget.spend(field.end - field.value)  # a byte is the least an element takes
            rest.append(body[field.start : field.end])
    return TensorIn(_parsed(pb.Tensor(), rest), data)


def _parsed(message: _M, pieces: Sequence[bytes]) -> _M:
    try:
        message.ParseFromString(b"".join(pieces))
    except DecodeError as error:
        raise Malformed(f"{type(message).__name__}: {error}") from None
    return message


def _length(nbytes: int) -> bytes:
    out = bytearray()
    while nbytes > 127:
        out.append(nbytes & 127 | 128)
        nbytes >>= 7
    out.append(nbytes)
    return bytes(out)


def entry_pieces(entry: pb.Entry | pb.PutEntry, tensors: Sequence[tuple[StoredTensor, memoryview]]) -> list[Piece]:
    """An entry of a GetReply or a PutRequest, to be joined: its opening, its fields, then each tensor's opening and
    data. Together they are never more bytes than the entry's frame."""
    opens_entry, opens_tensor = _OPENINGS[type(entry)]
    inside: list[Piece] = [entry.SerializeToString()]
    nbytes = len(inside[0])
    for stored, data in tensors:
        name, dtype, shape = stored.spec
        head = pb.Tensor(name=name, dtype=dtype, shape=shape, xxh3_128=stored.checksum).SerializeToString()
        head += _TENSOR_DATA + _length(len(data))
        opening = opens_tensor + _length(len(head) + len(data)) + head
        inside += (opening, data)
        nbytes += len(opening) + len(data)
    return [opens_entry + _length(nbytes), *inside]


def fields_of(specs: Sequence[TensorSpec]) -> int:
    """The most fields, as open_put counts, that an entry of a Put with these tensors has."""
    sizes = sum(len(_length(size)) for spec in specs for size in spec.shape)
    entry, tensor = len(pb.PutEntry.DESCRIPTOR.fields), len(pb.Tensor.DESCRIPTOR.fields)
    return 1 + MESSAGE_FIELDS + entry + len(specs) * (1 + MESSAGE_FIELDS + tensor) + sizes
