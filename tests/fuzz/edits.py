"""Changes that know the formats: frames whose checksums, and messages whose lengths, are right again; odd values."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any, Final, NamedTuple

import xxhash
from google.protobuf.message import DecodeError, Message

from mmcache.frame import DTYPES, ENTRY_NBYTES, PREFIX_NBYTES, SUM_NBYTES, SUM_OFFSET, align_up, header_checksum
from mmcache.pb import cache_pb2 as pb
from mmcache.transport.base import MAGIC, PRELUDE_NBYTES, Op, pack_prelude

NUMBERS: Final = (0, 1, 2, 3, 8, 31, 32, 63, 64, 65, 255, 256, 4096, 65535, 65536, 1 << 20, (1 << 31) - 1, 1 << 31,
                  (1 << 32) - 1, 1 << 40, (1 << 40) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)  # fmt: skip
_ITEMSIZE: Final = dict(DTYPES.values())
_PRELUDE: Final = struct.Struct("<4sBBHIIQ")
_FIELDS: Final = (  # of a header: where, how wide; the numbers that steer a reader
    (8, 2), (10, 1), (11, 1), (12, 4), (16, 8), (24, 4), (28, 2), (30, 2), (48, 8), (56, 8), (64, 8),
)  # fmt: skip
_ENTRY_FIELDS: Final = ((0, 1), (1, 1), (2, 2), (4, 4), (8, 8), (16, 8), *((40 + 8 * i, 8) for i in range(8)))
Mutate = Callable[[bytes], bytes]


def _kinds(suffix: str) -> dict[Op, type[Message]]:
    """What the body of each operation is, by the schema's way of naming."""
    names = {op: op.name.title().replace("_", "") + suffix for op in Op}
    return {op: getattr(pb, name) for op, name in names.items() if hasattr(pb, name)}


REQUESTS: Final = _kinds("Request")
REPLIES: Final = _kinds("Reply") | {Op.PUT_DONE: pb.PutReply}


# ------------------------------------------------------------------------------------------- frames
def _count_of(frame: bytes | bytearray) -> int:
    """How many tensors the header says there are, as far as their entries are there."""
    return min(int.from_bytes(frame[28:30], "little"), (len(frame) - PREFIX_NBYTES) // ENTRY_NBYTES)


def mend_header(frame: bytearray) -> None:
    """Make the header's checksum right, if there is a whole header."""
    header_nbytes = int.from_bytes(frame[12:16], "little")
    if PREFIX_NBYTES <= header_nbytes <= len(frame):
        frame[SUM_OFFSET : SUM_OFFSET + SUM_NBYTES] = header_checksum(frame[:header_nbytes])


def mend_sums(frame: bytearray) -> None:
    """Make the checksum of every tensor right that lies inside the frame."""
    for number in range(_count_of(frame)):
        entry = PREFIX_NBYTES + ENTRY_NBYTES * number
        offset, nbytes = struct.unpack_from("<QQ", frame, entry + 8)
        if offset + nbytes <= len(frame):
            frame[entry + 24 : entry + 40] = xxhash.xxh3_128_digest(bytes(frame[offset : offset + nbytes]))


def mend_layout(frame: bytearray, max_nbytes: int) -> None:
    """Make sizes and offsets follow from the shapes, and the frame as long as they say, where that is possible."""
    count = _count_of(frame)
    alignment = int.from_bytes(frame[24:28], "little")
    if alignment < 64 or alignment & (alignment - 1):
        return
    end = header_nbytes = align_up(PREFIX_NBYTES + ENTRY_NBYTES * count, alignment)
    for number in range(count):
        entry = PREFIX_NBYTES + ENTRY_NBYTES * number
        nbytes = _ITEMSIZE.get(frame[entry], 1)
        for size in struct.unpack_from("<8Q", frame, entry + 40)[: frame[entry + 1]]:
            nbytes *= size
        start = align_up(end, alignment)
        end = start + nbytes
        if end > max_nbytes:
            return
        struct.pack_into("<QQ", frame, entry + 8, start, nbytes)
    if end > max_nbytes:
        return
    struct.pack_into("<IQ", frame, 12, header_nbytes, end)
    struct.pack_into("<H", frame, 28, count)
    frame[end:] = b""
    frame.extend(bytes(end - len(frame)))


def edit_frame(data: bytes, random: Random, max_nbytes: int) -> bytes:
    """One frame with some numbers changed, and, more often than not, everything that hangs on them made right."""
    frame = bytearray(data)
    if len(frame) < PREFIX_NBYTES:
        return data
    for _ in range(random.choice((0, 1, 1, 2, 4))):
        where, width = random.choice(_FIELDS)
        if _count_of(frame) and random.random() < 0.6:
            where, width = random.choice(_ENTRY_FIELDS)
            where += PREFIX_NBYTES + ENTRY_NBYTES * random.randrange(_count_of(frame))
        number = random.choice(NUMBERS) if random.random() < 0.7 else random.randrange(20)
        frame[where : where + width] = (number & ((1 << 8 * width) - 1)).to_bytes(width, "little")
    if random.random() < 0.3 and len(frame) > PREFIX_NBYTES:
        frame[random.randrange(PREFIX_NBYTES, len(frame))] ^= 1 << random.randrange(8)
    return mend(frame, random.randrange(4), max_nbytes)


def mend(frame: bytearray, level: int, max_nbytes: int) -> bytes:
    """Make right: nothing (0), the header's checksum (1), the tensors' too (2), the layout as well (3)."""
    if level > 2:
        mend_layout(frame, max_nbytes)
    if level > 1:
        mend_sums(frame)
    if level:
        mend_header(frame)
    return bytes(frame)


# ------------------------------------------------------------------------------------------- messages
class Piece(NamedTuple):
    """One message of a stream, and what follows it up to the next: payload, notes, anything."""

    op: int
    request_id: int
    body: bytes
    payload_nbytes: int
    rest: bytes

    def pack(self) -> bytes:
        """Its bytes, with a length of the body that is right."""
        head = bytearray(pack_prelude(Op.STAT, self.request_id, len(self.body), self.payload_nbytes))
        head[5] = self.op
        return bytes(head) + self.body + self.rest


def split(stream: bytes) -> tuple[bytes, list[Piece]]:
    """A stream as what comes before its first message, and its messages."""
    start = stream.find(MAGIC)
    before, pieces = (stream if start < 0 else stream[:start]), []
    while 0 <= start <= len(stream) - PRELUDE_NBYTES:
        _, _, op, _, request_id, body_nbytes, payload_nbytes = _PRELUDE.unpack_from(stream, start)
        body_end = min(len(stream), start + PRELUDE_NBYTES + body_nbytes)
        following = stream.find(MAGIC, body_end)
        end = len(stream) if following < 0 else following
        body = stream[start + PRELUDE_NBYTES : body_end]
        pieces.append(Piece(op, request_id, body, payload_nbytes, stream[body_end:end]))
        start = following
    return before, pieces


def pack(before: bytes, pieces: Sequence[Piece]) -> bytes:
    """The stream of these messages."""
    return before + b"".join(piece.pack() for piece in pieces)


def _edit_bytes(value: bytes, random: Random, blind: Mutate, known: Sequence[bytes]) -> bytes:
    choice = random.randrange(7)
    if choice == 0:
        return value[: random.randrange(len(value) + 1)]
    if choice == 1:
        return value + bytes([random.randrange(256)])
    if choice == 2:
        return value * random.choice((2, 3, 65))
    if choice == 3:
        return b""
    if choice == 4 and known:
        return b"".join(random.choices(known, k=random.choice((1, 2, 3, 64))))
    return blind(value or b"\0")


def _edit_value(field: Any, old: Any, random: Random, blind: Mutate, known: Sequence[bytes]) -> Any:
    if field.type == field.TYPE_BYTES:
        return _edit_bytes(old, random, blind, known)
    if field.type == field.TYPE_STRING:
        return _edit_bytes(old.encode(), random, blind, known).decode(errors="replace")
    if field.type == field.TYPE_BOOL:
        return not old
    if field.type in (field.TYPE_DOUBLE, field.TYPE_FLOAT):
        return random.choice((0.0, -1.0, 1e-300, 1e300, float("inf"), float("nan")))
    width = 32 if field.cpp_type in (field.CPPTYPE_INT32, field.CPPTYPE_UINT32, field.CPPTYPE_ENUM) else 64
    number = random.choice(NUMBERS) % (1 << width)
    signed = field.cpp_type in (field.CPPTYPE_INT32, field.CPPTYPE_INT64, field.CPPTYPE_ENUM)
    return number - (1 << width) if signed and number >> (width - 1) else number


def edit_message(message: Message, random: Random, blind: Mutate, known: Sequence[bytes] = ()) -> None:
    """Give one field of a message, at any depth, another value that its type allows."""
    fields = message.DESCRIPTOR.fields
    if not fields:
        return
    field: Any = random.choice(list(fields))
    old: Any = getattr(message, field.name)
    repeated = hasattr(old, "__len__") and not isinstance(old, (bytes, str))
    if repeated and hasattr(old, "keys"):
        return  # maps of text: their bytes are changed blindly
    if field.type == field.TYPE_MESSAGE:
        if repeated:
            if not old or random.random() < 0.2:
                old.add()
            old = random.choice(list(old))
        edit_message(old, random, blind, known)
    elif repeated:
        values = list(old) or [0 if field.type != field.TYPE_BYTES else b""]
        values[random.randrange(len(values))] = _edit_value(field, values[0], random, blind, known)
        values *= random.choice((1, 1, 1, 2, 40))
        del old[:]
        old.extend(values[: random.randrange(len(values) + 1)] if random.random() < 0.2 else values)
    else:
        setattr(message, field.name, _edit_value(field, old, random, blind, known))


def edit_body(body: bytes, kind: type[Message] | None, random: Random, blind: Mutate, known: Sequence[bytes]) -> bytes:
    """A message's body changed by field, or, where it cannot be read, blindly."""
    if kind is None or random.random() < 0.2:
        return blind(body or b"\0")
    message = kind()
    try:
        message.ParseFromString(body)
    except DecodeError:
        return blind(body or b"\0")
    for _ in range(random.choice((1, 1, 2))):
        edit_message(message, random, blind, known)
    return message.SerializeToString()


def edit_stream(
    stream: bytes, kinds: Mapping[Op, type[Message]], random: Random, blind: Mutate, known: Sequence[bytes], room: int
) -> tuple[bytes, list[Piece]]:
    """A stream with one message changed, left out, repeated or moved, or what follows it changed."""
    before, pieces = split(stream)
    if not pieces:
        return blind(stream or b"\0"), []
    at = random.randrange(len(pieces))
    piece = pieces[at]
    choice = random.randrange(10)
    if choice < 4:
        kind = kinds.get(Op(piece.op)) if piece.op in set(Op) else None
        pieces[at] = piece._replace(body=edit_body(piece.body, kind, random, blind, known))
    elif choice < 6 and piece.rest:
        edited = edit_frame(piece.rest, random, room) if random.random() < 0.7 else blind(piece.rest)
        pieces[at] = piece._replace(rest=edited)
    elif choice == 6:
        del pieces[at]
    elif choice == 7:
        pieces.insert(random.randrange(len(pieces) + 1), piece)
    elif choice == 8:
        pieces[at] = piece._replace(op=random.choice(list(Op)))
    else:
        pieces[at] = piece._replace(request_id=random.choice((0, 1, 2, (1 << 32) - 1)))
    return before, pieces
