from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MISS: _ClassVar[GetStatus]
    FOUND: _ClassVar[GetStatus]
    LATER: _ClassVar[GetStatus]

class PutStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WANTED: _ClassVar[PutStatus]
    STORED: _ClassVar[PutStatus]
    PRESENT: _ClassVar[PutStatus]
    BUSY: _ClassVar[PutStatus]
    FULL: _ClassVar[PutStatus]
    TOO_LARGE: _ClassVar[PutStatus]
    NO_ENTRIES: _ClassVar[PutStatus]
    BAD_FRAME: _ClassVar[PutStatus]
    LOST: _ClassVar[PutStatus]
    OVERLOADED: _ClassVar[PutStatus]
    EXPIRED: _ClassVar[PutStatus]
MISS: GetStatus
FOUND: GetStatus
LATER: GetStatus
WANTED: PutStatus
STORED: PutStatus
PRESENT: PutStatus
BUSY: PutStatus
FULL: PutStatus
TOO_LARGE: PutStatus
NO_ENTRIES: PutStatus
BAD_FRAME: PutStatus
LOST: PutStatus
OVERLOADED: PutStatus
EXPIRED: PutStatus

class JoinRequest(_message.Message):
    __slots__ = ("protocol", "client", "want_arena", "ring_slots", "ring_slot_nbytes")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    WANT_ARENA_FIELD_NUMBER: _ClassVar[int]
    RING_SLOTS_FIELD_NUMBER: _ClassVar[int]
    RING_SLOT_NBYTES_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    client: str
    want_arena: bool
    ring_slots: int
    ring_slot_nbytes: int
    def __init__(self, protocol: _Optional[int] = ..., client: _Optional[str] = ..., want_arena: bool = ..., ring_slots: _Optional[int] = ..., ring_slot_nbytes: _Optional[int] = ...) -> None: ...

class JoinReply(_message.Message):
    __slots__ = ("protocol", "server", "server_id", "arena_nbytes", "alignment", "lease_s", "unix_path", "limits", "arena_prefaulted")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    SERVER_FIELD_NUMBER: _ClassVar[int]
    SERVER_ID_FIELD_NUMBER: _ClassVar[int]
    ARENA_NBYTES_FIELD_NUMBER: _ClassVar[int]
    ALIGNMENT_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    UNIX_PATH_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    ARENA_PREFAULTED_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    server: str
    server_id: bytes
    arena_nbytes: int
    alignment: int
    lease_s: float
    unix_path: str
    limits: Limits
    arena_prefaulted: bool
    def __init__(self, protocol: _Optional[int] = ..., server: _Optional[str] = ..., server_id: _Optional[bytes] = ..., arena_nbytes: _Optional[int] = ..., alignment: _Optional[int] = ..., lease_s: _Optional[float] = ..., unix_path: _Optional[str] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., arena_prefaulted: bool = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("batch_keys", "inline_nbytes")
    BATCH_KEYS_FIELD_NUMBER: _ClassVar[int]
    INLINE_NBYTES_FIELD_NUMBER: _ClassVar[int]
    batch_keys: int
    inline_nbytes: int
    def __init__(self, batch_keys: _Optional[int] = ..., inline_nbytes: _Optional[int] = ...) -> None: ...

class DeclareRequest(_message.Message):
    __slots__ = ("namespace", "kind", "facts")
    class FactsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    FACTS_FIELD_NUMBER: _ClassVar[int]
    namespace: bytes
    kind: str
    facts: _containers.ScalarMap[str, str]
    def __init__(self, namespace: _Optional[bytes] = ..., kind: _Optional[str] = ..., facts: _Optional[_Mapping[str, str]] = ...) -> None: ...

class DeclareReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ContainsRequest(_message.Message):
    __slots__ = ("keys", "prefix")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    keys: bytes
    prefix: bool
    def __init__(self, keys: _Optional[bytes] = ..., prefix: bool = ...) -> None: ...

class ContainsReply(_message.Message):
    __slots__ = ("present",)
    PRESENT_FIELD_NUMBER: _ClassVar[int]
    present: bytes
    def __init__(self, present: _Optional[bytes] = ...) -> None: ...

class AcquireRequest(_message.Message):
    __slots__ = ("keys", "prefix", "inline", "release", "max_nbytes")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    INLINE_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    MAX_NBYTES_FIELD_NUMBER: _ClassVar[int]
    keys: bytes
    prefix: bool
    inline: bool
    release: int
    max_nbytes: int
    def __init__(self, keys: _Optional[bytes] = ..., prefix: bool = ..., inline: bool = ..., release: _Optional[int] = ..., max_nbytes: _Optional[int] = ...) -> None: ...

class AcquireReply(_message.Message):
    __slots__ = ("lease_id", "status", "places")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    PLACES_FIELD_NUMBER: _ClassVar[int]
    lease_id: int
    status: bytes
    places: bytes
    def __init__(self, lease_id: _Optional[int] = ..., status: _Optional[bytes] = ..., places: _Optional[bytes] = ...) -> None: ...

class ReserveRequest(_message.Message):
    __slots__ = ("keys", "parents", "frame_nbytes", "ring", "kinds")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    PARENTS_FIELD_NUMBER: _ClassVar[int]
    FRAME_NBYTES_FIELD_NUMBER: _ClassVar[int]
    RING_FIELD_NUMBER: _ClassVar[int]
    KINDS_FIELD_NUMBER: _ClassVar[int]
    keys: bytes
    parents: bytes
    frame_nbytes: _containers.RepeatedScalarFieldContainer[int]
    ring: bool
    kinds: bytes
    def __init__(self, keys: _Optional[bytes] = ..., parents: _Optional[bytes] = ..., frame_nbytes: _Optional[_Iterable[int]] = ..., ring: bool = ..., kinds: _Optional[bytes] = ...) -> None: ...

class ReserveReply(_message.Message):
    __slots__ = ("status",)
    STATUS_FIELD_NUMBER: _ClassVar[int]
    status: bytes
    def __init__(self, status: _Optional[bytes] = ...) -> None: ...

class PutReply(_message.Message):
    __slots__ = ("status",)
    STATUS_FIELD_NUMBER: _ClassVar[int]
    status: bytes
    def __init__(self, status: _Optional[bytes] = ...) -> None: ...

class FinishRequest(_message.Message):
    __slots__ = ("lease_id",)
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    lease_id: int
    def __init__(self, lease_id: _Optional[int] = ...) -> None: ...

class FinishReply(_message.Message):
    __slots__ = ("held",)
    HELD_FIELD_NUMBER: _ClassVar[int]
    held: bool
    def __init__(self, held: bool = ...) -> None: ...

class DeleteRequest(_message.Message):
    __slots__ = ("keys",)
    KEYS_FIELD_NUMBER: _ClassVar[int]
    keys: bytes
    def __init__(self, keys: _Optional[bytes] = ...) -> None: ...

class DeleteReply(_message.Message):
    __slots__ = ("deleted",)
    DELETED_FIELD_NUMBER: _ClassVar[int]
    deleted: bytes
    def __init__(self, deleted: _Optional[bytes] = ...) -> None: ...

class RecheckRequest(_message.Message):
    __slots__ = ("keys",)
    KEYS_FIELD_NUMBER: _ClassVar[int]
    keys: bytes
    def __init__(self, keys: _Optional[bytes] = ...) -> None: ...

class RecheckReply(_message.Message):
    __slots__ = ("dropped",)
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    dropped: bytes
    def __init__(self, dropped: _Optional[bytes] = ...) -> None: ...

class InspectRequest(_message.Message):
    __slots__ = ("key",)
    KEY_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    def __init__(self, key: _Optional[bytes] = ...) -> None: ...

class InspectReply(_message.Message):
    __slots__ = ("found", "header", "kind", "facts")
    class FactsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    FOUND_FIELD_NUMBER: _ClassVar[int]
    HEADER_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    FACTS_FIELD_NUMBER: _ClassVar[int]
    found: bool
    header: bytes
    kind: str
    facts: _containers.ScalarMap[str, str]
    def __init__(self, found: bool = ..., header: _Optional[bytes] = ..., kind: _Optional[str] = ..., facts: _Optional[_Mapping[str, str]] = ...) -> None: ...

class StatRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatReply(_message.Message):
    __slots__ = ("counters", "server", "server_id", "uptime_s")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    SERVER_FIELD_NUMBER: _ClassVar[int]
    SERVER_ID_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    counters: _containers.ScalarMap[str, int]
    server: str
    server_id: bytes
    uptime_s: float
    def __init__(self, counters: _Optional[_Mapping[str, int]] = ..., server: _Optional[str] = ..., server_id: _Optional[bytes] = ..., uptime_s: _Optional[float] = ...) -> None: ...

class ErrorReply(_message.Message):
    __slots__ = ("code", "message")
    class Code(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        UNSPECIFIED: _ClassVar[ErrorReply.Code]
        BAD_REQUEST: _ClassVar[ErrorReply.Code]
        LIMIT: _ClassVar[ErrorReply.Code]
        UNSUPPORTED: _ClassVar[ErrorReply.Code]
    UNSPECIFIED: ErrorReply.Code
    BAD_REQUEST: ErrorReply.Code
    LIMIT: ErrorReply.Code
    UNSUPPORTED: ErrorReply.Code
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: ErrorReply.Code
    message: str
    def __init__(self, code: _Optional[_Union[ErrorReply.Code, str]] = ..., message: _Optional[str] = ...) -> None: ...
