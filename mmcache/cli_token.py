"""`mmcache token`: make, list and revoke the tokens of an access file. Running servers follow within two seconds."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import secrets
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmcache.errors import ConfigError
from mmcache.private_file import read_private, write_private
from mmcache.server.access_edit import find_token, with_token, without_token
from mmcache.server.grants import Grants, digest_of, parse_grants

token_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Tokens say who a client is: make, list and revoke them.",
    epilog="Examples: **mmcache token new --file access.toml --tenant team-a --out team-a.token**, then "
    "**mmcache serve --access access.toml** and connect to mmcache://127.0.0.1:7600?token_file=team-a.token",
)
TOKEN_NBYTES = 32
TOKEN_PREFIX = "mmc_"  # so that scanners for secrets can tell what they found
WHAT = "access file"
File = Annotated[
    Path, typer.Option("--file", "-f", envvar="MMCACHE_ACCESS_FILE", metavar="FILE", help="The access file.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """One editor at a time; a rename replaces the file, so the lock is its directory's."""
    try:
        fd = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"{file.parent} cannot be opened: {error.strerror}; make the directory first") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _read(file: Path) -> str:
    try:
        return read_private(str(file), WHAT).decode()
    except UnicodeDecodeError:
        raise ConfigError(f"{WHAT} {file} is not text") from None


def _parse(file: Path, text: str) -> Grants:
    try:
        return parse_grants(text)
    except ConfigError as error:
        raise ConfigError(f"{WHAT} {file}: {error}") from None


@token_app.command(
    epilog="Examples: **mmcache token new -f access.toml --tenant team-a** · **mmcache token new -f access.toml "
    "--tenant ops --admin --expires 2026-12-31T00:00:00Z --note 'for cron' --out ops.token**"
)
def new(
    file: File,
    tenant: Annotated[str, typer.Option("--tenant", "-t", metavar="NAME", help="Whose it is; added if new.")],
    admin: Annotated[bool, typer.Option("--admin", help="May also do what operators do.")] = False,
    expires: Annotated[
        str, typer.Option("--expires", metavar="TIME", help="Until when, such as 2026-12-31T00:00:00Z; else for ever.")
    ] = "",
    quota: Annotated[
        str, typer.Option("--quota", metavar="SIZE", help="Of a new tenant: the most bytes it may have stored.")
    ] = "",
    namespace_quota: Annotated[
        str, typer.Option("--namespace-quota", metavar="SIZE", help="The same for each of its namespaces.")
    ] = "",
    note: Annotated[str, typer.Option("--note", metavar="TEXT", help="For people.")] = "",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Write the token here, mode 0600; not printed.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a token and print it, once: the file keeps only its digest. A tenant may have several, so rotate with
    overlap: make the new one, give it out, revoke the old one. Nothing cached is lost."""
    token = TOKEN_PREFIX + secrets.token_urlsafe(TOKEN_NBYTES)
    digest = digest_of(token).hex()
    with _locked(file):
        text = _read(file) if file.exists() else ""
        try:
            text = with_token(text, tenant, digest, admin=admin, expires=expires, note=note, quota=quota,
                              namespace_quota=namespace_quota)  # fmt: skip
        except ConfigError as error:
            raise ConfigError(f"{WHAT} {file}: {error}") from None
        if out is not None:
            write_private(out, f"{token}\n".encode(), replace=False, what="token file")
        write_private(file, text.encode(), replace=True, what=WHAT)
    if as_json:
        print(json.dumps({"tenant": tenant, "sha256": digest, "token": token if out is None else None}))
    elif out is None:
        print(token)
    print(f"mmcache: {file} now lets {tenant} in with token {digest[:12]}", file=sys.stderr)


@token_app.command(
    "list", epilog="Examples: **mmcache token list -f access.toml** · **mmcache token list -f access.toml --json**"
)
def list_tokens(file: File, as_json: Json = False) -> None:
    """Show tokens and certificates: whose, which digest, until when. Nothing here is a secret."""
    grants = _parse(file, _read(file))
    now_s = time.time()
    rows = [
        {
            "tenant": grant.tenant,
            "sha256": grant.digest.hex()[:12] if grant.digest else None,
            "common_name": grant.common_name or None,
            "admin": grant.admin,
            "expires": None
            if math.isinf(grant.expires_s)
            else datetime.fromtimestamp(grant.expires_s, UTC).isoformat(),
            "expired": grant.expires_s <= now_s,
            "note": grant.note,
        }
        for grant in (*grants.tokens, *grants.certificates)
    ]
    if as_json:
        print(json.dumps(rows))
        return
    table = Table(box=None, padding=(0, 2))
    for name in ("tenant", "token or certificate", "admin", "expires", "note"):
        table.add_column(name)
    for row in rows:
        until = f"{row['expires'] or 'never'}{' (expired)' if row['expired'] else ''}"
        named = str(row["sha256"] or f"CN={row['common_name']}")
        cells = (str(row["tenant"]), named, "yes" if row["admin"] else "", until, str(row["note"]))
        table.add_row(*map(escape, cells))
    Console().print(table)


@token_app.command(epilog="Examples: **mmcache token revoke 5f0c12ab -f access.toml**")
def revoke(
    digits: Annotated[str, typer.Argument(metavar="DIGEST", help="The first digits of its digest, at least 6.")],
    file: File,
) -> None:
    """Take a token out. Connections that came in with it end within two seconds; what they stored stays."""
    with _locked(file):
        text = _read(file)
        try:
            grant = find_token(parse_grants(text), digits)
            text = without_token(text, grant)
        except ConfigError as error:
            raise ConfigError(f"{WHAT} {file}: {error}") from None
        write_private(file, text.encode(), replace=True, what=WHAT)
    print(f"mmcache: token {grant.digest.hex()[:12]} of {grant.tenant} is revoked", file=sys.stderr)
