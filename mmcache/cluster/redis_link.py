"""The way to Redis or Valkey, for both sides of membership: alone, by Sentinel or as a Redis Cluster; TLS, a password.

Every wait is bounded, errors are mmcache's, and nothing is tried again here: whoever follows does, with pauses.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Final

from mmcache.cluster.beats import MAX_BEAT_NBYTES, TTL_S, Beat, NoBeat, parse_beat, who_is_in
from mmcache.cluster.seen import MAX_MEMBERS, MAX_TEXT, Seen
from mmcache.cluster.urls import MembersUrl
from mmcache.errors import ConfigError, TransportError
from mmcache.private_file import check_private, read_private

try:
    import redis
    from redis.backoff import NoBackoff
    from redis.cluster import ClusterNode, RedisCluster
    from redis.credentials import CredentialProvider
    from redis.retry import Retry
    from redis.sentinel import Sentinel
except ImportError as error:
    raise ConfigError(f"a cluster in Redis needs the extra cluster ({error}); pip install 'mmcache[cluster]'") from None

WAIT_S: Final = 2.0  # for a connection, and for an answer
KEEP_S: Final = 3600  # a registration that nobody refreshed is not even listed after so long
# Heartbeats, each with the milliseconds that it still lives, and ids of who is drained. No more members than the limit,
# of them the ones heard of last, and of each no more than a heartbeat may have; what is no string is passed over.
_LOOK: Final = """
local said, limit = {}, tonumber(ARGV[4])
for _, name in ipairs(redis.call('ZREVRANGE', KEYS[1], 0, ARGV[2] - 1)) do
    local beat = #name <= limit and redis.pcall('GETRANGE', ARGV[1] .. name, 0, ARGV[3])
    if type(beat) == 'string' and #beat > 0 then
        said[#said + 1] = beat
        said[#said + 1] = redis.call('PTTL', ARGV[1] .. name)
    end
end
local drained = {}
for _, id in ipairs(redis.call('SRANDMEMBER', KEYS[2], ARGV[2])) do
    if #id <= limit then drained[#drained + 1] = id end
end
return {said, drained}
"""


class _Password(CredentialProvider):  # type: ignore[misc]  # redis is not there for the type checker
    """Read for every connection, so that it can be changed without a restart."""

    def __init__(self, path: str, user: str) -> None:
        self._path, self._user = path, user

    def get_credentials(self) -> tuple[str, ...]:
        """User, where there is one, and password."""
        password = read_private(self._path, "Redis password file").decode(errors="replace").strip()
        return (self._user, password) if self._user else (password,)


class RedisLink:
    """One cluster's keys in one Redis. Holds no connection: `open` gives one. Raises ConfigError for files.

    Keys, all with the cluster's name as their hash tag, so that a Redis Cluster has them in one place:
    mmcache:{NAME}:beats (sorted set of registrations, by when they were last heard of), mmcache:{NAME}:beat:R
    (a heartbeat, with a time to live), mmcache:{NAME}:drained (set of ids); channel mmcache:{NAME}:changed.
    """

    def __init__(self, url: MembersUrl) -> None:
        self.what = url.what
        self._url = url
        prefix = f"mmcache:{{{url.name}}}:"
        self.channel, self._beats, self._drained = f"{prefix}changed", f"{prefix}beats", f"{prefix}drained"
        self._beat = f"{prefix}beat:"
        for name in ("password_file", "sentinel_password_file"):
            if path := url.options.get(name):
                read_private(path, "Redis password file")
        if key := url.options.get("redis_key"):
            check_private(key, "key for Redis")

    def _settings(self, password_option: str) -> dict[str, Any]:
        options = self._url.options
        found: dict[str, Any] = {
            "socket_timeout": WAIT_S,
            "socket_connect_timeout": WAIT_S,
            "retry": Retry(NoBackoff(), 0),
            "protocol": 2,
        }
        if path := options.get(password_option):
            found["credential_provider"] = _Password(path, self._url.user)
        elif self._url.user:
            raise ConfigError(f"{self.what}: a user was given and no {password_option}")
        if self._url.tls:
            found |= {
                "ssl": True,
                "ssl_ca_certs": options.get("redis_ca"),
                "ssl_certfile": options.get("redis_cert"),
                "ssl_keyfile": options.get("redis_key"),
                "ssl_check_hostname": True,
            }
        return found

    def _connect(self) -> Any:
        settings, url = self._settings("password_file"), self._url
        if url.kind == "cluster":
            nodes = [ClusterNode(host, port) for host, port in url.hosts]
            return RedisCluster(startup_nodes=nodes, **settings)
        if url.kind == "sentinel":
            there = self._settings("sentinel_password_file")
            sentinel = Sentinel(url.hosts, sentinel_kwargs=there, db=url.db, **settings)
            return sentinel.master_for(url.master)
        ((host, port),) = url.hosts
        return redis.Redis(host=host, port=port, db=url.db, **settings)

    @contextlib.contextmanager
    def open(self) -> Iterator[Any]:
        """A connection of redis-py, closed at the end. Raises TransportError for all that goes wrong inside."""
        try:
            connection = self._connect()
            with contextlib.closing(connection):
                yield connection
        except (redis.RedisError, OSError) as error:
            if isinstance(error, TransportError):
                raise
            raise TransportError(
                f"{self.what} does not do as asked: {_reason(error)}; start it, or correct the URL"
            ) from error

    def seen(self, connection: Any) -> Seen:
        """Who is there now: one request, whatever their number, as there may be thousands of clients."""
        limits = (MAX_MEMBERS, MAX_BEAT_NBYTES, MAX_TEXT)
        said, drained = connection.eval(_LOOK, 2, self._beats, self._drained, self._beat, *limits)
        beats, bad = [], []
        for data, left_ms in zip(said[::2], said[1::2], strict=True):
            try:
                beats.append(parse_beat(data, age_s=max(0.0, TTL_S - left_ms / 1000)))
            except NoBeat as error:
                bad.append(error.left_out)
        return who_is_in(beats, frozenset(id_.decode(errors="replace") for id_ in drained), bad)

    def say(self, connection: Any, beat: Beat, now_s: float) -> None:
        """Write a heartbeat; list it; forget registrations that nobody has refreshed for long."""
        with connection.pipeline(transaction=False) as pipeline:
            pipeline.set(f"{self._beat}{beat.registration}", beat.pack(), px=int(TTL_S * 1000))
            pipeline.zadd(self._beats, {beat.registration: now_s})
            if beat.beats == 0:
                pipeline.zremrangebyscore(self._beats, "-inf", now_s - KEEP_S)
            pipeline.execute()

    def forget(self, connection: Any, beat: Beat) -> None:
        """Take a heartbeat away."""
        with connection.pipeline(transaction=False) as pipeline:
            pipeline.delete(f"{self._beat}{beat.registration}")
            pipeline.zrem(self._beats, beat.registration)
            pipeline.execute()

    def publish(self, connection: Any) -> None:
        """Wake everybody who follows."""
        connection.publish(self.channel, b"")

    def drain(self, connection: Any, id_: str, *, undo: bool) -> None:
        """Take a server out of every View, or back in; whether it runs or not."""
        (connection.srem if undo else connection.sadd)(self._drained, id_)
        self.publish(connection)


def _reason(error: BaseException) -> str:
    """The error in one line; libraries leave some without words."""
    return " ".join(str(error).split()) or type(error).__name__
