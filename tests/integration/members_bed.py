"""A membership as a client has it, for tests."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from mmcache.cluster.membership import Watched
from mmcache.cluster.registration import Registration
from mmcache.cluster.urls import open_membership
from tests.integration.support import eventually


@contextlib.contextmanager
def watched(url: str) -> Iterator[Watched]:
    """The view that a URL's source keeps up to date."""
    members = open_membership(url)
    assert isinstance(members, Watched)
    try:
        yield members
    finally:
        members.close()


def ids(members: Watched) -> list[str]:
    return [member.id.removeprefix("127.0.0.1:") for member in members.view().members]


def becomes(members: Watched, *expected: str, patience_s: float = 10.0) -> float:
    """Seconds until the view has exactly these."""
    began_s = time.monotonic()
    eventually(lambda: ids(members) == list(expected), f"the view is {expected}", patience_s)
    return time.monotonic() - began_s


def stays(holds: Callable[[], bool], for_s: float) -> None:
    until_s = time.monotonic() + for_s
    while time.monotonic() < until_s:
        assert holds()
        time.sleep(0.05)


def leave(servers: list[Registration]) -> None:
    for one in servers:
        one.leave()
        one.gone()
