"""Who asks: what an authenticated connection, or call, may see and do; no secrets here."""

from __future__ import annotations

from typing import NamedTuple


class Caller(NamedTuple):
    """Whose entries a request is about, and whether it may ask what operators ask.

    `tenant` numbers the tenant in the index and is never reused; `name` is for people and for selections.
    """

    tenant: int
    name: str
    admin: bool


LOCAL = Caller(tenant=0, name="", admin=True)  # anybody, where no access file says who is who
