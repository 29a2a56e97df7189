"""Membership: who is in the cluster now, as a View that never blocks and outlives what it was learnt from."""

from __future__ import annotations

from typing import Protocol

from mmcache.cluster.placement import View


class Membership(Protocol):
    """What a client needs of it."""

    def view(self) -> View:
        """The last View known. Never blocks, never raises; the same object until it changes."""
        ...

    def close(self) -> None:
        """Stop to follow; `view` goes on to answer. Does not block."""
        ...


class Static:
    """One View for ever."""

    def __init__(self, view: View) -> None:
        self._view = view

    def view(self) -> View:
        """See Membership."""
        return self._view

    def close(self) -> None:
        """See Membership."""
