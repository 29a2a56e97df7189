"""What the tests of access share: access files, a server with tenants a, b and ops, and raw joins."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from mmcache.pb import cache_pb2 as pb
from mmcache.server.access_edit import with_token
from mmcache.server.grants import digest_of
from mmcache.testing.process import ServerProcess
from mmcache.transport.base import Op
from tests.integration.certificates import Authority
from tests.integration.support import Raw

TOKENS = {"a": "token-of-a", "b": "token-of-b", "ops": "token-of-ops"}
EXPIRED = "token-of-a-that-expired"


def write_access(path: Path, text: str) -> str:
    """Replace an access file in one step, as an editor or `mmcache token` does."""
    new = path.with_suffix(".new")
    new.touch(0o600)
    new.write_text(text)
    new.rename(path)
    return str(path)


def tenants_file() -> str:
    """Tenants a, b and ops (an admin), an expired token of a, and a's certificate engine-1."""
    text = ""
    for tenant, token in TOKENS.items():
        text = with_token(text, tenant, digest_of(token).hex(), admin=tenant == "ops")
    text = with_token(text, "a", digest_of(EXPIRED).hex(), expires="2020-01-01T00:00:00Z")
    return text + '\n[[certificate]]\ncommon_name = "engine-1"\ntenant = "a"\n'


class Bed(NamedTuple):
    """A TLS server with `tenants_file`, and who signs."""

    server: ServerProcess
    authority: Authority
    folder: Path

    def url(self, options: str = "") -> str:
        """Its TLS port, trusted."""
        return f"{self.server.url}?ca={self.authority.ca}{options}"

    def with_certificate(self, name: str) -> str:
        """The same, showing the certificate of this file name."""
        return self.url(f"&cert={self.folder / name}.pem&key={self.folder / name}.key")

    @property
    def unix_url(self) -> str:
        """Its unix socket."""
        return f"mmcache+unix://{self.server.unix_path}"


def bed_arguments(folder: Path) -> tuple[Authority, list[str]]:
    """An authority with a server's certificate, and what `serve` needs to know of it."""
    authority = Authority(folder)
    cert, key = authority.issue("server")
    access = write_access(folder / "access.toml", tenants_file())
    return authority, ["--access", access, "--tls-cert", cert, "--tls-key", key, "--tls-client-ca", authority.ca]


def ask_join(raw: Raw, token: str) -> tuple[Op, bytes]:
    """Join with this token; the answer."""
    raw.ask(Op.JOIN, pb.JoinRequest(protocol=1, client="raw", token=token))
    return raw.answer()
