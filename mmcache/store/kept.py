"""Memory that outlives the server: whether what lies in it is this server's to go on with, and where everything lies.

First a page that says for which settings it was written, then the journal (notes.py), then the columns (rows.py). A
server with other settings, or a build that lays columns out otherwise, begins anew. PURE: no clock, no randomness, no
I/O.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from struct import Struct
from typing import Any, Final

import numpy as np
from xxhash import xxh3_64_intdigest

from mmcache.errors import StoreError
from mmcache.store.journal import Journal
from mmcache.store.namespaces import MAX_FACTS_NBYTES
from mmcache.store.notes import Notes

LAYOUT: Final = 2  # of columns, journal and page: another one for whatever an older or newer build would misread
ROW_NBYTES: Final = 112  # of columns, at most
PAGE_NBYTES: Final = 4096
JOURNAL_NBYTES: Final = 16 + 2 * (MAX_FACTS_NBYTES + (32 << 20))  # no page of it is there before it is written to
_ALIGNMENT: Final = 64
_COLUMNS: Final = 32  # more than there are
_WRITTEN: Final = 0x6D6D6361_63686531  # where the page says that it is written
_TEXT: Final = Struct("=QQ")
_SETTINGS_AT, _PLACES_AT, _TEXT_NBYTES = 64, 1024, 960


def kept_nbytes(entries: int) -> int:
    """How much memory `Kept` needs for so many entries."""
    return PAGE_NBYTES + JOURNAL_NBYTES + ROW_NBYTES * entries + _ALIGNMENT * _COLUMNS


class Kept:
    """The memory at the start of a life, for so many entries. `settings`: what else must be the same for a server to go
    on with what another left. `why_cold`: why nothing goes on, "" where it does; `first`: nothing was ever
    there. `places` is what a life before said of where it listens; `notes` are to be kept from now on, either way, on
    threads that `lock` keeps apart. `give_up`: why to begin anew whatever lies there.

    Call `begin` once all columns are taken by `memory`, and before anything is written to them. Raises StoreError where
    there is too little memory; what lies there is nobody's any more then, as a server without it changes the values.
    """

    def __init__(
        self,
        memory: memoryview,
        entries: int,
        settings: Mapping[str, str | int],
        *,
        give_up: str = "",
        lock: AbstractContextManager[Any] = nullcontext(),  # noqa: B008
    ) -> None:
        self._page = memory[:PAGE_NBYTES]
        self._written = self._page[:8].cast("Q")
        self.first = not self._written[0]
        if len(memory) < kept_nbytes(entries):
            if not self.first:
                self._spoil()
            raise StoreError(
                f"{len(memory)} bytes are held for the index, {kept_nbytes(entries)} are needed; stop the server with "
                "its holder, and start both anew"
            )
        self._columns = memory[PAGE_NBYTES + JOURNAL_NBYTES :]
        self._taken, self._lock = 0, lock
        self._settings = {"layout": LAYOUT, "entries": entries, **settings}
        self.places: dict[str, Any] = self._read(_PLACES_AT) or {}
        self.why_cold = give_up or self._difference()
        self._journal = Journal(memory[PAGE_NBYTES : PAGE_NBYTES + JOURNAL_NBYTES])
        if not self.why_cold:
            try:
                self.notes = self._new_notes()
            except StoreError as error:
                self.why_cold = str(error)
        if self.why_cold:
            self._forget()

    def memory(self, nbytes: int) -> memoryview:
        """The next column, in the same place in each life of the same settings."""
        start = -(-self._taken // _ALIGNMENT) * _ALIGNMENT
        self._taken = start + nbytes
        if self._taken > len(self._columns):
            raise StoreError("the columns take more than ROW_NBYTES a row")
        return self._columns[start : self._taken]

    def begin(self) -> None:
        """What is written from now on counts for the next life."""
        if self.why_cold:
            if not self.first:
                np.frombuffer(self._columns[: self._taken], np.uint8)[:] = 0
            self._write(_SETTINGS_AT, self._settings)
            self._written[0] = _WRITTEN

    def forget(self, why: str) -> None:
        """Begin anew after all: no row is restored. Call it before `begin`."""
        self.why_cold, self._taken = why, 0
        self._spoil()
        self.notes.forget()

    def remember_places(self, places: Mapping[str, Any]) -> None:
        """Where this server listens, for the next one to come back to."""
        self._write(_PLACES_AT, dict(places))

    def _spoil(self) -> None:
        self._written[0] = 1  # neither written nor never touched

    def _new_notes(self) -> Notes:
        return Notes(self._journal, self._spoil, self._lock)

    def _forget(self) -> None:
        if not self.first:
            self._spoil()
        self._journal.clear()
        self.notes = self._new_notes()

    def _difference(self) -> str:
        if self.first:
            return "nothing was stored before"
        before = self._read(_SETTINGS_AT)
        if self._written[0] != _WRITTEN or before is None:
            return "what the server before left is not complete"
        changed = [
            f"{name} was {before.get(name)} and is {value}"
            for name, value in self._settings.items()
            if before.get(name) != value
        ]
        return ", ".join(changed)

    def _write(self, at: int, content: dict[str, Any]) -> None:
        text = json.dumps(content).encode()
        if len(text) > _TEXT_NBYTES - _TEXT.size:
            text = b"null"
        _TEXT.pack_into(self._page, at, len(text), xxh3_64_intdigest(text))
        self._page[at + _TEXT.size : at + _TEXT.size + len(text)] = text

    def _read(self, at: int) -> dict[str, Any] | None:
        nbytes, checksum = _TEXT.unpack_from(self._page, at)
        text = bytes(self._page[at + _TEXT.size : at + _TEXT.size + min(nbytes, _TEXT_NBYTES)])
        if not text or xxh3_64_intdigest(text) != checksum:
            return None
        found = json.loads(text)
        return found if isinstance(found, dict) else None
