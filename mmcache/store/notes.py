"""What must outlive a restart beside the rows: whose numbers the rows hold, and what operators have stopped.

A row says only numbers: of its tenant and its namespace. Were a number given to somebody else after a restart, one
tenant would read another's values; so a number is noted before anything can be stored under it. PURE.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import chain, islice
from typing import Any, Final

from mmcache.errors import StoreError
from mmcache.store.journal import Journal
from mmcache.store.namespaces import Known, Selection, Stopped

BEGIN_AT: Final = 0.5
MOVED: Final = 8  # with each note
Rule = tuple[Selection, Stopped]


class Notes:
    """What the journal says, kept in step with it. `spoil` is called when something finds no room there: the journal
    must not be read again then. Thread-safe with such a `lock`. Raises StoreError for a journal that makes no sense."""

    def __init__(self, journal: Journal, spoil: Callable[[], None], lock: AbstractContextManager[Any]) -> None:
        self._journal, self._spoil, self._lock = journal, spoil, lock
        self._moving: Iterator[int] | None = None  # numbers whose notes are not in the journal's other half yet
        self._begin_at = BEGIN_AT
        self._is_spoilt = False  # nothing is noted any more
        self.tenants: list[str] = []
        self.known: dict[int, Known] = {}
        self.rules: list[Rule] = []
        self.stopped: Stopped | None = None  # for everybody; None: nobody has said so yet
        try:
            for record in journal:
                self._read(json.loads(record))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise StoreError(f"the journal makes no sense: {error!r}") from None

    def tenant(self, number: int, name: str) -> None:
        """The next number is this tenant's."""
        with self._lock:
            assert number == len(self.tenants), f"tenant {number} is noted after {len(self.tenants)}"
            self.tenants.append(name)
            self._note({"tenant": name})

    def namespace(self, number: int, known: Known | None) -> None:
        """What is known of this number now; None: it is forgotten."""
        with self._lock:
            if known is None:
                self.known.pop(number, None)
            else:
                self.known[number] = known
            self._note(_namespace(number, known))

    def stop(self, stopped: Stopped, rules: Sequence[Rule]) -> None:
        """What is stopped now, for everybody and by rules."""
        with self._lock:
            self.stopped, self.rules = stopped, list(rules)
            self._note(_stop(stopped, self.rules))

    def forget(self) -> None:
        """All but the tenants, who have their numbers for as long as this process lives."""
        with self._lock:
            self.known.clear()
            self.rules.clear()
            self.stopped = None
            self._rewrite()

    def _note(self, record: dict[str, Any]) -> None:
        packed = _pack(record)
        if not self._is_spoilt:
            if self._journal.append(packed):
                self._move_on(packed)
            else:
                self._rewrite()

    def _move_on(self, packed: bytes) -> None:
        """Once the journal is half full, bring what still holds to its other half, a little with each note: of many
        namespaces all at once would take a second, and calls would wait for it. What is new goes to both halves."""
        journal = self._journal
        if self._moving is None:
            if journal.share < self._begin_at:
                return
            journal.begin_other()
            self._moving = iter(list(self.known))
            records = [_pack(record) for record in self._others()]
        else:
            records = [packed]
        numbers = list(islice(self._moving, MOVED))
        records += [_pack(_namespace(number, self.known[number])) for number in numbers if number in self.known]
        if not all(map(journal.append_other, records)):
            self._moving, self._begin_at = None, math.inf
        elif len(numbers) < MOVED:
            journal.turn()
            self._moving = None

    def _rewrite(self) -> None:
        self._moving, self._begin_at = None, BEGIN_AT
        namespaces = (_namespace(number, known) for number, known in self.known.items())
        if not self._journal.rewrite(map(_pack, chain(self._others(), namespaces))):
            self._is_spoilt = True
            self._spoil()

    def _others(self) -> Iterator[dict[str, Any]]:
        yield from ({"tenant": name} for name in self.tenants)
        if self.stopped is not None:
            yield _stop(self.stopped, self.rules)

    def _read(self, record: dict[str, Any]) -> None:
        if "tenant" in record:
            self.tenants.append(record["tenant"])
        elif "stopped" in record:
            self.stopped = Stopped(record["stopped"])
            self.rules = [(_selection(selection), Stopped(stopped)) for selection, stopped in record["rules"]]
        elif "of" not in record:
            self.known.pop(record["number"], None)
        else:
            kind, facts = record["kind"], record["facts"]
            self.known[record["number"]] = Known(
                record["of"], bytes.fromhex(record["id"]), kind, facts, record["facts_nbytes"]
            )


def _pack(record: dict[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()


def _namespace(number: int, known: Known | None) -> dict[str, Any]:
    if known is None:
        return {"number": number}
    return {
        "number": number,
        "of": known.tenant,
        "id": known.namespace.hex(),
        "kind": known.kind,
        "facts": dict(known.facts),
        "facts_nbytes": known.facts_nbytes,
    }


def _stop(stopped: Stopped, rules: Sequence[Rule]) -> dict[str, Any]:
    return {"stopped": int(stopped), "rules": [[_fields(selection), int(what)] for selection, what in rules]}


def _fields(selection: Selection) -> dict[str, Any]:
    return {
        "namespace": selection.namespace.hex(),
        "kind": selection.kind,
        "facts": dict(selection.facts),
        "tenant": selection.tenant,
        "older_than_s": selection.older_than_s,
    }


def _selection(fields: dict[str, Any]) -> Selection:
    return Selection(**(fields | {"namespace": bytes.fromhex(fields["namespace"])}))
