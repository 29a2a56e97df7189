"""Changes to the text of an access file that leave everything else in it as it was, comments included. PURE.

Every change is checked by reading the result: it must differ from the old content by just what was asked.
"""

from __future__ import annotations

import re
from typing import Final

from mmcache.errors import ConfigError
from mmcache.server.grants import TENANT_NAME, Grant, Grants, parse_grants

LEAST_DIGITS: Final = 6  # of a digest, to name a token
_BY_HAND: Final = "the file is not laid out as `mmcache token` writes it; edit it by hand"
_HEADER: Final = re.compile(r"^\s*\[", re.MULTILINE)


def quoted(text: str) -> str:
    """A TOML string. Raises ConfigError for what cannot stand on one line."""
    if not text.isprintable():
        raise ConfigError(f"{text!r} has characters that cannot be printed; leave them out")
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def with_token(
    text: str,
    tenant: str,
    sha256: str,
    *,
    admin: bool = False,
    expires: str = "",
    note: str = "",
    quota: str = "",
    namespace_quota: str = "",
) -> str:
    """The file with one more token, and its tenant if it is new. Raises ConfigError."""
    if not TENANT_NAME.fullmatch(tenant):
        raise ConfigError(f"{tenant!r} cannot name a tenant; use 1 to 64 letters, digits, '.', '_' and '-'")
    old = parse_grants(text) if text.strip() else Grants({})
    lines: list[str] = []
    if tenant not in old.tenants:
        lines += ["[[tenant]]", f"name = {quoted(tenant)}"]
        lines += [f"quota = {quoted(quota)}"] if quota else []
        lines += [f"namespace_quota = {quoted(namespace_quota)}"] if namespace_quota else []
        lines.append("")
    elif quota or namespace_quota:
        raise ConfigError(f"tenant {tenant} is in the file already; change its quota there")
    lines += ["[[token]]", f"tenant = {quoted(tenant)}", f"sha256 = {quoted(sha256)}"]
    lines += ["admin = true"] if admin else []
    lines += [f"expires = {quoted(expires)}"] if expires else []
    lines += [f"note = {quoted(note)}"] if note else []
    new = "\n".join([*([text.rstrip("\n"), ""] if text.strip() else []), *lines, ""])
    if parse_grants(new).tokens[:-1] != old.tokens:
        raise ConfigError(_BY_HAND)
    return new


def find_token(grants: Grants, digits: str) -> Grant:
    """The one token whose digest begins with these hexadecimal digits. Raises ConfigError."""
    if len(digits) < LEAST_DIGITS:
        raise ConfigError(f"{digits!r} is too short; give at least {LEAST_DIGITS} digits, see `mmcache token list`")
    found = [grant for grant in grants.tokens if grant.digest.hex().startswith(digits.lower())]
    if len(found) != 1:
        many = f"{len(found)} tokens begin" if found else "no token begins"
        raise ConfigError(f"{many} with {digits!r}; `mmcache token list` shows them")
    return found[0]


def without_token(text: str, grant: Grant) -> str:
    """The file without this token; its tenant stays, and so does what it stored. Raises ConfigError."""
    old = parse_grants(text)
    left = tuple(token for token in old.tokens if token != grant)
    if not left and not old.certificates:
        raise ConfigError("it is the last one, and a file must let somebody in; add the new token before")
    starts = [match.start() for match in _HEADER.finditer(text)]
    number = 0
    for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
        block = text[start:end]
        if not block.lstrip().startswith("[[token]]"):
            continue
        if old.tokens[number : number + 1] == (grant,):
            body = block.rstrip("\n").split("\n")
            while body and (not body[-1].strip() or body[-1].lstrip().startswith("#")):
                body.pop()  # what stands right before the next entry belongs to that
            rest = block[len("\n".join(body)) :].lstrip("\n")
            new = text[:start] + rest + text[end:]
            try:
                found = parse_grants(new)
            except ConfigError:
                break
            if found == Grants(old.tenants, left, old.certificates):
                return new
            break
        number += 1
    raise ConfigError(_BY_HAND)
