from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Mode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BOTH: _ClassVar[Mode]
    READ: _ClassVar[Mode]
    WRITE: _ClassVar[Mode]
    OFF: _ClassVar[Mode]

class GetStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MISS: _ClassVar[GetStatus]
    FOUND: _ClassVar[GetStatus]
    LATER: _ClassVar[GetStatus]

class Modality(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    UNKNOWN: _ClassVar[Modality]
    TEXT: _ClassVar[Modality]
    IMAGE: _ClassVar[Modality]
    VIDEO: _ClassVar[Modality]
    AUDIO: _ClassVar[Modality]

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
    QUOTA: _ClassVar[PutStatus]
    STOPPED: _ClassVar[PutStatus]

class Why(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    HERE: _ClassVar[Why]
    NEVER_STORED: _ClassVar[Why]
    EVICTED: _ClassVar[Why]
    TTL_PASSED: _ClassVar[Why]
    DELETED: _ClassVar[Why]
    REMOVED: _ClassVar[Why]
    BAD_BYTES: _ClassVar[Why]
    REFUSED: _ClassVar[Why]
    TIMED_OUT: _ClassVar[Why]
    BEING_WRITTEN: _ClassVar[Why]
    READS_STOPPED: _ClassVar[Why]
    OTHER_TENANT: _ClassVar[Why]
BOTH: Mode
READ: Mode
WRITE: Mode
OFF: Mode
MISS: GetStatus
FOUND: GetStatus
LATER: GetStatus
UNKNOWN: Modality
TEXT: Modality
IMAGE: Modality
VIDEO: Modality
AUDIO: Modality
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
QUOTA: PutStatus
STOPPED: PutStatus
HERE: Why
NEVER_STORED: Why
EVICTED: Why
TTL_PASSED: Why
DELETED: Why
REMOVED: Why
BAD_BYTES: Why
REFUSED: Why
TIMED_OUT: Why
BEING_WRITTEN: Why
READS_STOPPED: Why
OTHER_TENANT: Why

class JoinRequest(_message.Message):
    __slots__ = ("protocol", "client", "want_arena", "ring_slots", "ring_slot_nbytes", "token", "want_nixl")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    WANT_ARENA_FIELD_NUMBER: _ClassVar[int]
    RING_SLOTS_FIELD_NUMBER: _ClassVar[int]
    RING_SLOT_NBYTES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    WANT_NIXL_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    client: str
    want_arena: bool
    ring_slots: int
    ring_slot_nbytes: int
    token: str
    want_nixl: bool
    def __init__(self, protocol: _Optional[int] = ..., client: _Optional[str] = ..., want_arena: bool = ..., ring_slots: _Optional[int] = ..., ring_slot_nbytes: _Optional[int] = ..., token: _Optional[str] = ..., want_nixl: bool = ...) -> None: ...

class JoinReply(_message.Message):
    __slots__ = ("protocol", "server", "server_id", "arena_nbytes", "alignment", "lease_s", "unix_path", "limits", "arena_prefaulted", "nixl", "sums_last", "no_arena_why", "lends", "mode")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    SERVER_FIELD_NUMBER: _ClassVar[int]
    SERVER_ID_FIELD_NUMBER: _ClassVar[int]
    ARENA_NBYTES_FIELD_NUMBER: _ClassVar[int]
    ALIGNMENT_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    UNIX_PATH_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    ARENA_PREFAULTED_FIELD_NUMBER: _ClassVar[int]
    NIXL_FIELD_NUMBER: _ClassVar[int]
    SUMS_LAST_FIELD_NUMBER: _ClassVar[int]
    NO_ARENA_WHY_FIELD_NUMBER: _ClassVar[int]
    LENDS_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    server: str
    server_id: bytes
    arena_nbytes: int
    alignment: int
    lease_s: float
    unix_path: str
    limits: Limits
    arena_prefaulted: bool
    nixl: NixlOffer
    sums_last: bool
    no_arena_why: str
    lends: bool
    mode: Mode
    def __init__(self, protocol: _Optional[int] = ..., server: _Optional[str] = ..., server_id: _Optional[bytes] = ..., arena_nbytes: _Optional[int] = ..., alignment: _Optional[int] = ..., lease_s: _Optional[float] = ..., unix_path: _Optional[str] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., arena_prefaulted: bool = ..., nixl: _Optional[_Union[NixlOffer, _Mapping]] = ..., sums_last: bool = ..., no_arena_why: _Optional[str] = ..., lends: bool = ..., mode: _Optional[_Union[Mode, str]] = ...) -> None: ...

class LendRequest(_message.Message):
    __slots__ = ("number", "nbytes")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    number: int
    nbytes: int
    def __init__(self, number: _Optional[int] = ..., nbytes: _Optional[int] = ...) -> None: ...

class LendReply(_message.Message):
    __slots__ = ("why",)
    WHY_FIELD_NUMBER: _ClassVar[int]
    why: str
    def __init__(self, why: _Optional[str] = ...) -> None: ...

class NixlOffer(_message.Message):
    __slots__ = ("metadata", "base", "nbytes", "why")
    METADATA_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    metadata: bytes
    base: int
    nbytes: int
    why: str
    def __init__(self, metadata: _Optional[bytes] = ..., base: _Optional[int] = ..., nbytes: _Optional[int] = ..., why: _Optional[str] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("batch_keys", "inline_nbytes", "message_nbytes")
    BATCH_KEYS_FIELD_NUMBER: _ClassVar[int]
    INLINE_NBYTES_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_NBYTES_FIELD_NUMBER: _ClassVar[int]
    batch_keys: int
    inline_nbytes: int
    message_nbytes: int
    def __init__(self, batch_keys: _Optional[int] = ..., inline_nbytes: _Optional[int] = ..., message_nbytes: _Optional[int] = ...) -> None: ...

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
    __slots__ = ("present", "forks", "mode")
    PRESENT_FIELD_NUMBER: _ClassVar[int]
    FORKS_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    present: bytes
    forks: bytes
    mode: Mode
    def __init__(self, present: _Optional[bytes] = ..., forks: _Optional[bytes] = ..., mode: _Optional[_Union[Mode, str]] = ...) -> None: ...

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
    __slots__ = ("lease_id", "status", "places", "forks", "mode")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    PLACES_FIELD_NUMBER: _ClassVar[int]
    FORKS_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    lease_id: int
    status: bytes
    places: bytes
    forks: bytes
    mode: Mode
    def __init__(self, lease_id: _Optional[int] = ..., status: _Optional[bytes] = ..., places: _Optional[bytes] = ..., forks: _Optional[bytes] = ..., mode: _Optional[_Union[Mode, str]] = ...) -> None: ...

class ReserveRequest(_message.Message):
    __slots__ = ("keys", "parents", "frame_nbytes", "ring", "kinds", "namespaces", "modalities", "media_units", "sums_last", "lent")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    PARENTS_FIELD_NUMBER: _ClassVar[int]
    FRAME_NBYTES_FIELD_NUMBER: _ClassVar[int]
    RING_FIELD_NUMBER: _ClassVar[int]
    KINDS_FIELD_NUMBER: _ClassVar[int]
    NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    MODALITIES_FIELD_NUMBER: _ClassVar[int]
    MEDIA_UNITS_FIELD_NUMBER: _ClassVar[int]
    SUMS_LAST_FIELD_NUMBER: _ClassVar[int]
    LENT_FIELD_NUMBER: _ClassVar[int]
    keys: bytes
    parents: bytes
    frame_nbytes: _containers.RepeatedScalarFieldContainer[int]
    ring: bool
    kinds: bytes
    namespaces: bytes
    modalities: bytes
    media_units: _containers.RepeatedScalarFieldContainer[int]
    sums_last: bool
    lent: bool
    def __init__(self, keys: _Optional[bytes] = ..., parents: _Optional[bytes] = ..., frame_nbytes: _Optional[_Iterable[int]] = ..., ring: bool = ..., kinds: _Optional[bytes] = ..., namespaces: _Optional[bytes] = ..., modalities: _Optional[bytes] = ..., media_units: _Optional[_Iterable[int]] = ..., sums_last: bool = ..., lent: bool = ...) -> None: ...

class ReserveReply(_message.Message):
    __slots__ = ("status", "forks", "mode")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    FORKS_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    status: bytes
    forks: bytes
    mode: Mode
    def __init__(self, status: _Optional[bytes] = ..., forks: _Optional[bytes] = ..., mode: _Optional[_Union[Mode, str]] = ...) -> None: ...

class PutReply(_message.Message):
    __slots__ = ("status", "mode")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    status: bytes
    mode: Mode
    def __init__(self, status: _Optional[bytes] = ..., mode: _Optional[_Union[Mode, str]] = ...) -> None: ...

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

class Selection(_message.Message):
    __slots__ = ("namespace", "kind", "facts", "tenant", "older_than_s")
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
    TENANT_FIELD_NUMBER: _ClassVar[int]
    OLDER_THAN_S_FIELD_NUMBER: _ClassVar[int]
    namespace: bytes
    kind: str
    facts: _containers.ScalarMap[str, str]
    tenant: str
    older_than_s: float
    def __init__(self, namespace: _Optional[bytes] = ..., kind: _Optional[str] = ..., facts: _Optional[_Mapping[str, str]] = ..., tenant: _Optional[str] = ..., older_than_s: _Optional[float] = ...) -> None: ...

class ModeRequest(_message.Message):
    __slots__ = ("set", "mode", "of")
    SET_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    OF_FIELD_NUMBER: _ClassVar[int]
    set: bool
    mode: Mode
    of: Selection
    def __init__(self, set: bool = ..., mode: _Optional[_Union[Mode, str]] = ..., of: _Optional[_Union[Selection, _Mapping]] = ...) -> None: ...

class ModeReply(_message.Message):
    __slots__ = ("mode", "rules")
    MODE_FIELD_NUMBER: _ClassVar[int]
    RULES_FIELD_NUMBER: _ClassVar[int]
    mode: Mode
    rules: _containers.RepeatedCompositeFieldContainer[ModeRule]
    def __init__(self, mode: _Optional[_Union[Mode, str]] = ..., rules: _Optional[_Iterable[_Union[ModeRule, _Mapping]]] = ...) -> None: ...

class ModeRule(_message.Message):
    __slots__ = ("of", "mode")
    OF_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    of: Selection
    mode: Mode
    def __init__(self, of: _Optional[_Union[Selection, _Mapping]] = ..., mode: _Optional[_Union[Mode, str]] = ...) -> None: ...

class RemoveRequest(_message.Message):
    __slots__ = ("of", "start")
    OF_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    of: Selection
    start: int
    def __init__(self, of: _Optional[_Union[Selection, _Mapping]] = ..., start: _Optional[int] = ...) -> None: ...

class RemoveReply(_message.Message):
    __slots__ = ("entries", "nbytes", "next", "rows")
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    NEXT_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    entries: int
    nbytes: int
    next: int
    rows: int
    def __init__(self, entries: _Optional[int] = ..., nbytes: _Optional[int] = ..., next: _Optional[int] = ..., rows: _Optional[int] = ...) -> None: ...

class ListRequest(_message.Message):
    __slots__ = ("of", "entries", "start")
    OF_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    of: Selection
    entries: bool
    start: int
    def __init__(self, of: _Optional[_Union[Selection, _Mapping]] = ..., entries: bool = ..., start: _Optional[int] = ...) -> None: ...

class ListReply(_message.Message):
    __slots__ = ("namespaces", "entries", "next")
    NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    NEXT_FIELD_NUMBER: _ClassVar[int]
    namespaces: _containers.RepeatedCompositeFieldContainer[NamespaceRow]
    entries: _containers.RepeatedCompositeFieldContainer[EntryRow]
    next: int
    def __init__(self, namespaces: _Optional[_Iterable[_Union[NamespaceRow, _Mapping]]] = ..., entries: _Optional[_Iterable[_Union[EntryRow, _Mapping]]] = ..., next: _Optional[int] = ...) -> None: ...

class NamespaceRow(_message.Message):
    __slots__ = ("namespace", "kind", "facts", "tenant", "entries", "nbytes", "mode")
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
    TENANT_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    namespace: bytes
    kind: str
    facts: _containers.ScalarMap[str, str]
    tenant: str
    entries: int
    nbytes: int
    mode: Mode
    def __init__(self, namespace: _Optional[bytes] = ..., kind: _Optional[str] = ..., facts: _Optional[_Mapping[str, str]] = ..., tenant: _Optional[str] = ..., entries: _Optional[int] = ..., nbytes: _Optional[int] = ..., mode: _Optional[_Union[Mode, str]] = ...) -> None: ...

class EntryRow(_message.Message):
    __slots__ = ("key", "namespace", "tenant", "nbytes", "age_s", "expires_in_s", "children", "modality", "kind", "units")
    KEY_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_IN_S_FIELD_NUMBER: _ClassVar[int]
    CHILDREN_FIELD_NUMBER: _ClassVar[int]
    MODALITY_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    UNITS_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    namespace: bytes
    tenant: str
    nbytes: int
    age_s: float
    expires_in_s: float
    children: int
    modality: Modality
    kind: int
    units: int
    def __init__(self, key: _Optional[bytes] = ..., namespace: _Optional[bytes] = ..., tenant: _Optional[str] = ..., nbytes: _Optional[int] = ..., age_s: _Optional[float] = ..., expires_in_s: _Optional[float] = ..., children: _Optional[int] = ..., modality: _Optional[_Union[Modality, str]] = ..., kind: _Optional[int] = ..., units: _Optional[int] = ...) -> None: ...

class AuditRequest(_message.Message):
    __slots__ = ("share", "seed", "start")
    SHARE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    share: float
    seed: int
    start: int
    def __init__(self, share: _Optional[float] = ..., seed: _Optional[int] = ..., start: _Optional[int] = ...) -> None: ...

class AuditReply(_message.Message):
    __slots__ = ("entries", "nbytes", "bad", "next", "rows")
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    BAD_FIELD_NUMBER: _ClassVar[int]
    NEXT_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    entries: int
    nbytes: int
    bad: bytes
    next: int
    rows: int
    def __init__(self, entries: _Optional[int] = ..., nbytes: _Optional[int] = ..., bad: _Optional[bytes] = ..., next: _Optional[int] = ..., rows: _Optional[int] = ...) -> None: ...

class ExplainRequest(_message.Message):
    __slots__ = ("keys",)
    KEYS_FIELD_NUMBER: _ClassVar[int]
    keys: bytes
    def __init__(self, keys: _Optional[bytes] = ...) -> None: ...

class ExplainReply(_message.Message):
    __slots__ = ("why", "ago_s", "put_status", "children")
    WHY_FIELD_NUMBER: _ClassVar[int]
    AGO_S_FIELD_NUMBER: _ClassVar[int]
    PUT_STATUS_FIELD_NUMBER: _ClassVar[int]
    CHILDREN_FIELD_NUMBER: _ClassVar[int]
    why: bytes
    ago_s: _containers.RepeatedScalarFieldContainer[float]
    put_status: bytes
    children: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, why: _Optional[bytes] = ..., ago_s: _Optional[_Iterable[float]] = ..., put_status: _Optional[bytes] = ..., children: _Optional[_Iterable[int]] = ...) -> None: ...

class RecentRequest(_message.Message):
    __slots__ = ("limit",)
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    limit: int
    def __init__(self, limit: _Optional[int] = ...) -> None: ...

class RecentReply(_message.Message):
    __slots__ = ("misses",)
    MISSES_FIELD_NUMBER: _ClassVar[int]
    misses: _containers.RepeatedCompositeFieldContainer[Miss]
    def __init__(self, misses: _Optional[_Iterable[_Union[Miss, _Mapping]]] = ...) -> None: ...

class Miss(_message.Message):
    __slots__ = ("ago_s", "tenant", "keys", "found", "prefix", "key", "why", "why_ago_s", "put_status")
    AGO_S_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    FOUND_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    WHY_AGO_S_FIELD_NUMBER: _ClassVar[int]
    PUT_STATUS_FIELD_NUMBER: _ClassVar[int]
    ago_s: float
    tenant: str
    keys: int
    found: int
    prefix: bool
    key: bytes
    why: Why
    why_ago_s: float
    put_status: int
    def __init__(self, ago_s: _Optional[float] = ..., tenant: _Optional[str] = ..., keys: _Optional[int] = ..., found: _Optional[int] = ..., prefix: bool = ..., key: _Optional[bytes] = ..., why: _Optional[_Union[Why, str]] = ..., why_ago_s: _Optional[float] = ..., put_status: _Optional[int] = ...) -> None: ...

class StatRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatReply(_message.Message):
    __slots__ = ("counters", "server", "server_id", "uptime_s", "limits", "alignment")
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
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    ALIGNMENT_FIELD_NUMBER: _ClassVar[int]
    counters: _containers.ScalarMap[str, int]
    server: str
    server_id: bytes
    uptime_s: float
    limits: Limits
    alignment: int
    def __init__(self, counters: _Optional[_Mapping[str, int]] = ..., server: _Optional[str] = ..., server_id: _Optional[bytes] = ..., uptime_s: _Optional[float] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., alignment: _Optional[int] = ...) -> None: ...

class ErrorReply(_message.Message):
    __slots__ = ("code", "message")
    class Code(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        UNSPECIFIED: _ClassVar[ErrorReply.Code]
        BAD_REQUEST: _ClassVar[ErrorReply.Code]
        LIMIT: _ClassVar[ErrorReply.Code]
        UNSUPPORTED: _ClassVar[ErrorReply.Code]
        DENIED: _ClassVar[ErrorReply.Code]
    UNSPECIFIED: ErrorReply.Code
    BAD_REQUEST: ErrorReply.Code
    LIMIT: ErrorReply.Code
    UNSUPPORTED: ErrorReply.Code
    DENIED: ErrorReply.Code
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: ErrorReply.Code
    message: str
    def __init__(self, code: _Optional[_Union[ErrorReply.Code, str]] = ..., message: _Optional[str] = ...) -> None: ...

class Tensor(_message.Message):
    __slots__ = ("name", "dtype", "shape", "data", "xxh3_128")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    XXH3_128_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    xxh3_128: bytes
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ..., xxh3_128: _Optional[bytes] = ...) -> None: ...

class GetRequest(_message.Message):
    __slots__ = ("keys", "prefix", "max_nbytes")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    MAX_NBYTES_FIELD_NUMBER: _ClassVar[int]
    keys: bytes
    prefix: bool
    max_nbytes: int
    def __init__(self, keys: _Optional[bytes] = ..., prefix: bool = ..., max_nbytes: _Optional[int] = ...) -> None: ...

class GetReply(_message.Message):
    __slots__ = ("entries", "mode")
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[Entry]
    mode: Mode
    def __init__(self, entries: _Optional[_Iterable[_Union[Entry, _Mapping]]] = ..., mode: _Optional[_Union[Mode, str]] = ...) -> None: ...

class Entry(_message.Message):
    __slots__ = ("status", "tensors", "kind", "namespace", "parent", "home", "chain_index", "created_ms", "expires_ms", "key")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    HOME_FIELD_NUMBER: _ClassVar[int]
    CHAIN_INDEX_FIELD_NUMBER: _ClassVar[int]
    CREATED_MS_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_MS_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    status: GetStatus
    tensors: _containers.RepeatedCompositeFieldContainer[Tensor]
    kind: str
    namespace: bytes
    parent: bytes
    home: bytes
    chain_index: int
    created_ms: int
    expires_ms: int
    key: bytes
    def __init__(self, status: _Optional[_Union[GetStatus, str]] = ..., tensors: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ..., kind: _Optional[str] = ..., namespace: _Optional[bytes] = ..., parent: _Optional[bytes] = ..., home: _Optional[bytes] = ..., chain_index: _Optional[int] = ..., created_ms: _Optional[int] = ..., expires_ms: _Optional[int] = ..., key: _Optional[bytes] = ...) -> None: ...

class PutRequest(_message.Message):
    __slots__ = ("kind", "namespace", "facts", "entries")
    class FactsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    KIND_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    FACTS_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    kind: str
    namespace: bytes
    facts: _containers.ScalarMap[str, str]
    entries: _containers.RepeatedCompositeFieldContainer[PutEntry]
    def __init__(self, kind: _Optional[str] = ..., namespace: _Optional[bytes] = ..., facts: _Optional[_Mapping[str, str]] = ..., entries: _Optional[_Iterable[_Union[PutEntry, _Mapping]]] = ...) -> None: ...

class PutEntry(_message.Message):
    __slots__ = ("key", "parent", "home", "chain_index", "ttl_ms", "tensors", "modality", "media_units")
    KEY_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    HOME_FIELD_NUMBER: _ClassVar[int]
    CHAIN_INDEX_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    MODALITY_FIELD_NUMBER: _ClassVar[int]
    MEDIA_UNITS_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    parent: bytes
    home: bytes
    chain_index: int
    ttl_ms: int
    tensors: _containers.RepeatedCompositeFieldContainer[Tensor]
    modality: Modality
    media_units: int
    def __init__(self, key: _Optional[bytes] = ..., parent: _Optional[bytes] = ..., home: _Optional[bytes] = ..., chain_index: _Optional[int] = ..., ttl_ms: _Optional[int] = ..., tensors: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ..., modality: _Optional[_Union[Modality, str]] = ..., media_units: _Optional[int] = ...) -> None: ...
