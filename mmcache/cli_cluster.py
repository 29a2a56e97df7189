"""The commands of a cluster: up, and cluster status, where and drain."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Final, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmcache._version import __version__
from mmcache.cli_common import DEFAULT_URL, Json, Url, Verbose, key_digest, printable, size_text
from mmcache.cli_run import Shards, run_shards
from mmcache.client.blocking import Client
from mmcache.client.cluster_shard import shard_config
from mmcache.cluster.placement import Member, View
from mmcache.cluster.seen import Seen
from mmcache.cluster.settings import parse_cluster_url
from mmcache.cluster.urls import MembersUrl, look, parse_members_url, redis_url
from mmcache.config import ENV_PREFIX, parse_nbytes, server_config
from mmcache.errors import MMCacheError, TransportError, UsageError
from mmcache.frame import parse_header
from mmcache.logs import log_to_stderr
from mmcache.server.joining import joined_url
from mmcache.store.arena import can_be_held

DEADLINE_S: Final = 2.0  # for each server that is asked
ASKED_AT_ONCE: Final = 16
T = TypeVar("T")

cluster_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="See who is in a cluster, where a key lives, and take a server out.",
    epilog="Examples: **mmcache cluster status -c mmcache://a:7600,b:7600** · "
    "**mmcache cluster where KEY -c 'mmcache+redis://127.0.0.1:6379/0?cluster=prod'** · "
    "**mmcache cluster drain a:7600 -c 'mmcache+redis://127.0.0.1:6379/0?cluster=prod'**",
)


def register(app: typer.Typer) -> None:
    """Add these commands."""
    app.command(
        epilog="Examples: **mmcache up --shards 3** · **mmcache up --shards 3 --redis redis://127.0.0.1:6379** · "
        "**MMCACHE_POLICY=lru mmcache up --memory 8GiB**"
    )(up)
    app.add_typer(cluster_app, name="cluster")


def up(
    shards: Annotated[int, typer.Option(min=1, metavar="N", help="Processes, each a server of its own.")] = 3,
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Of all together; default: 1GiB.")] = None,
    listen: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Of the first; the others count up. Default: 127.0.0.1:7600."),
    ] = None,
    redis: Annotated[
        str | None, typer.Option(metavar="URL", help="Have them join a cluster there: redis://HOST:PORT/DB.")
    ] = None,
    cluster: Annotated[
        str | None, typer.Option(metavar="NAME", help="What the cluster is called in Redis; default: mmcache.")
    ] = None,
    hold: Annotated[
        bool | None,
        typer.Option(
            "--hold/--no-hold",
            help="Have what dies come back with what it stored (docs/warm-restart.md). Default: hold, where memory can "
            "be shared.",
        ),
    ] = None,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Run a whole cluster on this host until SIGTERM or Ctrl-C, and print the URL to connect to.

    What dies is started again, with what it stored. Other settings are those of `serve`, by environment variables.
    """
    if cluster and not redis:
        raise UsageError("--cluster is the name in Redis; give --redis too, or leave it out")
    join = redis_url(redis, cluster or "") if redis else None
    nbytes = None if memory is None else parse_nbytes(memory)
    if hold is None and f"{ENV_PREFIX}HOLD" not in os.environ:
        hold = can_be_held()
    config = server_config(listen=listen, shards=shards, memory_nbytes=nbytes, join=join, hold=hold)
    log_to_stderr(config.log, logging.DEBUG if verbose else logging.WARNING)
    if join:
        look(joined_url(join))  # raises now, with what to do, what each shard would only log and try again

    def tell(ready: Shards) -> None:
        scheme = ready[0]["url"].partition("://")[0]
        url = join or f"{scheme}://{','.join(one['url'].partition('://')[2] for one in ready)}"
        if as_json:
            said = {"ready": True, "url": url, "memory_nbytes": config.memory_nbytes, "shards": ready}
            print(json.dumps(said), flush=True)
            return
        size = size_text(config.memory_nbytes // config.shards)
        print(f"mmcache {__version__} ready: {config.shards} x {size}; connect to\n{url}", flush=True)

    run_shards(config, ["--verbose"] if verbose else [], tell)


@dataclass(frozen=True)
class _Cluster:
    """What a URL says, and who is in now."""

    url: MembersUrl
    settings: Mapping[str, Any]  # by which each server is reached
    seen: Seen

    @classmethod
    def of(cls, url: str) -> _Cluster:
        """Raises ConfigError, TransportError."""
        config = parse_cluster_url(url)
        parsed = parse_members_url(config.members)
        return cls(parsed, config.settings, look(parsed))

    def nobody(self) -> MMCacheError:
        """To raise where nobody is in."""
        return MMCacheError(f"no server is in {self.url.what}; start one with `mmcache serve --join`")

    def ask(self, members: tuple[Member, ...], ask: Callable[[Client], T]) -> list[T | MMCacheError]:
        """What each says, or why it says nothing; all are asked at once, and each has DEADLINE_S."""

        def one(member: Member) -> T | MMCacheError:
            try:
                with Client(shard_config(member.address, {"deadline_s": DEADLINE_S, **self.settings})) as client:
                    return ask(client)
            except MMCacheError as error:
                return error

        with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
            return list(pool.map(one, members))


@cluster_app.command(
    epilog="Examples: **mmcache cluster status -c mmcache://a:7600,b:7600** · **mmcache cluster status -c URL --json**"
)
def status(url: Url = DEFAULT_URL, as_json: Json = False) -> None:
    """Show who is in, each one's share of the keys and what it holds; who is left out, and why.

    Exits 1 if nobody is in, or somebody who is does not answer.
    """
    cluster = _Cluster.of(url)
    seen, members = cluster.seen, tuple(sorted(cluster.seen.members))
    total = sum(member.weight for member in members)
    rows = [
        {"id": member.id, "address": member.address, "weight": member.weight, "share": member.weight / total} | said
        for member, said in zip(members, map(_state, cluster.ask(members, Client.stat)), strict=True)
    ]
    if as_json:
        left_out = [asdict(one) for one in seen.left_out]
        view = View(members).version if members else None
        print(json.dumps({"view": view, "members": rows, "left_out": left_out, "problems": list(seen.problems)}))
    else:
        _print_status(rows)
        for one in seen.left_out:
            print(f"left out: {printable(one.id)} ({printable(one.address)}): {printable(one.why)}")
        for problem in seen.problems:
            print(f"problem: {printable(problem)}")
    if not members:
        raise cluster.nobody()
    if silent := sum("why" in row for row in rows):
        raise MMCacheError(f"{silent} of {len(rows)} do not answer; their keys are misses until they do")


def _state(said: Any) -> dict[str, Any]:
    if isinstance(said, MMCacheError):
        return {"why": str(said)}
    names = ("entries", "bytes_used", "bytes_capacity", "hits", "misses")
    found = {name: said["counters"][name] for name in names if name in said["counters"]}
    return {"server": said["server"], "uptime_s": said["uptime_s"]} | found


def _print_status(rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    table = Table()
    for name in ("id", "share", "entries", "used", "of", "up"):
        table.add_column(name, justify="left" if name == "id" else "right", no_wrap=True)
    for row in rows:
        sizes = [size_text(row[name]) if name in row else "?" for name in ("bytes_used", "bytes_capacity")]
        entries = f"{row['entries']:,}" if "entries" in row else "?"
        said = [entries, *sizes, f"{row['uptime_s']:.0f} s"] if "why" not in row else ["", "", "", "no"]
        table.add_row(escape(printable(row["id"])), f"{row['share']:.1%}", *said)
    Console().print(table)
    for row in rows:
        if "why" in row:
            print(f"no answer: {printable(row['id'])}: {printable(row['why'])}")


@cluster_app.command(
    epilog="Examples: **mmcache cluster where 5f0c…(64 hex digits) -c mmcache://a:7600,b:7600** · "
    "**mmcache cluster where KEY -c URL --json**"
)
def where(
    key: Annotated[str, typer.Argument(metavar="KEY", help="A stored key, 64 hexadecimal digits (Key.hex()).")],
    home: Annotated[
        str | None, typer.Option(metavar="HOME", help="The first key of its run, where nobody has the key stored.")
    ] = None,
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> None:
    """Say which servers own a key, best first, and which have it.

    Blocks are placed by runs: by the key of the run's first block, which the stored block says; a key that nobody has
    is taken to be its own home, as those of embeddings are. Exits 1 if nobody has it.
    """
    digest = key_digest(key)
    given = key_digest(home) if home else None
    cluster = _Cluster.of(url)
    if not cluster.seen.members:
        raise cluster.nobody()
    view = View(cluster.seen.members)
    replies = cluster.ask(view.members, lambda client: client.inspect(digest))
    silent = {view.members[n].id: str(one) for n, one in enumerate(replies) if isinstance(one, MMCacheError)}
    homes = {
        view.members[n].id: parse_header(one.header, limit_nbytes=1 << 40).meta.home
        for n, one in enumerate(replies)
        if not isinstance(one, MMCacheError) and one.found
    }
    used = given or next(iter(homes.values()), digest)
    owners = [view.members[n].id for n in view.owners(used, len(view.members))]
    if as_json:
        found = {"key": digest.hex(), "home": used.hex(), "owners": owners, "stored": sorted(homes), "silent": silent}
        print(json.dumps(found))
    else:
        print(f"home {used.hex()}")
        for place, owner in enumerate(owners):
            has = "has it" if owner in homes else "does not answer" if owner in silent else "has it not"
            print(f"{place + 1:>4}. {printable(owner)}: {has}")
    if not homes:
        asked = f"; {len(silent)} do not answer" if silent else ""
        raise TransportError(f"nobody has {key}{asked}; it may have been evicted, or its owner left")


@cluster_app.command(
    epilog="Examples: **mmcache cluster drain a:7600 -c 'mmcache+redis://127.0.0.1:6379/0?cluster=prod'** · "
    "**mmcache cluster drain a:7600 --undo -c URL**"
)
def drain(
    member: Annotated[str, typer.Argument(metavar="ID", help="As `mmcache cluster status` shows it.")],
    undo: Annotated[bool, typer.Option("--undo", help="Take it back in.")] = False,
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> None:
    """Take a server out of every client's view, also when it is restarted, until --undo. It is not stopped.

    What it alone holds is missed from then on. Needs a cluster in Redis: elsewhere whoever keeps the list does it.
    """
    parsed = parse_members_url(parse_cluster_url(url).members)
    if parsed.kind in ("static", "k8s"):
        how = "take it out of the list" if parsed.kind == "static" else "delete its pod, or make it not ready"
        raise UsageError(f"drain needs a cluster in Redis: here, {how}")
    from mmcache.cluster.redis_link import RedisLink

    seen = look(parsed)
    known = {one.id for one in seen.members} | {one.id for one in seen.left_out}
    link = RedisLink(parsed)
    with link.open() as connection:
        if member not in known and not undo:
            raise UsageError(f"{member!r} is not in {parsed.what}; there are {', '.join(sorted(known)) or 'none'}")
        if not undo and not {one.id for one in seen.members} - {member}:
            raise UsageError(f"{member} is the last one in {parsed.what}; start another first, or stop it")
        link.drain(connection, member, undo=undo)
    print(json.dumps({"id": member, "drained": not undo}) if as_json else f"{member} {'is back' if undo else 'is out'}")
