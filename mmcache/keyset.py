"""What a stored key consists of: Part (which piece of a value), Key (one name), Keys (columns of them).

How a chain key comes to be is in chain.py and keys.py; here is what follows from it: H(chain key, part), parents.
PURE: no clock, no randomness, no I/O.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, overload

from blake3 import blake3

from mmcache.encoding import DIGEST_NBYTES, check_count, check_digest, framed
from mmcache.errors import KeyInputError

NO_PARENT: Final = bytes(DIGEST_NBYTES)


@dataclass(frozen=True, slots=True)
class Part:
    """Which part of a block's value is stored: ranges of totals, never ranks. None means all of it.

    `kv_group` and `context` are (index, total); `layers` and `kv_heads` are (start, stop, total). A range that covers
    its whole total becomes None, so the same range has the same key under any tensor or pipeline parallel size, and
    heads replicated over ranks are stored once. An empty or out-of-range part raises KeyInputError.
    """

    kv_group: tuple[int, int] | None = None
    layers: tuple[int, int, int] | None = None
    kv_heads: tuple[int, int, int] | None = None
    context: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name in ("kv_group", "layers", "kv_heads", "context"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _normal_range(name, value))

    def encoded(self) -> bytes:
        """One byte of flags (1 kv_group, 2 layers, 4 kv_heads, 8 context), then the numbers of those set as u64-LE."""
        flags, numbers = 0, b""
        for bit, value in enumerate((self.kv_group, self.layers, self.kv_heads, self.context)):
            if value is not None:
                flags |= 1 << bit
                numbers += struct.pack(f"<{len(value)}Q", *value)
        return bytes([flags]) + numbers


def _normal_range(name: str, value: object) -> tuple[int, ...] | None:
    length = 2 if name in ("kv_group", "context") else 3
    if not isinstance(value, tuple) or len(value) != length:
        shape = "(index, total)" if length == 2 else "(start, stop, total)"
        raise KeyInputError(f"Part.{name}: expected a tuple {shape}, or None for all of it; got {value!r}")
    numbers = tuple(check_count(number, f"Part.{name}[{place}]") for place, number in enumerate(value))
    start, total = numbers[0], numbers[-1]
    stop = numbers[1] if length == 3 else start + 1
    if not start < stop <= total:
        raise KeyInputError(f"Part.{name}: {numbers} is empty or beyond its total; pass start < stop <= total")
    return None if stop - start == total else numbers


WHOLE: Final = Part()


def stored_keys(chains: Sequence[bytes], part: Part) -> list[bytes]:
    """H(chain, part) for each chain key, in order."""
    prefix = framed(b"k1.part") + struct.pack("<Q", DIGEST_NBYTES)
    suffix = framed(part.encoded())
    return [blake3(prefix + chain + suffix).digest() for chain in chains]


class NamespaceId(bytes):
    """A namespace's 32-byte id that remembers what it is the digest of: equal to the plain bytes, and hashed like them.

    A client declares `kind` and `facts` to a server, so that stored entries can be explained and removed by model.
    """

    kind: str
    facts: Mapping[str, str]

    def __new__(cls, digest: bytes, kind: str, facts: Mapping[str, str]) -> NamespaceId:
        self = super().__new__(cls, digest)
        self.kind, self.facts = kind, facts
        return self

    def __reduce__(self) -> tuple[type[NamespaceId], tuple[bytes, str, dict[str, str]]]:
        return NamespaceId, (bytes(self), self.kind, dict(self.facts))


@dataclass(frozen=True, slots=True, repr=False)
class Key:
    """The name of one stored value; every digest is 32 bytes, anything else raises KeyInputError.

    `digest` is the stored key, H(chain, part). `chain` identifies the content before the part. `home` is the chain key
    of the first block of the run this block belongs to: it decides placement. `namespace` is the namespace id, as a
    NamespaceId where the key was made from a Namespace. `parent` is the stored key of the previous block with the same
    part, `parent_chain` that block's chain key; 32 zero bytes mean there is none. `index` is the position in the chain.
    """

    digest: bytes
    chain: bytes
    home: bytes
    namespace: bytes
    parent: bytes = NO_PARENT
    index: int = 0
    parent_chain: bytes = NO_PARENT

    def __post_init__(self) -> None:
        for name in ("digest", "chain", "home", "namespace", "parent", "parent_chain"):
            check_digest(getattr(self, name), f"Key.{name}")
        check_count(self.index, "Key.index")

    def __repr__(self) -> str:
        return f"Key({self.digest.hex()[:16]}..., index {self.index})"

    def hex(self) -> str:
        """The stored key as 64 hexadecimal digits."""
        return self.digest.hex()


class Keys(Sequence[Key]):
    """An immutable sequence of keys, held as columns: `digests`, `chains`, `homes`, `namespaces`, `parents`,
    `parent_chains` and `indices`, all of one length and in order. The columns are lists for speed: do not change them.

    A slice is again Keys. Build one with `Namespace.block_keys`, `Keys.of` or `+`.
    """

    __slots__ = ("chains", "digests", "homes", "indices", "namespaces", "parent_chains", "parents")

    def __init__(
        self,
        digests: list[bytes],
        chains: list[bytes],
        homes: list[bytes],
        namespaces: list[bytes],
        parents: list[bytes],
        indices: Sequence[int],
        parent_chains: list[bytes],
    ) -> None:
        self.digests = digests
        self.chains = chains
        self.homes = homes
        self.namespaces = namespaces
        self.parents = parents
        self.indices = indices
        self.parent_chains = parent_chains

    @classmethod
    def of(cls, keys: Key | Iterable[Key]) -> Keys:
        """Keys from one key or from any iterable of them; a Keys is returned as it is."""
        if isinstance(keys, Keys):
            return keys
        if isinstance(keys, Key):
            key = keys
            columns = [key.digest], [key.chain], [key.home], [key.namespace], [key.parent], [key.index]
            return cls(*columns, [key.parent_chain])
        try:
            rows = list(keys)
        except TypeError:
            found = type(keys).__name__
            raise KeyInputError(f"keys: object of type {found} is no Key and no sequence of keys") from None
        for row in rows:
            if not isinstance(row, Key):
                found = type(row).__name__
                raise KeyInputError(f"keys: object of type {found} is no Key; use block_keys, opaque_key, ...")
        return cls(
            [row.digest for row in rows],
            [row.chain for row in rows],
            [row.home for row in rows],
            [row.namespace for row in rows],
            [row.parent for row in rows],
            [row.index for row in rows],
            [row.parent_chain for row in rows],
        )

    def pick(self, positions: Sequence[int]) -> Keys:
        """The keys at these positions, in this order."""
        if len(positions) == len(self) and list(positions) == list(range(len(self))):
            return self
        picked: list[list[Any]] = [[column[row] for row in positions] for column in self._columns()]
        return Keys(*picked)

    def for_part(self, part: Part) -> Keys:
        """The same blocks' keys for another part: new `digests` and `parents`, everything else shared.

        Raises KeyInputError if a key has a parent whose chain key is unknown (a Key built by hand).
        """
        digests = stored_keys(self.chains, part)
        parents: list[bytes] = []
        for row, above in enumerate(self.parent_chains):
            if above == NO_PARENT:
                if self.parents[row] != NO_PARENT:
                    raise KeyInputError(f"keys[{row}]: its parent's chain key is missing; set Key.parent_chain")
                parents.append(NO_PARENT)
            elif row and self.chains[row - 1] == above:
                parents.append(digests[row - 1])
            else:
                parents += stored_keys([above], part)
        return Keys(digests, self.chains, self.homes, self.namespaces, parents, self.indices, self.parent_chains)

    def __len__(self) -> int:
        return len(self.digests)

    @overload
    def __getitem__(self, index: int) -> Key: ...
    @overload
    def __getitem__(self, index: slice) -> Keys: ...
    def __getitem__(self, index: int | slice) -> Key | Keys:
        row: tuple[Any, ...] = tuple(column[index] for column in self._columns())
        return Keys(*row) if isinstance(index, slice) else Key(*row)

    def __iter__(self) -> Iterator[Key]:
        return (Key(*row) for row in zip(*self._columns(), strict=True))

    def __add__(self, other: Keys) -> Keys:
        if not isinstance(other, Keys):
            return NotImplemented
        pairs = zip(self._columns(), other._columns(), strict=True)
        joined: list[list[Any]] = [[*left, *right] for left, right in pairs]
        return Keys(*joined)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Keys):
            return NotImplemented
        pairs = zip(self._columns(), other._columns(), strict=True)
        return all(list(left) == list(right) for left, right in pairs)

    def __repr__(self) -> str:
        return f"Keys({len(self)} keys, first {self.digests[0].hex()[:16]})" if self.digests else "Keys(0 keys)"

    def _columns(self) -> tuple[Sequence[Any], ...]:
        return (
            self.digests,
            self.chains,
            self.homes,
            self.namespaces,
            self.parents,
            self.indices,
            self.parent_chains,
        )


def woven(columns: Sequence[Keys]) -> Keys:
    """Several keys of the same blocks, one block after the other: all of the first block, of the second, and so on."""
    if len(columns) == 1:
        return columns[0]
    held = zip(*[keys._columns() for keys in columns], strict=True)
    rows: list[list[Any]] = [[value for row in zip(*each, strict=True) for value in row] for each in held]
    return Keys(*rows)
