"""What `mmcache serve` runs: one server, several in processes of their own, or one whose memory is held.

Each prints a ready line once it accepts; a server that a holder started again prints another one.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from mmcache._version import __version__
from mmcache.cli_common import progress_bar
from mmcache.config import ENV_PREFIX, ServerConfig, server_config
from mmcache.errors import ConfigError, MMCacheError, StoreError, UsageError
from mmcache.logs import log_to_stderr
from mmcache.server import holder
from mmcache.server.heap import keep_freed_memory
from mmcache.server.held import Held
from mmcache.server.serve import Server
from mmcache.server.shard_plan import environment_of, place_text, shard_configs, where_it_is
from mmcache.server.supervisor import STOP_SIGNALS, Supervisor
from mmcache.store.arena import check_huge_pages, check_room, memory_file, size_for_good
from mmcache.store.kept import Kept, kept_nbytes

log = logging.getLogger("mmcache.server")


def run(config: ServerConfig, *, verbose: bool, as_json: bool) -> None:
    """Serve with these settings until a stop signal."""
    log_to_stderr(config.log, logging.DEBUG if verbose else logging.WARNING)
    if not config.listen and not config.unix_path:
        raise ConfigError("there is nothing to listen on; give --listen HOST:PORT or --unix PATH")
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # before any thread starts: all inherit it, one waits
    words = ["--verbose"] if verbose else []
    if config.shards > 1:
        _run_shards(config, words, as_json=as_json)
    elif config.hold:
        _become_holder(config, [*words, "--json"] if as_json else words)
    else:
        with progress_bar("taking memory") as show:
            server = Server(config, progress=show)
        _run(server, as_json=as_json)


def _run_shards(config: ServerConfig, words: list[str], *, as_json: bool) -> None:
    configs = shard_configs(config)
    check_room(config.memory_nbytes)  # each shard on its own would find room for its share
    supervisor = Supervisor(configs, words)
    try:
        ready = supervisor.start()
        if ready is None:
            return
        if as_json:
            print(json.dumps({"ready": True, "memory_nbytes": config.memory_nbytes, "shards": ready}), flush=True)
        else:
            size = f"{config.shards} shards of {config.memory_nbytes // config.shards / 2**20:.0f} MiB"
            names = {"unix_path": "unix socket ", "metrics_url": "metrics ", "grpc_address": "gRPC "}
            also = [[f"{text}{one[name]}" for name, text in names.items() if one.get(name)] for one in ready]
            shards = [f"{one['url']} ({'; '.join(more)})" for one, more in zip(ready, also, strict=True)]
            print(f"mmcache {__version__} ready: {size}: {', '.join(shards)}", flush=True)
        supervisor.watch()
    finally:
        bad = supervisor.stop()
    if bad:
        raise MMCacheError(f"did not drain and end as asked: {', '.join(bad)}; look at what they said before")


def _run(server: Server, *, as_json: bool, held: tuple[Held, Kept | None] | None = None) -> None:
    config = server.config
    if config.grpc:
        keep_freed_memory()
    server.start()
    host, port = server.address or ("", 0)
    scheme = "mmcaches" if config.tls_cert else "mmcache"
    url = f"{scheme}://{place_text(host, port)}" if host else f"mmcache+unix://{server.unix_path}"
    grpc = place_text(*server.grpc_address) if server.grpc_address else ""
    ready = {"ready": True, "url": url, "unix_path": server.unix_path, "memory_nbytes": config.memory_nbytes}
    ready |= {"metrics_url": server.metrics_url} if server.metrics_url else {}
    ready |= {"grpc_address": grpc} if grpc else {}
    if held is not None:
        ready["restored_entries"] = server.shard.restored.entries
        if held[1] is not None:
            held[1].remember_places(ready)
        held[0].ready()
    if as_json:
        print(json.dumps(ready), flush=True)
    else:
        size = f"{config.memory_nbytes / 2**20:.0f} MiB, {config.entries} entries"
        page = f"; metrics {server.metrics_url}" if server.metrics_url else ""
        page += f"; gRPC {grpc}" if grpc else ""
        socket = f"unix socket {server.unix_path or 'off'}"
        print(f"mmcache {__version__} ready: {url} ({size}; {socket}{page})", flush=True)
    signal.sigwait(STOP_SIGNALS)
    server.stop()


def _become_holder(config: ServerConfig, words: list[str]) -> NoReturn:
    """This process becomes the holder of the memory, which starts the server. Raises StoreError where there is not so
    much memory."""
    nbytes = config.memory_nbytes
    if config.huge_pages:
        check_huge_pages(nbytes)
    else:
        check_room(nbytes)
    try:
        fd = memory_file(huge_pages=config.huge_pages)
        size_for_good(fd, nbytes)
        os.set_inheritable(fd, True)
    except OSError as error:
        raise StoreError(f"no memory that can be held: {error}; leave --hold out") from error
    others = {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
    # -P: the folder of the script is no place to import from
    command = [sys.executable, "-P", str(Path(holder.__file__)), str(fd), str(kept_nbytes(config.entries)), *words]
    os.execve(sys.executable, command, others | environment_of(config))


def serve_held(given: Mapping[str, Any]) -> int:
    """In a process that a holder forked (server/holder.py): serve with what was given. The exit code."""
    words, began_s = given["words"], time.monotonic()
    try:
        config = server_config()
        log_to_stderr(config.log, logging.DEBUG if "--verbose" in words else logging.WARNING)
        held = Held.given(given)
        try:
            kept = held.kept(config)
        except StoreError as error:
            kept = None
            log.warning("started anew, and a restart will be: %s", error)
        config = where_it_is(config, kept.places) if kept is not None and kept.places else config
        arena = held.arena(config)
        if config.prefault and (kept is None or kept.why_cold):
            with progress_bar("taking memory") as show:
                arena.prefault(show)
        server = Server(config, arena=arena, kept=kept)
        if held.ended and kept is not None:
            _tell(server, kept, held.ended, time.monotonic() - began_s)
        _run(server, as_json="--json" in words, held=(held, kept))
    except MMCacheError as error:
        print(f"mmcache: {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, UsageError) else 1
    return 0


def _tell(server: Server, kept: Kept, ended: str, took_s: float) -> None:
    restored = server.shard.restored
    if kept.why_cold:
        log.warning("the server before this one %s; this one starts empty: %s", ended, kept.why_cold)
    else:
        log.warning(
            "the server before this one %s; %d entries (%.0f MiB) go on, %d were dropped, in %.2f s",
            ended,
            restored.entries,
            restored.nbytes / 2**20,
            restored.dropped,
            took_s,
        )
