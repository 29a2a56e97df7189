"""What a cluster's shards answer, put together to one answer: statistics, and what operators ask.

What walks over all entries of a server, step by step (remove, list, audit), operations.py asks of each shard.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar, cast

from google.protobuf.message import Message

from mmcache.errors import ProtocolError, TransportError, UsageError
from mmcache.pb import cache_pb2 as pb
from mmcache.transport.base import Op
from mmcache.why import Why

M = TypeVar("M", bound=Message)
MOST_RECENT: Final = 1000


def answered(answers: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are no errors. Raises TransportError if that is none of them."""
    good = {name: answer for name, answer in answers.items() if not isinstance(answer, Exception)}
    if not good:
        told = "; ".join(f"{name}: {error}" for name, error in sorted(answers.items()))
        raise TransportError(f"none of {len(answers)} shards answers ({told})")
    return good


def stat_of(answers: Mapping[str, Any]) -> dict[str, Any]:
    """One `Client.stat` for all: counters added up (of the longest the longest), the youngest's uptime; `shards` has
    each one's, or its error."""
    good = answered(answers)
    counters: Counter[str] = Counter()
    for stat in good.values():
        longest = {name: max(counters[name], count) for name, count in stat["counters"].items() if "longest" in name}
        counters.update(stat["counters"])
        counters.update({name: count - counters[name] for name, count in longest.items()})
    return {
        "server": ", ".join(sorted({stat["server"] for stat in good.values()})),
        "server_id": "",
        "uptime_s": min(stat["uptime_s"] for stat in good.values()),
        "transport": ", ".join(sorted({stat["transport"] for stat in good.values()})),
        "transport_why": "",
        "counters": dict(sorted(counters.items())),
        "shards": {name: str(one) if isinstance(one, Exception) else one for name, one in sorted(answers.items())},
    }


def merged(op: Op, request: Message, replies: Sequence[M]) -> M:
    """One reply for those of all shards. Raises UsageError for what is asked of one shard at a time."""
    if op is Op.EXPLAIN:
        return cast("M", _explained(cast("Sequence[pb.ExplainReply]", replies)))
    if op is Op.RECENT:
        misses = sorted((miss for reply in replies for miss in reply.misses), key=lambda miss: miss.ago_s)  # type: ignore[attr-defined]
        limit = min(request.limit or MOST_RECENT, MOST_RECENT)  # type: ignore[attr-defined]
        return cast("M", pb.RecentReply(misses=misses[:limit]))
    if op is Op.MODE:
        return max(replies, key=lambda reply: bin(reply.mode).count("1"))  # type: ignore[attr-defined]
    raise UsageError(f"{op.name} goes to one server at a time: ask each of `servers()`")


def _explained(replies: Sequence[pb.ExplainReply]) -> pb.ExplainReply:
    """For each key what the shard says that knows most of it: that it is there, or else what became of it last."""
    counts = {len(reply.why) for reply in replies}
    if len(counts) != 1 or any(
        not len(reply.why) == len(reply.ago_s) == len(reply.put_status) == len(reply.children) for reply in replies
    ):
        raise ProtocolError("the shards explained different numbers of keys")
    best = []
    for row in range(counts.pop()):
        answers = [(reply.why[row], reply.ago_s[row], reply.put_status[row], reply.children[row]) for reply in replies]
        best.append(min(answers, key=_rank))
    why, ago_s, put_status, children = zip(*best, strict=True) if best else ((), (), (), ())
    return pb.ExplainReply(why=bytes(why), ago_s=ago_s, put_status=bytes(put_status), children=children)


def _rank(answer: tuple[int, float, int, int]) -> tuple[int, float]:
    why, ago_s = answer[:2]
    return (0 if why == Why.HERE else 2 if why == Why.NEVER_STORED else 1), ago_s if ago_s >= 0 else float("inf")
