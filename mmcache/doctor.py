"""What this machine can do for mmcache, tried rather than guessed, and why the rest cannot.

Other distributions and packages add their findings through the entry-point group `mmcache.doctor`: functions that
return (what, state, text) rows. Nothing here imports torch; what does is only asked.
"""

from __future__ import annotations

import mmap
import os
import platform
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib import metadata
from typing import Final, NamedTuple

from mmcache.client.blocking import Client
from mmcache.config import parse_url
from mmcache.connect import connect
from mmcache.errors import AccessDenied, DeadlineExceeded, MMCacheError, TransportError
from mmcache.store.arena import MEMORY_SHARE, Arena, memory_left_nbytes
from mmcache.transport import native
from mmcache.transport.nixl import DEVICES_VARIABLE, LOOPBACK, load_bindings

GROUP: Final = "mmcache.doctor"
GOOD: Final = "yes"
BAD: Final = "no"
ASK_S: Final = 2.0
_TRIED_NBYTES: Final = 1 << 20


class Finding(NamedTuple):
    """One thing that was looked at. `state`: "yes", "no", or a word of its own, such as a number."""

    what: str
    state: str
    text: str


def examine(url: str) -> list[Finding]:
    """Everything, in the order in which people ask. Never raises: what fails is a finding."""
    looks: dict[str, Callable[[], Iterable[Finding]]] = {
        "machine": _machine,
        "shared memory": _shared_memory,
        "native": _native,
        "server": lambda: _server(url),
        "access": lambda: _access(url),
        "nixl": _nixl,
        "packages": _added,
    }
    found: list[Finding] = []
    for name, look in looks.items():
        try:
            found += look()
        except Exception as error:
            found.append(Finding(name, BAD, f"{type(error).__name__}: {error}"))
    return found


def _machine() -> Iterable[Finding]:
    system = f"{platform.system()} {platform.release()}, Python {platform.python_version()}, {platform.machine()}"
    yield Finding("cores", str(os.cpu_count()), f"{system}; a client and a server want one each")
    left, source = memory_left_nbytes()
    most = f"the most `mmcache serve --memory` takes: {MEMORY_SHARE:.0%} of what {source} leaves"
    yield Finding("memory", f"{left * MEMORY_SHARE / 2**30:.1f} GiB", most)


def _shared_memory() -> Iterable[Finding]:
    try:
        arena = Arena(_TRIED_NBYTES)
    except MMCacheError as error:
        yield Finding("shared memory", BAD, f"{error}; clients use sockets")
        return
    if arena.why_not_shared:
        yield Finding("shared memory", BAD, f"{arena.why_not_shared}; clients use sockets")
        arena.close()
        return
    try:
        mmap.mmap(arena.fd, _TRIED_NBYTES, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE).close()
    except PermissionError:
        yield Finding("shared memory", GOOD, "sealed: clients on this host read it in place, only the server writes")
    else:
        yield Finding("shared memory", BAD, "the kernel let a second writable map through: do not share this host")
    finally:
        arena.close()


def _native() -> Iterable[Finding]:
    if native.NATIVE is native.PYTHON:
        yield Finding("native", BAD, f"{native.STATE}; what is read and written is copied, then hashed")
    else:
        said = f"mmcache-native, {native.STATE}: what is read and written is copied and hashed in one pass"
        yield Finding("native", GOOD, said)


def _server(url: str) -> Iterable[Finding]:
    try:
        with connect(url, deadline_s=ASK_S) as client:
            stat = client.stat()
    except MMCacheError as error:
        yield Finding("server", BAD, str(error))
        return
    text = f"{stat['server']} at {url} answers; read by {stat['transport']}: {stat['transport_why']}"
    yield Finding("server", GOOD, text)


def _access(url: str) -> Iterable[Finding]:
    """Whether the server asks who comes, found out by coming as nobody."""
    config = parse_url(url, deadline_s=ASK_S)
    if config.scheme == "embedded":
        return
    encrypted = "TLS" if config.scheme == "mmcaches" else "no TLS"
    try:
        with Client(replace(config, token="", token_file="", cert="", key="")) as nobody:
            nobody.stat()
    except TransportError as error:
        try:
            with Client(config) as known:
                known.stat()
        except AccessDenied:
            yield Finding(
                "access", BAD, f"{encrypted}; a valid token or client certificate is needed: see docs/access.md"
            )
        except TransportError:
            return  # the finding about the server says it
        else:
            if isinstance(error, DeadlineExceeded):  # it proves nothing
                yield Finding("access", "unknown", f"{encrypted}; a stranger was not answered in time: ask again")
                return
            what = "a token or a client certificate" if isinstance(error, AccessDenied) else "a client certificate"
            yield Finding("access", GOOD, f"{encrypted}; {what} is needed, and the URL's is good")
    else:
        yield Finding("access", "open", f"{encrypted}; whoever reaches the server may read and write: nothing is asked")


def _nixl() -> Iterable[Finding]:
    """Whether the bindings are there and have what is used; devices are tried by who reads."""
    try:
        bindings = load_bindings()
    except TransportError as error:
        yield Finding("nixl", BAD, f"{error}; transport=nixl and serve --nixl need it, nothing else does")
    else:
        devices = os.environ.get(DEVICES_VARIABLE) or f"{LOOPBACK}, so this host only; set {DEVICES_VARIABLE}"
        yield Finding("nixl", GOOD, f"{bindings.__package__}, over {devices}; for transport=nixl")


def _added() -> Iterable[Finding]:
    for entry in sorted(metadata.entry_points(group=GROUP)):
        try:
            yield from (Finding(*row) for row in entry.load()())
        except Exception as error:
            yield Finding(entry.name, BAD, f"{type(error).__name__}: {error}")
