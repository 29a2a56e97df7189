"""Refusing a request: the exception that carries the words back to the client, and the parsing that raises it first."""

from __future__ import annotations

from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from mmcache.errors import MMCacheError
from mmcache.pb import cache_pb2 as pb

_M = TypeVar("_M", bound=Message)


class BadRequest(MMCacheError):
    """A request this server will not carry out; `code` and the message go back to the client."""

    def __init__(self, message: str, code: int = pb.ErrorReply.BAD_REQUEST) -> None:
        super().__init__(message)
        self.code = code


def parse(message: _M, body: bytes) -> _M:
    """`message` filled from `body`. Raises BadRequest."""
    try:
        message.ParseFromString(body)
    except DecodeError as error:
        raise BadRequest(f"the request body cannot be read as {type(message).__name__}: {error}") from None
    return message
