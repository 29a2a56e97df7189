"""What a source of membership says at one moment, and what is made of it over time. Pure: the time is an argument."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Final
from urllib.parse import urlsplit

from mmcache.cluster.placement import Member
from mmcache.errors import ConfigError

MAX_MEMBERS: Final = 1024
MAX_TEXT: Final = 255  # of an id; a DNS name has no more
CONFIRM_S: Final = 4.0  # longer than a server takes to say again that it is there, when what it said was lost


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A server that has said that it is there and is in no View; `why` is for people."""

    id: str
    address: str
    why: str


@dataclass(frozen=True, slots=True)
class Seen:
    """Who is in, in any order, who is left out, and what is wrong with what the source holds, for people."""

    members: tuple[Member, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    problems: tuple[str, ...] = ()


def check_id(text: object) -> str:
    """An id as it is. Raises ConfigError for what could not be one."""
    if not isinstance(text, str) or not 0 < len(text) <= MAX_TEXT or not text.isprintable():
        raise ConfigError(f"{str(text)[:MAX_TEXT]!r} is no id; an id has 1 to {MAX_TEXT} printable characters")
    return text


def check_address(text: object) -> str:
    """mmcache://HOST:PORT or mmcaches://HOST:PORT, as it is. Raises ConfigError.

    Nothing else: who can write an address must not choose what a client opens (a socket file, options of its own).
    """
    says = "an address is mmcache://HOST:PORT or mmcaches://HOST:PORT, and no more"
    if not isinstance(text, str) or not text.isascii() or not text.isprintable() or len(text) > 2 * MAX_TEXT:
        raise ConfigError(f"{str(text)[:MAX_TEXT]!r} is no address; {says}")
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"{text!r} is no address ({error}); {says}") from None
    scheme, marks, rest = text.partition("://")
    if scheme not in ("mmcache", "mmcaches") or not marks or not host or not port or set(rest) & set("/?#@, \\"):
        raise ConfigError(f"{text!r} is no address; {says}")
    return text


def check_weight(value: object) -> float:
    """Above 0, and finite as a float, which a whole number need not be. Raises ConfigError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
        raise ConfigError(
            f"{str(value)[:MAX_TEXT]!r} is no weight; a weight is a number above 0, such as GiB of memory"
        )
    return float(value)


class Roster:
    """Members over time: who says goodbye is out at once, who is only not there any more after CONFIRM_S.

    What a source holds can be lost (a Redis that was restarted, emptied or failed over), and the servers say it again
    within CONFIRM_S; a client that believed each loss would move every key twice.
    """

    def __init__(self) -> None:
        self._members: dict[str, Member] = {}
        self._missing_since_s: dict[str, float] = {}

    def update(self, seen: Seen, now_s: float) -> Seen:
        """What to believe after this was seen."""
        now = {member.id: member for member in seen.members}
        goodbye = {one.id for one in seen.left_out}
        kept: dict[str, Member] = {}
        missing: dict[str, float] = {}
        for id_, member in self._members.items():
            since_s = self._missing_since_s.get(id_, now_s)
            if id_ not in now and id_ not in goodbye and now_s - since_s < CONFIRM_S:
                kept[id_], missing[id_] = member, since_s
        self._members, self._missing_since_s = kept | now, missing
        return replace(seen, members=tuple(sorted(self._members.values())))

    def lost(self) -> None:
        """The source was out of reach: nobody was looked for meanwhile."""
        self._missing_since_s = {}

    def next_s(self, now_s: float) -> float | None:
        """Seconds until somebody who is missing is given up; None: nobody is missing."""
        soonest_s = min(self._missing_since_s.values(), default=None)
        return None if soonest_s is None else max(0.0, soonest_s + CONFIRM_S - now_s)
