"""What an access file says: tenants, their quotas, and which token or certificate speaks for whom. PURE.

The file holds SHA-256 digests of tokens, so that reading it is not enough to use one. A plain, fast hash is right here:
a token is 256 random bits, and no one can try so many; slow hashes protect what people think up.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, NamedTuple, TypeVar

from mmcache.errors import ConfigError
from mmcache.store.usage import Quota
from mmcache.units import parse_nbytes

TENANT_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
MAX_ENTRIES: Final = 4096  # every token is compared with every entry
G = TypeVar("G")


class Tenant(NamedTuple):
    """A [[tenant]]. `shared_memory` None: only as long as it is the only tenant."""

    name: str
    quota: Quota = Quota()
    shared_memory: bool | None = None


class Grant(NamedTuple):
    """A [[token]] or a [[certificate]]: whoever has it is `tenant`. `digest` is empty for a certificate, `common_name`
    for a token."""

    tenant: str
    admin: bool
    expires_s: float  # Unix seconds; inf: never
    digest: bytes = b""
    common_name: str = ""
    note: str = ""


class Admitted(NamedTuple):
    """Who was let in, and as what. Two that are equal may do the same."""

    tenant: str
    admin: bool
    shared_memory: bool


def digest_of(token: str) -> bytes:
    """What an access file holds of a token."""
    return hashlib.sha256(token.encode(errors="replace")).digest()


@dataclass(frozen=True)
class Grants:
    """A whole access file."""

    tenants: Mapping[str, Tenant]
    tokens: tuple[Grant, ...] = ()
    certificates: tuple[Grant, ...] = ()

    def token(self, digest: bytes) -> Grant | None:
        """The token with this digest. Compares with every entry, each in constant time: how long it takes tells nothing
        about what came or what is there."""
        position = 0
        for number, grant in enumerate(self.tokens, 1):
            position += number * hmac.compare_digest(grant.digest, digest)
        return self.tokens[position - 1] if position else None

    def certificate(self, common_name: str) -> Grant | None:
        """The entry of a certificate's name. The name is public, and the certificate is verified already."""
        for grant in self.certificates:
            if grant.common_name == common_name:
                return grant
        return None

    def admit(self, digest: bytes, common_name: str | None, now_s: float) -> Admitted | None:
        """Who comes with the token of this digest (empty: without one) and this verified certificate (None: without).

        The token says who it is. A certificate that comes too must be listed for the same tenant.
        """
        token, certificate = self.token(digest or bytes(32)), self.certificate(common_name or "")
        grant = token if digest else certificate
        if grant is None or not now_s < grant.expires_s:
            return None
        if common_name is not None and (certificate is None or certificate.tenant != grant.tenant):
            return None
        return Admitted(grant.tenant, grant.admin, self.shares_memory(grant.tenant))

    def expires_between(self, then_s: float, now_s: float) -> bool:
        """Whether an entry ceased to be valid in that time."""
        return any(then_s < grant.expires_s <= now_s for grant in (*self.tokens, *self.certificates))

    def shares_memory(self, tenant: str) -> bool:
        """Whether its clients on this host may map the memory, which holds everybody's entries."""
        said = self.tenants[tenant].shared_memory
        return len(self.tenants) == 1 if said is None else said


def parse_grants(text: str) -> Grants:
    """The content of an access file. Raises ConfigError that names the entry, the field and what to write."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"it is not TOML: {error}") from None
    unknown = data.keys() - {"tenant", "token", "certificate"}
    if unknown:
        raise ConfigError(f"it has {sorted(unknown)[0]!r}; an access file holds [[tenant]], [[token]], [[certificate]]")
    tenants = _entries(data, "tenant", _tenant, lambda tenant: tenant.name, "name")
    known = {tenant.name: tenant for tenant in tenants}
    tokens = _entries(data, "token", lambda entry: _token(entry, known), lambda grant: grant.digest, "sha256")
    certificates = _entries(
        data, "certificate", lambda entry: _certificate(entry, known), lambda grant: grant.common_name, "common_name"
    )
    if not tokens and not certificates:
        raise ConfigError("it lets nobody in: add a token with `mmcache token new --file FILE --tenant NAME`")
    return Grants(known, tuple(tokens), tuple(certificates))


class _Entry:
    """One table of the file; errors name it."""

    def __init__(self, name: str, fields: Mapping[str, Any]) -> None:
        self._name, self._fields, self._left = name, fields, set(fields)

    def __contains__(self, field: str) -> bool:
        return field in self._fields

    def bad(self, field: str, trouble: str) -> ConfigError:
        return ConfigError(f"{self._name}, {field}: {trouble}")

    def get(self, field: str, kind: type[G], default: G | None, example: str) -> G:
        self._left.discard(field)
        value = self._fields.get(field, default)
        if value is None:
            raise self.bad(field, f"is missing; write {field} = {example}")
        if type(value) is not kind:
            raise self.bad(field, f"is {value!r}; write {field} = {example}")
        return value

    def nbytes(self, field: str) -> int | None:
        self._left.discard(field)
        value = self._fields.get(field)
        if value is None:
            return None
        if type(value) is int and value >= 0:
            return value
        try:
            return parse_nbytes(value if type(value) is str else repr(value))
        except ConfigError as error:
            raise self.bad(field, str(error)) from None

    def instant_s(self, field: str) -> float:
        self._left.discard(field)
        value = self._fields.get(field)
        if value is None:
            return math.inf
        try:
            instant = value if isinstance(value, datetime) else datetime.fromisoformat(value)
            if instant.tzinfo is not None:
                return instant.timestamp()
        except (TypeError, ValueError, OverflowError):
            pass
        raise self.bad(field, f'is {value!r}; write a time with its zone, {field} = "2026-12-31T00:00:00Z"')

    def end(self) -> None:
        if self._left:
            field = min(self._left)
            raise self.bad(field, f"is unknown; a {self._name.split()[0]} has other fields, see docs/access.md")


def _entries(
    data: Mapping[str, Any], kind: str, read: Callable[[_Entry], G], key: Callable[[G], object], field: str
) -> list[G]:
    found = data.get(kind, [])
    if not isinstance(found, list) or not all(isinstance(fields, dict) for fields in found):
        raise ConfigError(f"{kind} is not a list of tables; begin each entry with [[{kind}]]")
    if len(found) > MAX_ENTRIES:
        raise ConfigError(f"it has {len(found)} [[{kind}]] entries; the limit is {MAX_ENTRIES}: revoke old ones")
    seen: dict[object, int] = {}
    entries = []
    for number, fields in enumerate(found, 1):
        entry = _Entry(f"{kind} {number}", fields)
        value = read(entry)
        entry.end()
        if key(value) in seen:
            raise entry.bad(field, f"is that of {kind} {seen[key(value)]} too; remove one of them")
        seen[key(value)] = number
        entries.append(value)
    return entries


def _tenant(entry: _Entry) -> Tenant:
    name = entry.get("name", str, None, '"team-a"')
    if not TENANT_NAME.fullmatch(name):
        raise entry.bad("name", f"is {name!r}; use 1 to 64 letters, digits, '.', '_' and '-'")
    quota = Quota(entry.nbytes("quota"), entry.nbytes("namespace_quota"))
    return Tenant(name, quota, entry.get("shared_memory", bool, False, "true") if "shared_memory" in entry else None)


def _whose(entry: _Entry, tenants: Mapping[str, Tenant]) -> str:
    tenant = entry.get("tenant", str, None, '"team-a"')
    if tenant not in tenants:
        raise entry.bad("tenant", f"{tenant!r} is not in the file; add [[tenant]] with name = {tenant!r}")
    return tenant


def _token(entry: _Entry, tenants: Mapping[str, Tenant]) -> Grant:
    tenant = _whose(entry, tenants)
    digest = entry.get("sha256", str, None, "what `mmcache token new` writes").lower()
    if not _DIGEST.fullmatch(digest):
        raise entry.bad("sha256", "is not 64 hexadecimal digits; the digest of a token, never the token itself")
    return Grant(
        tenant=tenant,
        admin=entry.get("admin", bool, False, "true"),
        expires_s=entry.instant_s("expires"),
        digest=bytes.fromhex(digest),
        note=entry.get("note", str, "", '"for whom"'),
    )


def _certificate(entry: _Entry, tenants: Mapping[str, Tenant]) -> Grant:
    tenant = _whose(entry, tenants)
    common_name = entry.get("common_name", str, None, '"engine-1"')
    if not common_name:
        raise entry.bad("common_name", "is empty; write the certificate's common name")
    return Grant(
        tenant=tenant,
        admin=entry.get("admin", bool, False, "true"),
        expires_s=entry.instant_s("expires"),
        common_name=common_name,
        note=entry.get("note", str, "", '"for whom"'),
    )
