"""What `mmcache serve` runs: one server, several in processes of their own, or one whose memory is held.

Each prints a ready line once it accepts; a server that a holder started again prints another one.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from mmcache.cli_common import progress_bar
from mmcache.cli_run import run_server, run_shards, serve_on, tell_shards
from mmcache.config import ENV_PREFIX, ServerConfig, server_config
from mmcache.errors import ConfigError, MMCacheError, StoreError, UsageError
from mmcache.logs import log_to_stderr
from mmcache.server import holder
from mmcache.server.held import Held
from mmcache.server.joining import check_join
from mmcache.server.serve import Server
from mmcache.server.shard_plan import environment_of, where_it_is
from mmcache.server.stops import block_signals
from mmcache.store.arena import check_huge_pages, check_room, memory_file, size_for_good
from mmcache.store.kept import Kept, kept_nbytes

log = logging.getLogger("mmcache.server")


def run(config: ServerConfig, *, verbose: bool, as_json: bool) -> None:
    """Serve with these settings until a stop signal."""
    log_to_stderr(config.log, logging.DEBUG if verbose else logging.WARNING)
    if not config.listen and not config.unix_path:
        raise ConfigError("there is nothing to listen on; give --listen HOST:PORT or --unix PATH")
    words = ["--verbose"] if verbose else []
    if config.shards > 1:
        run_shards(config, words, tell_shards(config, as_json=as_json))
    elif config.hold:
        block_signals()
        check_join(config)
        _become_holder(config, [*words, "--json"] if as_json else words)
    else:
        run_server(config, as_json=as_json)


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
        with held.tries():
            server, kept = _take_over(held, config)
        if held.ended and kept is not None:
            _tell(server, kept, held.ended, time.monotonic() - began_s)

        def accepts(ready: dict[str, Any]) -> None:
            ready["restored_entries"] = server.shard.restored.entries
            if kept is not None:
                kept.remember_places(ready)
            held.ready()

        serve_on(server, as_json="--json" in words, accepts=accepts)
    except MMCacheError as error:
        print(f"mmcache: {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, UsageError) else 1
    return 0


def _take_over(held: Held, config: ServerConfig) -> tuple[Server, Kept | None]:
    """A server on the memory that is held. Raises MMCacheError."""
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
    return Server(config, arena=arena, kept=kept), kept


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
