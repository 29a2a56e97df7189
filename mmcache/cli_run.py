"""Servers run from the command line until SIGTERM or Ctrl-C: one in this process, or several, each in its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from mmcache._version import __version__
from mmcache.cli_common import progress_bar
from mmcache.config import ServerConfig, place_text
from mmcache.errors import MMCacheError
from mmcache.server.heap import keep_freed_memory
from mmcache.server.joining import check_join, registration_for
from mmcache.server.serve import Server
from mmcache.server.shard_plan import shard_configs
from mmcache.server.stops import block_signals, stop_asked
from mmcache.server.supervisor import Supervisor
from mmcache.store.arena import check_room

if TYPE_CHECKING:
    from mmcache.cluster.registration import Registration

Shards = list[dict[str, Any]]  # their ready lines
LEAVE_S: Final = 1.0  # from saying that it leaves until it takes no more requests
JOIN_S: Final = 3.0  # the ready line waits so long for who knows the cluster


def run_shards(config: ServerConfig, words: list[str], tell: Callable[[Shards], None]) -> None:
    """A process for each of `config.shards`, until a stop signal. `tell` hears what they said once all accept.

    Raises MMCacheError if one does not start, or does not end as asked.
    """
    block_signals()
    configs = shard_configs(config)
    check_room(config.memory_nbytes)  # each shard on its own would find room for its share
    check_join(config)  # else each shard would say what is wrong with it
    supervisor = Supervisor(configs, words)
    try:
        ready = supervisor.start()
        if ready is None:
            return
        tell(ready)
        supervisor.watch()
    finally:
        bad = supervisor.stop()
    if bad:
        raise MMCacheError(f"did not drain and end as asked: {', '.join(bad)}; look at what they said before")


def tell_shards(config: ServerConfig, *, as_json: bool) -> Callable[[Shards], None]:
    """The ready line of `serve --shards`."""

    def tell(ready: Shards) -> None:
        if as_json:
            print(json.dumps({"ready": True, "memory_nbytes": config.memory_nbytes, "shards": ready}), flush=True)
            return
        size = f"{config.shards} shards of {config.memory_nbytes // config.shards / 2**20:.0f} MiB"
        names = {"unix_path": "unix socket ", "metrics_url": "metrics ", "grpc_address": "gRPC "}
        also = [[f"{text}{one[name]}" for name, text in names.items() if one.get(name)] for one in ready]
        for more, one in zip(also, ready, strict=True):
            more += [] if one.get("joined") is not False else ["not joined yet"]
        shards = [f"{one['url']} ({'; '.join(more)})" for one, more in zip(ready, also, strict=True)]
        print(f"mmcache {__version__} ready: {size}: {', '.join(shards)}", flush=True)

    return tell


def run_server(config: ServerConfig, *, as_json: bool) -> None:
    """One server, in this process, until a stop signal; then it leaves its cluster, drains and is gone."""
    block_signals()
    check_join(config)
    with progress_bar("taking memory") as show:
        server = Server(config, progress=show)
    serve_on(server, as_json=as_json)


def serve_on(server: Server, *, as_json: bool, accepts: Callable[[dict[str, Any]], None] | None = None) -> None:
    """The same with a server that has its memory. `accepts` is given the ready line once it accepts, and may add to
    it."""
    config = server.config
    if config.grpc:
        keep_freed_memory()
    server.start()
    registration = registration_for(config, server.address[1]) if config.join and server.address else None
    if registration is not None:
        registration.start(JOIN_S)
    ready = _ready(config, server, registration)
    if accepts is not None:
        accepts(ready)
    print(json.dumps(ready) if as_json else _ready_line(config, ready), flush=True)
    stop_asked()
    if registration is not None and registration.leave():
        stop_asked(LEAVE_S)  # it serves on, until clients know; a second signal hurries it
    server.stop()
    if registration is not None:
        registration.gone()


def _ready(config: ServerConfig, server: Server, registration: Registration | None) -> dict[str, Any]:
    host, port = server.address or ("", 0)
    scheme = "mmcaches" if config.tls_cert else "mmcache"
    url = f"{scheme}://{place_text(host, port)}" if host else f"mmcache+unix://{server.unix_path}"
    ready = {"ready": True, "url": url, "unix_path": server.unix_path, "memory_nbytes": config.memory_nbytes}
    ready |= {"metrics_url": server.metrics_url} if server.metrics_url else {}
    ready |= {"grpc_address": place_text(*server.grpc_address)} if server.grpc_address else {}
    ready |= {"member": registration.id, "joined": not registration.why_not} if registration is not None else {}
    return ready


def _ready_line(config: ServerConfig, ready: dict[str, Any]) -> str:
    size = f"{config.memory_nbytes / 2**20:.0f} MiB, {config.entries} entries"
    names = {"metrics_url": "metrics", "grpc_address": "gRPC"}
    page = "".join(f"; {text} {ready[name]}" for name, text in names.items() if name in ready)
    if "member" in ready:
        page += f"; {'' if ready['joined'] else 'not yet '}in the cluster as {ready['member']}"
    return f"mmcache {__version__} ready: {ready['url']} ({size}; unix socket {ready['unix_path'] or 'off'}{page})"
