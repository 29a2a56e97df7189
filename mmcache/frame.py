"""The one byte format: a frame holds the tensors stored under one key. Pure: bytes in, bytes out, no I/O, no clock.

docs/wire-format.md specifies it well enough to be written in another language; the same bytes live in the arena,
travel on the wire and rest on disk. Layout: a 256-byte prefix, one 160-byte entry per tensor, zero padding to the
alignment, then each tensor at the next aligned offset with zero bytes between. The header (everything before the
first tensor) carries its own xxh3-128; each tensor's xxh3-128 is in its entry. The offsets follow from the shapes, so
tensors that overlap or leave a gap cannot be expressed: parse accepts exactly the one layout that pack writes.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from struct import Struct
from typing import Any, Final, NamedTuple

import xxhash

from mmcache.errors import CorruptFrame, FrameError, KeyInputError, TensorError

MAGIC: Final = b"MMCFRAME"
VERSION: Final = 1
PREFIX_NBYTES: Final = 256
ENTRY_NBYTES: Final = 160
SUM_NBYTES: Final = 16
SUM_OFFSET: Final = 32
DEFAULT_ALIGNMENT: Final = 64
MAX_ALIGNMENT: Final = 65536
MAX_TENSORS: Final = 1024
MAX_DIMS: Final = 8
MAX_NAME_NBYTES: Final = 56
MAX_WRITER_NBYTES: Final = 24
MAX_FRAME_NBYTES: Final = 1 << 40
MAX_HEADER_NBYTES: Final = 3 << 16  # of MAX_TENSORS at MAX_ALIGNMENT
NO_KEY: Final = bytes(32)

_PREFIX = Struct("<8sHBBIQIHH16sQQQ24s32s32s32s32s32s")
_ENTRY = Struct("<BBHIQQ16s8Q56s")
_ENTRY_HEAD = Struct("<BBHIQQ")  # the checksum lies between the two
_ENTRY_TAIL = Struct("<8Q56s")
_ZERO_SUM = bytes(SUM_NBYTES)
assert (_PREFIX.size, _ENTRY.size) == (PREFIX_NBYTES, ENTRY_NBYTES)


class Kind(enum.IntEnum):
    """What a frame's tensors are; the same words as `Namespace.kind`."""

    KV = 1
    EMBEDDING = 2
    PROMPT = 3
    LATENT = 4


DTYPES: Final[dict[str, tuple[int, int]]] = {  # name -> (code on the wire, bytes an element)
    "bool": (1, 1),
    "uint8": (2, 1),
    "int8": (3, 1),
    "int16": (4, 2),
    "int32": (5, 4),
    "int64": (6, 8),
    "float16": (7, 2),
    "bfloat16": (8, 2),
    "float32": (9, 4),
    "float64": (10, 8),
    "float8_e4m3fn": (11, 1),
    "float8_e5m2": (12, 1),
}
_DTYPE_BY_CODE: Final = {code: (name, itemsize) for name, (code, itemsize) in DTYPES.items()}
_KIND_BY_CODE: Final = {int(kind): kind for kind in Kind}


class TensorSpec(NamedTuple):
    """One tensor's name, dtype (a name in `DTYPES`) and shape (row-major, at most 8 dimensions, zero sizes allowed)."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's elements. Raises TensorError if the dtype is unknown."""
        if self.dtype not in DTYPES:
            raise TensorError(f"dtype {self.dtype!r} cannot be stored; use one of {', '.join(sorted(DTYPES))}")
        nbytes = DTYPES[self.dtype][1]
        for size in self.shape:
            nbytes *= size
        return nbytes


class StoredTensor(NamedTuple):
    """A tensor inside a frame: its spec, its byte range in the frame and its xxh3-128 (big-endian digest)."""

    spec: TensorSpec
    offset: int
    nbytes: int
    checksum: bytes


class FrameMeta(NamedTuple):
    """Identity of a frame: everything in the header but sizes, tensors and checksums. Times are Unix milliseconds.

    `expires_ms` 0 means never. `parent` and `namespace` may be `NO_KEY`; `home` is where placement puts the frame.
    """

    kind: Kind
    key: bytes
    namespace: bytes
    parent: bytes
    home: bytes
    chain_index: int
    created_ms: int
    expires_ms: int
    writer: str


class FrameHeader(NamedTuple):
    """A parsed header: identity, alignment, tensors in stored order, total sizes and the header's own checksum."""

    meta: FrameMeta
    alignment: int
    tensors: tuple[StoredTensor, ...]
    header_nbytes: int
    frame_nbytes: int
    checksum: bytes


@dataclass(frozen=True, slots=True)
class Layout:
    """Where `pack_header` will put things: the size of the header, each tensor's offset, and the whole frame's size."""

    header_nbytes: int
    offsets: tuple[int, ...]
    frame_nbytes: int


def align_up(nbytes: int, alignment: int) -> int:
    """The smallest multiple of `alignment` (a power of two) that is >= nbytes."""
    return (nbytes + alignment - 1) & -alignment


def layout_of(sizes: Sequence[int], alignment: int = DEFAULT_ALIGNMENT) -> Layout:
    """The only layout for tensors of these sizes in bytes. Pure arithmetic; raises TensorError over a limit."""
    return _layout_of(tuple(sizes), alignment)


@lru_cache(maxsize=256)
def _layout_of(sizes: tuple[int, ...], alignment: int) -> Layout:
    if alignment < 64 or alignment > MAX_ALIGNMENT or alignment & (alignment - 1):
        raise TensorError(f"alignment {alignment} is not a power of two from 64 to {MAX_ALIGNMENT}")
    if len(sizes) > MAX_TENSORS:
        raise TensorError(
            f"{len(sizes)} tensors in one frame; the limit is {MAX_TENSORS}: split them over several keys"
        )
    header_nbytes = end = align_up(PREFIX_NBYTES + ENTRY_NBYTES * len(sizes), alignment)
    offsets = []
    for nbytes in sizes:
        offset = align_up(end, alignment)
        offsets.append(offset)
        end = offset + nbytes
    if end > MAX_FRAME_NBYTES:
        raise TensorError(f"the frame would be {end} bytes; the limit is {MAX_FRAME_NBYTES}")
    return Layout(header_nbytes, tuple(offsets), end)


def _spread_nbytes(itemsize: int, sizes: Sequence[int]) -> int:
    """Bytes of a shape with its zero sizes left out: array libraries must be able to count that far."""
    nbytes = itemsize
    for size in sizes:
        nbytes *= size or 1
    return nbytes


def header_checksum(header: bytes | bytearray | memoryview) -> bytes:
    """xxh3-128 of the header with its checksum field read as zeros (16 bytes)."""
    return xxhash.xxh3_128_digest(b"".join((header[:SUM_OFFSET], _ZERO_SUM, header[SUM_OFFSET + SUM_NBYTES :])))


def check_specs(specs: Sequence[TensorSpec]) -> None:
    """Raise TensorError if these tensors cannot be stored in one frame: what `pack_header` checks, without a frame."""
    _check_specs(tuple(specs))


@lru_cache(maxsize=128)  # of MAX_TENSORS with long names each takes half a MiB, and strangers choose them
def _check_specs(specs: tuple[TensorSpec, ...]) -> None:
    sizes = [spec.nbytes for spec in specs]
    for spec in specs:
        name = spec.name.encode(errors="replace")  # as "?": a lone surrogate is then not what it was
        if name.decode() != spec.name or not name or len(name) > MAX_NAME_NBYTES or b"\0" in name:
            raise TensorError(f"tensor name {spec.name!r} must be 1 to {MAX_NAME_NBYTES} UTF-8 bytes without NUL")
        if len(spec.shape) > MAX_DIMS:
            found = f"{len(spec.shape)} dimensions; the limit is {MAX_DIMS}"
            raise TensorError(f"tensor {spec.name!r} has {found}: reshape it")
        if _spread_nbytes(DTYPES[spec.dtype][1], spec.shape) > MAX_FRAME_NBYTES or min(spec.shape, default=0) < 0:
            raise TensorError(f"tensor {spec.name!r} has shape {list(spec.shape)}, beyond {MAX_FRAME_NBYTES} bytes")
    if len({spec.name for spec in specs}) != len(specs):
        raise TensorError("two tensors of one frame share a name; name them apart")
    layout_of(sizes)


@lru_cache(maxsize=128)
def _table(specs: tuple[TensorSpec, ...], alignment: int) -> tuple[Layout, bytes]:
    """Where these tensors lie, and what follows the prefix: their entries without checksums, padded."""
    _check_specs(specs)
    layout = layout_of([spec.nbytes for spec in specs], alignment)
    entries = [_pack_entry(*row) for row in zip(specs, layout.offsets, strict=True)]
    return layout, b"".join(entries).ljust(layout.header_nbytes - PREFIX_NBYTES, b"\0")


def _pack_entry(spec: TensorSpec, offset: int) -> bytes:
    name = spec.name.encode()
    shape = spec.shape + (0,) * (MAX_DIMS - len(spec.shape))
    code = DTYPES[spec.dtype][0]
    return _ENTRY.pack(code, len(spec.shape), len(name), 0, offset, spec.nbytes, _ZERO_SUM, *shape, name)


def pack_header(
    meta: FrameMeta,
    specs: Sequence[TensorSpec],
    checksums: Sequence[bytes] | None,
    alignment: int = DEFAULT_ALIGNMENT,
) -> bytes:
    """The header bytes (padded to the alignment) for these tensors with these xxh3-128 digests; None: not known yet.

    Raises TensorError for what a frame cannot express (too many dimensions, duplicate names, long names), and
    KeyInputError for a key, namespace, parent or home that is not 32 bytes.
    """
    layout, table = _table(tuple(specs), alignment)
    if checksums is not None and len(checksums) != len(specs):
        raise TensorError(f"{len(checksums)} checksums for {len(specs)} tensors; give one of each")
    for digest in (meta.key, meta.namespace, meta.parent, meta.home):
        if len(digest) != len(NO_KEY):
            raise KeyInputError(f"a digest of {len(digest)} bytes cannot stand in a header; it must have {len(NO_KEY)}")
    prefix = _PREFIX.pack(
        MAGIC, VERSION, int(meta.kind), 0, layout.header_nbytes, layout.frame_nbytes, alignment, len(specs),
        0, _ZERO_SUM, meta.chain_index, meta.created_ms, meta.expires_ms, _writer(meta.writer),
        meta.key, meta.namespace, meta.parent, meta.home, NO_KEY,
    )  # fmt: skip
    return sealed(prefix + table, checksums or ())


@lru_cache(maxsize=64)
def _writer(name: str) -> bytes:
    return name.replace("\0", "?").encode("ascii", "replace")[:MAX_WRITER_NBYTES]


def sealed(header: bytes, sums: Sequence[bytes]) -> bytes:
    """The header of a frame whose tensors' checksums were not known when it was packed, with these."""
    whole = bytearray(header)
    position = PREFIX_NBYTES + _ENTRY_HEAD.size
    for checksum in sums:
        whole[position : position + SUM_NBYTES] = checksum
        position += ENTRY_NBYTES
    whole[SUM_OFFSET : SUM_OFFSET + SUM_NBYTES] = header_checksum(whole)
    return bytes(whole)


def sum_of_sums(sums: Sequence[bytes]) -> bytes:
    """What stands for all tensors of a frame after it, where its header does not have their checksums: the xxh3-128 of
    those, in order, 16 bytes."""
    return xxhash.xxh3_128_digest(b"".join(sums))


def frame_segments(header: bytes, payloads: Sequence[memoryview], alignment: int) -> list[bytes | memoryview]:
    """The frame as a list of buffers in order (header, tensors, zero gaps): for a scatter-gather write, no copy."""
    segments: list[bytes | memoryview] = [header]
    end = len(header)
    for payload in payloads:
        gap = align_up(end, alignment) - end
        if gap:
            segments.append(bytes(gap))
        if len(payload):
            segments.append(payload)
        end += gap + len(payload)
    return segments


def header_nbytes_of(prefix: bytes | memoryview, limit_nbytes: int) -> int:
    """How long the header that starts with this 256-byte prefix is. Raises FrameError if it is not a frame's.

    Reads nothing but the prefix, so a receiver can learn how much to read next; `limit_nbytes` is the extent's size.
    """
    return int(_check_prefix(prefix, limit_nbytes)[4])


def _check_prefix(prefix: bytes | memoryview, limit_nbytes: int) -> tuple[Any, ...]:
    if len(prefix) < PREFIX_NBYTES:
        raise FrameError(f"{len(prefix)} bytes are too few for a frame's {PREFIX_NBYTES}-byte prefix")
    fields = _PREFIX.unpack_from(prefix)
    magic, version, _, _, header_nbytes, _, alignment, count = fields[:8]
    if magic != MAGIC:
        raise FrameError(f"magic {magic!r} is not a frame's {MAGIC!r}")
    if version != VERSION:
        raise FrameError(f"frame version {version} is not {VERSION}; read it with an mmcache release that knows it")
    if alignment < 64 or alignment > MAX_ALIGNMENT or alignment & (alignment - 1):
        raise FrameError(f"alignment {alignment} is not a power of two from 64 to {MAX_ALIGNMENT}")
    if count > MAX_TENSORS:
        raise FrameError(f"{count} tensors; the limit is {MAX_TENSORS}")
    if header_nbytes != align_up(PREFIX_NBYTES + ENTRY_NBYTES * count, alignment) or header_nbytes > limit_nbytes:
        raise FrameError(f"header size {header_nbytes} does not fit {count} tensors in {limit_nbytes} bytes")
    return fields


def parse_header(
    data: bytes | memoryview, *, limit_nbytes: int | None = None, checksum: bytes | None = None, verify: bool = True
) -> FrameHeader:
    """The header at the start of `data`, checked completely; nothing of it is trusted before it is checked.

    `limit_nbytes` bounds the whole frame (default: len(data)); `checksum`, if given, must be the header's (the start of
    an Acquire reply's chain). `verify=False` skips only the checksum. Raises FrameError and nothing else; allocates
    at most MAX_HEADER_NBYTES. Every byte of `data` is read once, so bytes that change meanwhile (a lease that expired)
    cannot be checked in one state and used in another.
    """
    limit = len(data) if limit_nbytes is None else limit_nbytes
    prefix = bytes(data[:PREFIX_NBYTES])
    fields = _check_prefix(prefix, min(limit, len(data)))
    (_, _, kind_code, reserved, header_nbytes, frame_nbytes, alignment, count, reserved_2, header_sum, index,
     created_ms, expires_ms, writer, key, namespace, parent, home, reserved_3) = fields  # fmt: skip
    header = prefix + data[PREFIX_NBYTES:header_nbytes]
    if verify and (header_checksum(header) != header_sum or (checksum is not None and checksum != header_sum)):
        raise CorruptFrame("the header's checksum does not match")
    if frame_nbytes > limit or frame_nbytes > MAX_FRAME_NBYTES:
        raise FrameError(f"frame size {frame_nbytes} is over the limit of {min(limit, MAX_FRAME_NBYTES)} bytes")
    kind = _KIND_BY_CODE.get(kind_code)
    if kind is None:
        raise FrameError(f"unknown kind {kind_code}")
    if reserved or reserved_2 or reserved_3 != NO_KEY:
        raise FrameError("reserved header fields are not zero")
    tensors = _parse_entries(header, count, header_nbytes, frame_nbytes, alignment)
    table_end = PREFIX_NBYTES + ENTRY_NBYTES * count
    if header[table_end:] != bytes(header_nbytes - table_end):
        raise FrameError("header padding is not zero")
    meta = FrameMeta(
        kind, key, namespace, parent, home, index, created_ms, expires_ms, _parse_text(writer, "writer", "ascii")
    )
    return FrameHeader(meta, alignment, tensors, header_nbytes, frame_nbytes, header_sum)


@lru_cache(maxsize=256)
def _parse_text(field: bytes, what: str, encoding: str = "utf-8") -> str:
    text = field.rstrip(b"\0")
    try:
        decoded = text.decode(encoding)
    except UnicodeDecodeError:
        raise FrameError(f"{what} is not {encoding.upper()}") from None
    if "\0" in decoded:
        raise FrameError(f"{what} holds a NUL byte")
    return decoded


@lru_cache(maxsize=4096)
def _parse_entry(head: bytes, tail: bytes) -> tuple[TensorSpec, int, int]:
    """(spec, offset, nbytes) of an entry without its checksum; remembered, as most frames of a run repeat them."""
    code, ndim, name_nbytes, reserved, offset, nbytes = _ENTRY_HEAD.unpack(head)
    *sizes, name_field = _ENTRY_TAIL.unpack(tail)
    dtype = _DTYPE_BY_CODE.get(code)
    if dtype is None:
        raise FrameError(f"unknown dtype code {code}")
    if ndim > MAX_DIMS or reserved or any(sizes[ndim:]):
        raise FrameError(f"tensor entry with {ndim} dimensions is malformed")
    name = _parse_text(name_field, "tensor name")
    if not name or len(name.encode()) != name_nbytes:
        raise FrameError(f"tensor name {name!r} is empty or of another length than declared")
    spread = _spread_nbytes(dtype[1], sizes[:ndim])
    if spread > MAX_FRAME_NBYTES or nbytes != (0 if 0 in sizes[:ndim] else spread):
        raise FrameError(f"tensor {name!r}: {nbytes} bytes are not what its shape gives")
    return TensorSpec(name, dtype[0], tuple(sizes[:ndim])), offset, nbytes


def _parse_entries(
    header: bytes, count: int, header_nbytes: int, frame_nbytes: int, alignment: int
) -> tuple[StoredTensor, ...]:
    tensors = []
    end = header_nbytes
    for position in range(PREFIX_NBYTES, PREFIX_NBYTES + ENTRY_NBYTES * count, ENTRY_NBYTES):
        split, rest = position + _ENTRY_HEAD.size, position + _ENTRY_HEAD.size + SUM_NBYTES
        spec, offset, nbytes = _parse_entry(header[position:split], header[rest : position + ENTRY_NBYTES])
        if offset != align_up(end, alignment):
            raise FrameError(f"tensor {spec.name!r}: offset {offset} is not where it must lie")
        end = offset + nbytes
        if end > frame_nbytes:
            raise FrameError(f"tensor {spec.name!r} ends at {end}, past the frame's {frame_nbytes} bytes")
        tensors.append(StoredTensor(spec, offset, nbytes, header[split:rest]))
    if end != frame_nbytes:
        raise FrameError(f"tensors end at {end} but the frame says {frame_nbytes} bytes")
    if count > 1 and len({tensor.spec.name for tensor in tensors}) != count:
        raise FrameError("two tensors share a name")
    return tuple(tensors)


def check_expected(header: FrameHeader, frame_nbytes: int, header_nbytes: int, key: bytes | None) -> None:
    """Raise FrameError unless the header has the announced sizes and, where `key` is given, echoes that key."""
    if header.frame_nbytes != frame_nbytes or header.header_nbytes != header_nbytes:
        raise FrameError("the frame's size is not the one that was announced")
    if key is not None and header.meta.key != key:
        raise CorruptFrame("the frame belongs to another key")
