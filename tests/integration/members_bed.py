"""A membership as a client has it, for tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from mmcache.cluster.membership import Watched
from mmcache.cluster.urls import open_membership


@contextlib.contextmanager
def watched(url: str) -> Iterator[Watched]:
    """The view that a URL's source keeps up to date."""
    members = open_membership(url)
    assert isinstance(members, Watched)
    try:
        yield members
    finally:
        members.close()
