"""Heartbeats: what a server says of itself in Redis, and who is in, given what all have said. Pure.

A heartbeat is one JSON object. Each start of a server is a registration of its own, so that a restart can be told from
two servers that go by one id.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, Final

from mmcache.cluster.placement import Member
from mmcache.cluster.seen import MAX_MEMBERS, LeftOut, Seen, check_address, check_id, check_weight
from mmcache.errors import ConfigError
from mmcache.frame import VERSION as FRAME
from mmcache.transport.base import OLDEST_PROTOCOL, PROTOCOL

SCHEMA: Final = 1  # of the heartbeat; fields may be added without a new one
MAX_BEAT_NBYTES: Final = 4096
BEAT_S: Final = 2.0
TTL_S: Final = 6.0  # two beats may be lost
STATES: Final = ("serving", "draining")


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """What a server says, the same bytes each time. `since_ms` is when it registered, by the clock of who holds it."""

    id: str
    address: str
    weight: float
    registration: str
    since_ms: int
    state: str = "serving"
    version: str = ""
    schema: int = SCHEMA
    frame: int = FRAME
    oldest_protocol: int = OLDEST_PROTOCOL
    protocol: int = PROTOCOL

    @property
    def why_not(self) -> str:
        """Why no client of this release may use the server; empty: it may."""
        if self.frame != FRAME or self.protocol < OLDEST_PROTOCOL or self.oldest_protocol > PROTOCOL:
            return (
                f"it speaks protocol {self.oldest_protocol} to {self.protocol} and frames v{self.frame}, this release "
                f"{OLDEST_PROTOCOL} to {PROTOCOL} and v{FRAME}; upgrade the older of them"
            )
        return "" if self.state == "serving" else self.state

    def pack(self) -> bytes:
        """As it is stored; what `parse_beat` reads."""
        return json.dumps(asdict(self), separators=(",", ":")).encode()


class NoBeat(ConfigError):
    """What is stored is no heartbeat that this release can use; `left_out` says whose, as far as can be told."""

    def __init__(self, left_out: LeftOut) -> None:
        super().__init__(left_out.why)
        self.left_out = left_out


@lru_cache(maxsize=2 * MAX_MEMBERS)  # the same bytes come every few seconds, to a process that has other things to do
def parse_beat(data: bytes) -> Beat:
    """Raises NoBeat for anything that is not a heartbeat of this schema."""
    found: Any = None
    try:
        if len(data) > MAX_BEAT_NBYTES:
            raise ConfigError(f"what it says is longer than {MAX_BEAT_NBYTES} bytes")
        found = json.loads(data)
        if not isinstance(found, dict):
            raise ConfigError("what it says is no JSON object")
        if found.get("schema") != SCHEMA:
            raise ConfigError(
                f"its heartbeat has schema {_short(found.get('schema'))}, this release reads {SCHEMA}; upgrade one"
            )
        return Beat(
            id=check_id(found.get("id")),
            address=check_address(found.get("address")),
            weight=check_weight(found.get("weight")),
            registration=check_id(found.get("registration")),
            state=_state(found.get("state")),
            version=_short(found.get("version", "")),
            **{name: _whole(found, name) for name in _WHOLE},
        )
    except (ConfigError, ValueError, RecursionError) as error:  # RecursionError: brackets by the thousand
        said = found if isinstance(found, dict) else {}
        why = str(error) if isinstance(error, ConfigError) else "what it says is no JSON"
        raise NoBeat(LeftOut(_short(said.get("id", "?")), _short(said.get("address", "?")), why)) from None


_WHOLE: Final = ("since_ms", "frame", "oldest_protocol", "protocol")


def _whole(found: dict[str, Any], name: str) -> int:
    value = found.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 63:
        raise ConfigError(f"its heartbeat's {name} is {_short(value)}, not a whole number")
    return value


def _state(value: object) -> str:
    if value not in STATES:
        raise ConfigError(f"its state is {_short(value)}, not one of {', '.join(STATES)}")
    return str(value)


def _short(value: object) -> str:
    """For people, whatever it is."""
    return "".join(char if char.isprintable() else "?" for char in str(value)[:100])


def who_is_in(heard: Iterable[tuple[Beat, int]], drained: Collection[str] = (), bad: Iterable[LeftOut] = ()) -> Seen:
    """Members among these heartbeats, each with the time in ms when it was last said: of those with one id the newest
    registration; none that is drained."""
    newest: dict[str, Beat] = {}
    older: list[tuple[Beat, int]] = []
    last_ms: dict[str, int] = {}
    for beat, said_ms in sorted(heard, key=lambda one: (one[0].since_ms, one[0].registration)):
        if beat.id in newest:
            older.append((newest[beat.id], last_ms[beat.id]))
        newest[beat.id], last_ms[beat.id] = beat, said_ms
    members, left_out = [], list(bad)
    for beat in newest.values():
        why = beat.why_not or ("drained; `mmcache cluster drain --undo` takes it back" if beat.id in drained else "")
        if why:
            left_out.append(LeftOut(beat.id, beat.address, why))
        else:
            members.append(Member(beat.id, beat.address, beat.weight))
    problems = {_clash(old, newest[old.id]) for old, said_ms in older if _still_there(old, said_ms, newest[old.id])}
    return Seen(tuple(members), tuple(left_out), tuple(sorted(problems)))


def _still_there(old: Beat, said_ms: int, new: Beat) -> bool:
    """Whether the older of two was heard of since the newer is there: it was not restarted, there are two."""
    return said_ms > new.since_ms and old.state == new.state == "serving"


def _clash(old: Beat, new: Beat) -> str:
    return (
        f"two servers go by the id {new.id} ({old.address} and {new.address}); the one that came last is used: give "
        "each an address of its own (serve --advertise)"
    )


def draining(beat: Beat) -> Beat:
    """The same server, on its way out."""
    return replace(beat, state="draining")
