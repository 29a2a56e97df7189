"""The one error tree. Nothing else lives here, and nothing in mmcache raises outside it on purpose.

    MMCacheError
    ├── UsageError (ValueError)      the caller passed something that can never work
    │   ├── ConfigError              a URL, setting or environment variable
    │   ├── KeyInputError            what a key, digest, namespace or span is made from
    │   └── TensorError              a tensor or buffer: dtype, shape, contiguity, size
    ├── FrameError                   bytes that are not a valid frame
    │   └── CorruptFrame             a frame whose checksum, or whose key echo, does not match
    ├── StoreError                   the store cannot be built or its memory cannot be had
    ├── TransportError (OSError)     no server, a broken or silent connection
    │   ├── ProtocolError            the peer broke the conversation's rules
    │   ├── RequestRefused           the server understood and said no (its message says why)
    │   │   └── AccessDenied         to whom it does not know, or who may not ask this
    │   └── DeadlineExceeded         the call's time was up
    └── LeaseLost                    memory under a zero-copy view may have been reused

Data operations (get, put, match) answer misses and refusals as values; they raise only UsageError. TransportError
reaches the caller from `connect` and from administrative calls. Every message says what to do next.
"""

from __future__ import annotations


class MMCacheError(Exception):
    """Root of everything mmcache raises."""


class UsageError(MMCacheError, ValueError):
    """The call can never work as written; nothing was changed."""


class ConfigError(UsageError):
    """A URL, setting or environment variable is wrong."""


class KeyInputError(UsageError):
    """A key, digest, namespace fact or placeholder span cannot be formed from these values."""


class TensorError(UsageError):
    """A tensor or buffer cannot be stored in, or filled from, a frame."""


class FrameError(MMCacheError):
    """The bytes are not a valid frame."""


class CorruptFrame(FrameError):
    """The bytes look like a frame, but a checksum or the key echo does not match."""


class StoreError(MMCacheError):
    """The store cannot be built with these sizes on this machine."""


class TransportError(MMCacheError, OSError):
    """No server, or a broken or silent connection."""


class ProtocolError(TransportError):
    """The peer broke the rules of the conversation."""


class RequestRefused(TransportError):
    """The server understood the request and refused it; the message says why and what to do."""


class AccessDenied(RequestRefused):
    """The server knows no such token or certificate, or what was asked needs an admin token."""


class DeadlineExceeded(TransportError):
    """The call's deadline passed before the answer was complete."""


class LeaseLost(MMCacheError):
    """A lease expired or was not valid at release: views taken under it may have shown other bytes."""
