"""Why a prompt's blocks were not there: a recorded request, what a server says of its keys, and what differs.

A recorded request is what keys are made from, as JSON: the namespace's kind and facts, and the tokens with their
placeholder spans. Its keys can be made again, and again under other namespaces, so what a hash cannot tell is found
by trying. PURE but for the server asked.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Final

from mmcache.chain import PlaceholderSpan
from mmcache.client.operations import Operations, Reason
from mmcache.errors import KeyInputError, UsageError
from mmcache.keys import Namespace
from mmcache.keyset import Keys
from mmcache.why import Why

MAX_TRIED: Final = 256  # namespaces
HERE: Final = Reason(Why.HERE)
NEAR_FACTS: Final = 4  # namespaces that differ in more are not what was meant
MAX_TOKENS: Final = 1 << 24


@dataclass(frozen=True)
class Item:
    """A placeholder span, and what is known of its item: content digest, grid, processor settings and the like."""

    span: PlaceholderSpan
    about: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Recorded:
    """One request: its namespace, tokens and media items."""

    namespace: Namespace
    token_ids: Sequence[int]
    items: Sequence[Item] = ()

    def keys(self, namespace: Namespace | None = None) -> Keys:
        """The keys of its blocks, also as they would be under another namespace."""
        return (namespace or self.namespace).block_keys(self.token_ids, [item.span for item in self.items])

    def to_json(self) -> str:
        """One line that `parse` reads."""
        items = [
            {"offset": one.span.offset, "length": one.span.length, "item": one.span.item.hex(), **one.about}
            for one in self.items
        ]
        namespace = {"kind": self.namespace.kind, "facts": dict(self.namespace.facts)}
        return json.dumps({"namespace": namespace, "token_ids": [int(one) for one in self.token_ids], "spans": items})


def parse(text: str) -> Recorded:
    """A recorded request from its JSON. Raises UsageError that names the field."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the recorded request is not JSON: {error}") from None
    record = _object(record, "the recorded request")
    described = _object(record.get("namespace"), "namespace")
    facts = dict(_object(described.get("facts"), "namespace.facts"))
    block_size = facts.pop("block_size", None)
    tokens = record.get("token_ids")
    if not isinstance(tokens, list) or len(tokens) > MAX_TOKENS:
        raise UsageError(f"token_ids: expected a list of at most {MAX_TOKENS} token ids")
    spans = record.get("spans", [])
    if not isinstance(spans, list):
        raise UsageError("spans: expected a list of objects with offset, length and item")
    try:
        size = None if block_size is None else int(block_size)
        namespace = Namespace(kind=str(described.get("kind")), block_size=size, **facts)
        return Recorded(namespace, tokens, [_item(number, one) for number, one in enumerate(spans)])
    except (KeyInputError, TypeError, ValueError) as error:
        raise UsageError(f"the recorded request: {error}") from None


def _object(value: object, path: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise UsageError(f"{path}: expected an object, found {type(value).__name__}")
    return value


def _item(number: int, value: object) -> Item:
    about = dict(_object(value, f"spans[{number}]"))
    try:
        offset, length, item = about.pop("offset"), about.pop("length"), bytes.fromhex(about.pop("item"))
        return Item(PlaceholderSpan(offset, length, item), about)
    except (KeyError, KeyInputError, TypeError, ValueError) as error:
        raise UsageError(f"spans[{number}]: {error}; expected offset, length and item, 64 hex digits") from None


@dataclass(frozen=True)
class Explanation:
    """What was found out. `first_missing`: the first block that is not there, None: all are."""

    blocks: int
    first_missing: int | None = None
    reason: Reason = HERE
    findings: Sequence[str] = ()


def explain(operations: Operations, request: Recorded, against: Recorded | None = None) -> Explanation:
    """Ask a server about a request's blocks; `against`: another request, expected to share them."""
    keys = request.keys()
    reasons = operations.explain(keys.digests)
    first = next((place for place, reason in enumerate(reasons) if reason.why is not Why.HERE), None)
    findings = [] if against is None else list(differences(request, against))
    if first is None:
        return Explanation(len(keys), findings=findings)
    reason = reasons[first]
    if reason.why is Why.NEVER_STORED:
        findings += _other_namespaces(operations, request, first)
        findings += _branch(request, first, reasons)
    return Explanation(len(keys), first, reason, findings)


def _other_namespaces(operations: Operations, request: Recorded, first: int) -> Iterator[str]:
    """Namespaces under which more of the same content is stored, and the facts in which they differ."""
    mine = request.namespace
    near = []
    for row in operations.namespaces():
        if row.kind == mine.kind and row.namespace != mine.id and row.entries:
            fields = differing_facts(mine.facts, row.facts)
            if len(fields) <= NEAR_FACTS:
                near.append((len(fields), fields, dict(row.facts)))
    for _, fields, facts in sorted(near, key=lambda one: one[0])[:MAX_TRIED]:
        try:
            size = int(facts.pop("block_size", 0)) or None
            keys = request.keys(Namespace(kind=mine.kind, block_size=size, **facts))
        except (KeyInputError, TypeError, ValueError):  # declared by a client that is not ours: no facts of a Namespace
            continue
        stored = [reason.why for reason in operations.explain(keys.digests)]
        leading = next((place for place, why in enumerate(stored) if why is not Why.HERE), len(stored))
        if leading * (size or 1) > first * (mine.block_size or 1):
            words = "; ".join(f"{name} is {here} here and {there} there" for name, here, there in fields)
            yield f"namespace differs: {words}. Under that one {leading} of {len(keys)} blocks are stored"


def differing_facts(mine: Mapping[str, str], other: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """(name, text here, text there) of each fact in which two namespaces differ."""
    return [
        (name, repr(mine[name]) if name in mine else "not set", repr(other[name]) if name in other else "not set")
        for name in sorted(mine.keys() | other.keys())
        if mine.get(name) != other.get(name)
    ]


def _branch(request: Recorded, first: int, reasons: Sequence[Reason]) -> Iterator[str]:
    """Where the stored prompts leave this one: the first block that is not there, after one that is."""
    size = request.namespace.block_size or 1
    if not first or not reasons[first - 1].children:
        return
    held = [place for place, item in enumerate(request.items) if _touches(item.span, first, size)]
    where = f"tokens {first * size} to {(first + 1) * size - 1}"
    where += f", part of item {held[0]}" if held else ", text only"
    count = reasons[first - 1].children
    yield (
        f"first differing block: {first} ({where}). The block before it is stored and goes on in {count} other "
        f"way{'s' if count > 1 else ''}: a token or an item differs there"
    )


def _touches(span: PlaceholderSpan, block: int, size: int) -> bool:
    return span.offset < (block + 1) * size and span.end > block * size


def differences(request: Recorded, other: Recorded) -> Iterator[str]:
    """What keeps two requests from sharing their blocks, the first of each kind."""
    fields = differing_facts(request.namespace.facts, other.namespace.facts)
    for name, here, there in fields:
        yield f"namespace differs: {name} is {here} here and {there} there"
    size = request.namespace.block_size or 1
    pairs = enumerate(zip_longest(request.token_ids, other.token_ids))
    token = next(((at, here, there) for at, (here, there) in pairs if here != there), None)
    item = next(_differing_items(request.items, other.items), None)
    if token is not None and (item is None or token[0] <= item[0]):
        at, mine, theirs = token
        words = "the other ends there" if theirs is None else f"{mine} here and {theirs} there"
        words = "this one ends there" if mine is None else words
        yield f"first differing block: {at // size}, at token {at}: {words}"
    elif item is not None:
        yield f"first differing block: {item[0] // size}, at token {item[0]}: {item[1]}"


def _differing_items(mine: Sequence[Item], others: Sequence[Item]) -> Iterator[tuple[int, str]]:
    for place, (one, other) in enumerate(zip(mine, others, strict=False)):
        if (one.span.offset, one.span.length) != (other.span.offset, other.span.length):
            at = min(one.span.offset, other.span.offset)
            yield at, f"item {place} lies elsewhere: offset and length differ"
        elif one.span.item != other.span.item:
            names = sorted(one.about.keys() | other.about.keys())
            fields = [
                f"{name} is {one.about.get(name)!r} here and {other.about.get(name)!r} there"
                for name in names
                if one.about.get(name) != other.about.get(name)
            ]
            yield (
                one.span.offset,
                f"item {place} differs: " + ("; ".join(fields) or "its digest, nothing else is known"),
            )


def record(namespace: Namespace, token_ids: Iterable[int], items: Iterable[Item] = ()) -> Recorded:
    """What to keep of a request, to explain later why its blocks were, or were not, there."""
    return Recorded(namespace, list(token_ids), list(items))
