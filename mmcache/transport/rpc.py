"""A gRPC channel to a server's public carrier: connections and HTTP/2 are gRPC's, deadlines and errors are ours.

Needs the extra `grpc`; nothing imports this module unless a URL says `transport=grpc`. A channel has a connection of
its own, uses no proxy, takes no settings from the name service, and tries nothing twice: what calls it decides that.
"""

from __future__ import annotations

import os
import time
from typing import Any, Final, NamedTuple

import grpc

from mmcache._version import __version__
from mmcache.config import GiB
from mmcache.errors import AccessDenied, DeadlineExceeded, ProtocolError, RequestRefused, TransportError
from mmcache.pb import cache_pb2 as pb
from mmcache.transport.large_bodies import OverLimit

SERVICE: Final = pb.DESCRIPTOR.services_by_name["Cache"].full_name
MAX_MESSAGE_NBYTES: Final = GiB  # no server has a larger limit
_CODE: Final = grpc.StatusCode
_REFUSED: Final = (_CODE.INVALID_ARGUMENT, _CODE.UNIMPLEMENTED)


class Pem(NamedTuple):
    """What TLS needs, as PEM: the CAs to trust (None: those gRPC brings), and our key and certificate, if any."""

    ca: bytes | None
    key: bytes | None
    cert: bytes | None


class _Process:
    """Whether gRPC has been used here, or by the process this one was forked from: its threads are not here then."""

    used = inherited = False
    left: Final[list[Any]] = []  # channels of that process: closing one here would end its connection


def _in_child() -> None:
    _Process.inherited |= _Process.used


os.register_at_fork(after_in_child=_in_child)


class RpcChannel:
    """A connection to `host`, made by the first call. `pem`: with TLS, to a server whose certificate names `name`.

    Raises TransportError in a process forked from one that used gRPC.
    """

    is_unix = False

    def __init__(self, host: str, port: int, connect_s: float, pem: Pem | None = None, name: str = "") -> None:
        if _Process.inherited:
            raise TransportError(
                "gRPC does not survive a fork: start this process by spawn, not fork, or use transport=tcp"
            )
        _Process.used = True
        self.is_tls, self.is_loopback = pem is not None, False
        self._place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._pid = os.getpid()
        target, options = f"dns:///{self._place}", _options(connect_s)
        if pem is None:
            self._channel = grpc.insecure_channel(target, options)
        else:
            if name and name != host:
                options.append(("grpc.ssl_target_name_override", name))
            self._channel = grpc.secure_channel(target, grpc.ssl_channel_credentials(*pem), options)

    def call(self, method: str, body: bytes, token: str, deadline: float) -> bytes:
        """The reply to a method's request. Raises TransportError: OverLimit, RequestRefused or AccessDenied where the
        server answered so, DeadlineExceeded, or else the channel is not to be used again."""
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise DeadlineExceeded(_TOO_LATE)
        metadata = [("authorization", f"Bearer {token}")] if token else None
        try:
            reply = self._channel.unary_unary(f"/{SERVICE}/{method}")(body, timeout=left_s, metadata=metadata)
        except grpc.RpcError as error:
            raise self._as_transport_error(error) from None
        except ValueError as error:  # it was closed meanwhile
            raise TransportError(f"{self._place}: {error}") from None
        if not isinstance(reply, bytes):
            raise ProtocolError(f"{self._place}: {method} was answered without a message")
        return reply

    def _as_transport_error(self, error: Any) -> TransportError:
        code, words = error.code(), error.details() or "no reason was given"
        if code is _CODE.DEADLINE_EXCEEDED:
            return DeadlineExceeded(_TOO_LATE)
        if code is _CODE.RESOURCE_EXHAUSTED:
            return OverLimit(words)
        if code is _CODE.UNAUTHENTICATED:
            return AccessDenied(
                "access denied: no valid token or certificate came with this call; give token_file=PATH"
            )
        if code is _CODE.PERMISSION_DENIED:
            return AccessDenied(words)
        if code in _REFUSED:
            return RequestRefused(words)
        return TransportError(f"gRPC to {self._place}: {words} ({code.name}); is `serve --grpc` there?")

    def close(self) -> None:
        """Close the connection; in a forked child leave it as it is, as it is the parent's."""
        if self._pid == os.getpid():
            self._channel.close()
        else:
            _Process.left.append(self._channel)


_UNKNOWN: Final = "access denied: no valid token or certificate came with this call; give token_file=PATH"
_TOO_LATE: Final = "the deadline passed; raise deadline_s or look at the server's load"


def _options(connect_s: float) -> list[tuple[str, Any]]:
    connect_ms = max(1, int(1000 * connect_s))
    return [
        ("grpc.use_local_subchannel_pool", 1),  # else channels to one place share a connection, and its troubles
        ("grpc.enable_http_proxy", 0),
        ("grpc.service_config_disable_resolution", 1),
        ("grpc.enable_retries", 0),
        ("grpc.max_receive_message_length", MAX_MESSAGE_NBYTES),
        ("grpc.max_send_message_length", -1),
        ("grpc.compression_enabled_algorithms_bitset", 1),  # none: a small message must not become a large one
        ("grpc.max_metadata_size", 16 << 10),
        ("grpc.min_reconnect_backoff_ms", connect_ms),  # also how long one attempt to connect may take
        ("grpc.initial_reconnect_backoff_ms", connect_ms),
        ("grpc.primary_user_agent", f"mmcache/{__version__}"),
    ]
