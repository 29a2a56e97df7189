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
from mmcache.errors import ConfigError, MMCacheError, TransportError
from mmcache.private_file import check_private, read_private

try:
    import redis
    from redis.backoff import NoBackoff
    from redis.cluster import ClusterNode, RedisCluster
    from redis.credentials import CredentialProvider
    from redis.exceptions import RedisClusterException
    from redis.retry import Retry
    from redis.sentinel import Sentinel
except ImportError as error:
    raise ConfigError(f"a cluster in Redis needs the extra cluster ({error}); pip install 'mmcache[cluster]'") from None

WAIT_S: Final = 2.0  # for a connection, and for an answer
KEEP_S: Final = 3600  # what nobody refreshed for so long is gone from Redis, too
MAX_REASON: Final = 300  # characters
_NOW: Final = """
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
"""
# What is said now, in place of what was said before, if anything; who has not been heard of for a time is dropped, and
# what was said in a time to come: the clock was put back, or is that of another Redis since a failover.
_SAY: Final = f"""{_NOW}
redis.call('ZREM', KEYS[1], ARGV[2])
redis.call('ZADD', KEYS[1], now_ms, ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now_ms - ARGV[3])
redis.call('ZREMRANGEBYSCORE', KEYS[1], now_ms + ARGV[3], '+inf')
redis.call('EXPIRE', KEYS[1], ARGV[4])
"""
# Heartbeats, each with the time when it was last said, and ids of who is drained. No more members than the limit, of
# them the ones heard of last; what is longer than it may be is passed over.
_LOOK: Final = f"""{_NOW}
local function short(all, limit, step)
    local found = {{}}
    for place = 1, #all, step do
        if #all[place] <= tonumber(limit) then
            for next = place, place + step - 1 do found[#found + 1] = all[next] end
        end
    end
    return found
end
local first, last = now_ms - ARGV[1], now_ms + ARGV[1]
local said = redis.call('ZREVRANGEBYSCORE', KEYS[1], last, first, 'WITHSCORES', 'LIMIT', 0, ARGV[2])
return {{short(said, ARGV[3], 2), short(redis.call('SRANDMEMBER', KEYS[2], ARGV[2]), ARGV[4], 1)}}
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

    Keys, with the cluster's name as their hash tag, so that a Redis Cluster has them in one place: mmcache:{NAME}:beats
    (sorted set: heartbeats, by when they were last said, by Redis's clock) and mmcache:{NAME}:drained (set of ids);
    channel mmcache:{NAME}:changed.
    """

    def __init__(self, url: MembersUrl) -> None:
        self.what = url.what
        self._url = url
        prefix = f"mmcache:{{{url.name}}}:"
        self.channel, self._beats, self._drained = f"{prefix}changed", f"{prefix}beats", f"{prefix}drained"
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
        except MMCacheError:
            raise
        except (redis.RedisError, RedisClusterException, OSError, ValueError, TypeError) as error:
            # RedisClusterException is no RedisError; the last two: an answer that Redis would not give
            raise TransportError(
                f"{self.what} does not do as asked: {_reason(error)}; start it, or correct the URL"
            ) from error

    def seen(self, connection: Any) -> Seen:
        """Who is there now: one request, whatever their number, as there may be thousands of clients."""
        limits = (int(TTL_S * 1000), MAX_MEMBERS, MAX_BEAT_NBYTES, MAX_TEXT)
        said, drained = connection.eval(_LOOK, 2, self._beats, self._drained, *limits)
        heard, bad = [], []
        for data, said_ms in zip(said[::2], said[1::2], strict=True):
            try:
                heard.append((parse_beat(data), int(float(said_ms))))
            except NoBeat as error:
                bad.append(error.left_out)
        return who_is_in(heard, frozenset(id_.decode(errors="replace") for id_ in drained), bad)

    def now_ms(self, connection: Any) -> int:
        """By Redis's clock."""
        found: int = connection.eval(f"{_NOW} return now_ms", 1, self._beats)
        return found

    def say(self, connection: Any, beat: Beat, before: Beat | None = None) -> None:
        """Say this, in place of what was said before."""
        instead = before.pack() if before is not None and before != beat else b""
        connection.eval(_SAY, 1, self._beats, beat.pack(), instead, int(TTL_S * 1000), KEEP_S)

    def forget(self, connection: Any, beat: Beat) -> None:
        """Take back what was said."""
        connection.zrem(self._beats, beat.pack())

    def publish(self, connection: Any) -> None:
        """Wake everybody who follows."""
        connection.publish(self.channel, b"")

    def drain(self, connection: Any, id_: str, *, undo: bool) -> None:
        """Take a server out of every View, or back in; whether it runs or not."""
        (connection.srem if undo else connection.sadd)(self._drained, id_)
        self.publish(connection)


def _reason(error: BaseException) -> str:
    """The error in one line; libraries leave some without words, and give others pages."""
    return " ".join(str(error).split())[:MAX_REASON] or type(error).__name__
