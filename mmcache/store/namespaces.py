"""What is known of namespaces: a number for each that a tenant uses, its declared facts, and what operators allow it.

Entries carry the number. PURE: no clock, no randomness, no I/O.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntFlag
from itertools import islice

from mmcache.store.usage import UNKNOWN

MAX_NAMESPACES = 65536
MAX_FACTS_NBYTES = 64 << 20  # of all declarations
MAX_RULES = 256
MAX_NUMBER = (1 << 32) - 1  # what a row's column holds
MAX_LOOKS = 1024  # at namespaces for one that is idle


class Stopped(IntFlag):
    """What operators have stopped. The numbers are those of the schema's Mode: BOTH, READ, WRITE, OFF."""

    NOTHING = 0
    WRITES = 1
    READS = 2
    BOTH = 3


@dataclass(frozen=True, slots=True)
class Selection:
    """Which entries: all that agree with every field given.

    `namespace`: the first bytes of its id. `facts`: of the namespace; a value also selects what ends in "/" + value,
    so that `model=Qwen2.5-VL-7B` finds `Qwen/Qwen2.5-VL-7B`. `tenant`: its number. `older_than_s`: seconds since
    it was stored.
    """

    namespace: bytes = b""
    kind: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    tenant: int | None = None
    older_than_s: float = 0.0

    def selects(self, known: Known) -> bool:
        """Whether a namespace agrees, its entries' ages apart. One that was never declared has no kind and no facts."""
        return (
            known.namespace.startswith(self.namespace)
            and self.tenant in (None, known.tenant)
            and self.kind in ("", known.kind)
            and all(_agrees(known.facts.get(name), value) for name, value in self.facts.items())
        )


def _agrees(fact: str | None, value: str) -> bool:
    return fact is not None and (fact == value or fact.endswith(f"/{value}"))


@dataclass(frozen=True, slots=True)
class Known:
    """One namespace of one tenant. Kind and facts are empty until a client declares them."""

    tenant: int
    namespace: bytes
    kind: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    facts_nbytes: int = 0


class Namespaces:
    """Numbers for namespaces, from 1 on; 0 stands for those nobody named, or too many to number.

    Where room is short, the tenant that has the most gives its oldest: nobody pushes out what another one declared.
    `changed` hears of each number whose namespace, or whose facts, are new or forgotten (None), before it is used.
    """

    def __init__(self, changed: Callable[[int, Known | None], None] = lambda _number, _known: None) -> None:
        self._changed = changed
        self._known: dict[int, Known] = {}
        self._numbers: dict[tuple[int, bytes], int] = {}
        self._numbers_of: dict[int, OrderedDict[int, None]] = {}  # by tenant
        self._facts_nbytes: Counter[int] = Counter()  # by tenant
        self._next = 1
        self._rules: list[tuple[Selection, Stopped]] = []
        self.forgotten = 0
        self.unreadable: set[int] = set()
        self.unwritable: set[int] = set()

    def number(self, tenant: int, namespace: bytes, in_use: Mapping[int, int]) -> int:
        """The number of a namespace, a new one for a new one. When there are too many, one that is not `in_use` is
        forgotten, and, where none is found, the answer is UNKNOWN."""
        number = self._numbers.get((tenant, namespace))
        if number is not None:
            return number
        if self._next > MAX_NUMBER:
            return UNKNOWN
        if len(self._known) >= MAX_NAMESPACES:
            most = max(self._numbers_of, key=lambda one: len(self._numbers_of[one]))
            if not (self._forget_idle(most, in_use) or self._forget_idle(tenant, in_use)):
                return UNKNOWN
        number, self._next = self._next, self._next + 1
        self._add(number, Known(tenant, namespace))
        self._changed(number, self._known[number])
        return number

    def _add(self, number: int, known: Known) -> None:
        self._known[number] = known
        self._numbers[known.tenant, known.namespace] = number
        self._numbers_of.setdefault(known.tenant, OrderedDict())[number] = None
        self._facts_nbytes[known.tenant] += known.facts_nbytes
        self._apply(number, self._rules)

    def restore(self, known: Mapping[int, Known], rules: Sequence[tuple[Selection, Stopped]]) -> None:
        """Before any other call: what `changed` heard of in another life, and the rules of then."""
        for selection, stopped in rules:
            self.stop(selection, stopped)
        for number, one in known.items():
            self._add(number, one)
            self._next = max(self._next, number + 1)

    def _forget_idle(self, tenant: int, in_use: Mapping[int, int]) -> bool:
        """Whether one of this tenant's was idle. Those that are not are looked at again after all others."""
        numbers = self._numbers_of.get(tenant, OrderedDict())
        for number in list(islice(numbers, MAX_LOOKS)):
            if number not in in_use:
                self._forget(number)
                return True
            numbers.move_to_end(number)
        return False

    def _forget(self, number: int) -> None:
        self._forget_facts(number)
        known = self._known.pop(number)
        self._changed(number, None)
        del self._numbers[known.tenant, known.namespace]
        del self._numbers_of[known.tenant][number]
        if not self._numbers_of[known.tenant]:
            del self._numbers_of[known.tenant]
        self.unreadable.discard(number)
        self.unwritable.discard(number)

    def _forget_facts(self, number: int) -> None:
        known = self._known[number]
        if known.facts_nbytes:
            self._facts_nbytes[known.tenant] -= known.facts_nbytes
            self._known[number] = Known(known.tenant, known.namespace)
            self._changed(number, self._known[number])
            self.forgotten += 1

    def declare(self, number: int, kind: str, facts: Mapping[str, str]) -> None:
        """The facts of a numbered namespace. When all take too many bytes, the tenant that has the most forgets."""
        known = self._known.get(number)
        if known is None or known.kind:
            return
        nbytes = sum(len(name.encode()) + len(text.encode()) for name, text in facts.items()) + len(kind)
        self._known[number] = replace(known, kind=kind, facts=dict(facts), facts_nbytes=nbytes)
        self._changed(number, self._known[number])
        self._facts_nbytes[known.tenant] += nbytes
        excess_nbytes = self._facts_nbytes.total() - MAX_FACTS_NBYTES
        while excess_nbytes > 0:
            ((most, before_nbytes),) = self._facts_nbytes.most_common(1)
            for other in self._numbers_of[most]:
                if before_nbytes - self._facts_nbytes[most] >= excess_nbytes:
                    break
                if other != number:
                    self._forget_facts(other)
            freed_nbytes = before_nbytes - self._facts_nbytes[most]
            if not freed_nbytes:
                break
            excess_nbytes -= freed_nbytes
        self._apply(number, self._rules)

    def find(self, tenant: int, namespace: bytes) -> Known | None:
        """What is known of a namespace of this tenant."""
        return self._known.get(self._numbers.get((tenant, namespace), UNKNOWN))

    def known(self, number: int) -> Known | None:
        """What is known of a numbered namespace."""
        return self._known.get(number)

    def selected(self, selection: Selection) -> Iterator[int]:
        """The numbers of the namespaces that a selection selects. UNKNOWN is selected when nothing is asked of it."""
        if not (selection.namespace or selection.kind or selection.facts or selection.tenant is not None):
            yield UNKNOWN
        whose = self._known if selection.tenant is None else self._numbers_of.get(selection.tenant, ())
        yield from (number for number in whose if selection.selects(self._known[number]))

    # What operators allow

    def stop(self, selection: Selection, stopped: Stopped) -> bool:
        """From now on for every namespace selected, also those to come; a selection given before is replaced.
        False, and nothing changes, when there are `MAX_RULES` already."""
        rules = [rule for rule in self._rules if rule[0] != selection]
        if stopped:
            if len(rules) >= MAX_RULES:
                return False
            rules.append((selection, stopped))
        added = rules[-1:]
        if len(rules) <= len(self._rules):  # one is replaced or gone
            self.unreadable.clear()
            self.unwritable.clear()
            added = rules
        self._rules = rules
        if added:
            for number in self._known:
                self._apply(number, added)
        return True

    def rules(self) -> list[tuple[Selection, Stopped]]:
        """Those in force, oldest first."""
        return list(self._rules)

    def stopped(self, number: int) -> Stopped:
        """What is stopped for a namespace: the sum of the rules that select it."""
        reads = Stopped.READS if number in self.unreadable else Stopped.NOTHING
        return reads | (Stopped.WRITES if number in self.unwritable else Stopped.NOTHING)

    def _apply(self, number: int, rules: Sequence[tuple[Selection, Stopped]]) -> None:
        known = self._known[number]
        for selection, stopped in rules:
            if selection.selects(known):
                if stopped & Stopped.READS:
                    self.unreadable.add(number)
                if stopped & Stopped.WRITES:
                    self.unwritable.add(number)
