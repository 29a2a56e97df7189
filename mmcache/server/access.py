"""Who may come in: the access file as a running server sees it, read again when it changes.

Several shards may share one file. What is cached belongs to a tenant's number, which stays for the life of the process,
so tokens come and go and nothing is lost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

from mmcache.errors import ConfigError
from mmcache.private_file import read_private
from mmcache.server.caller import Caller
from mmcache.server.grants import Admitted, Grants, digest_of, parse_grants
from mmcache.server.tenants import Tenants
from mmcache.server.watched import Watched
from mmcache.store.usage import Quota

MAX_TOKEN_CHARS: Final = 512
DENIED: Final = (
    "access denied: no valid token or certificate came with this connection; give the URL token_file=PATH (mode 0600), "
    "or cert=PATH and key=PATH of a client certificate that the server's access file lists"
)


class Pass(NamedTuple):
    """What somebody was let in with, and as whom. `shared_memory`: may map the server's memory."""

    caller: Caller
    shared_memory: bool
    digest: bytes
    common_name: str | None


class Access:
    """The access file at `path`. Raises ConfigError if it cannot be used at the start; later the old one stays.

    Thread-safe: a question sees one version of the file.
    """

    def __init__(self, path: str, tenants: Tenants | None = None, *, wall_s: Callable[[], float] = time.time) -> None:
        self.path = path
        self.tenants = tenants or Tenants()
        self._wall_s = wall_s
        self._looked_s = wall_s()
        self._file = Watched((path,), self._load, f"access file {path}")

    def _load(self) -> Grants:
        data = read_private(self.path, "access file")
        try:
            grants = parse_grants(data.decode())
        except (ConfigError, UnicodeDecodeError) as error:
            raise ConfigError(f"access file {self.path}: {error}") from None
        for name in grants.tenants:
            self.tenants.number(name)
        return grants

    def refresh(self) -> bool:
        """Read the file again if it changed; True if somebody who was let in might not be now."""
        before_s, self._looked_s = self._looked_s, self._wall_s()
        return self._file.refresh() or self._file.value.expires_between(before_s, self._looked_s)

    def admit(self, token: str, common_name: str | None) -> Pass | None:
        """Whoever comes with this token, this verified certificate (None: without), or both, of one tenant."""
        digest = digest_of(token if len(token) <= MAX_TOKEN_CHARS else "")
        admitted = self._file.value.admit(digest if token else b"", common_name, self._wall_s())
        if admitted is None:
            return None
        return Pass(self._caller(admitted), admitted.shared_memory, digest if token else b"", common_name)

    def still(self, held: Pass) -> bool:
        """Whether it would be let in now, as the same caller."""
        admitted = self._file.value.admit(held.digest, held.common_name, self._wall_s())
        return (
            admitted is not None
            and self._caller(admitted) == held.caller
            and admitted.shared_memory >= held.shared_memory
        )

    @property
    def quotas(self) -> Mapping[int, Quota]:
        """What each tenant may store, by its number; those that are no longer in the file are left out."""
        return {self.tenants.number(name): tenant.quota for name, tenant in self._file.value.tenants.items()}

    def _caller(self, admitted: Admitted) -> Caller:
        return Caller(self.tenants.number(admitted.tenant), admitted.tenant, admitted.admin)
