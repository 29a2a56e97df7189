"""How much a protobuf message holds, before it is parsed: a parsed message can take forty times its bytes. Pure.

Two bytes are enough for an empty message inside another, which costs a hundred in memory. Walking over the fields
costs no memory, and stops at the limit.
"""

from __future__ import annotations

from typing import Any, Final

from google.protobuf.descriptor import FieldDescriptor

from mmcache.errors import FrameError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MESSAGE: Final = FieldDescriptor.TYPE_MESSAGE
_UNPACKED: Final = (FieldDescriptor.TYPE_MESSAGE, FieldDescriptor.TYPE_BYTES, FieldDescriptor.TYPE_STRING)


class Malformed(FrameError):
    """The bytes are no protobuf message, or not one of a schema without groups."""


def count_fields(body: bytes, of: Any, limit: int) -> int:
    """How many fields and elements there are in `body`, of descriptor `of`, and the messages inside it.

    Counting ends past `limit`. An element of a packed list counts as one field for each byte, which is the most there
    can be. Raises Malformed.
    """
    waiting = [(of, 0, len(body))]
    count = 0
    while waiting:
        kind, position, end = waiting.pop()
        fields = kind.fields_by_number
        while position < end:
            tag, position = _varint(body, position, end)
            count += 1
            wire = tag & 7
            if wire == _BYTES:
                nbytes, position = _varint(body, position, end)
                field = fields.get(tag >> 3)
                if field is not None and field.type == _MESSAGE:
                    waiting.append((field.message_type, position, position + nbytes))
                elif field is not None and field.type not in _UNPACKED:
                    count += nbytes
                position += nbytes
            elif wire == _VARINT:
                _, position = _varint(body, position, end)
            elif wire in (_FIXED32, _FIXED64):
                position += 4 if wire == _FIXED32 else 8
            else:
                raise Malformed(f"wire type {wire} is not one of this schema")
            if position > end:
                raise Malformed("a field ends beyond the message")
            if count > limit:
                return count
    return count


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
