"""What a cluster's shards answer, put together to one answer: statistics, and what operators ask.

Who asks them: cluster_core.py, and operations.py by servers.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mmcache.errors import ProtocolError, TransportError
from mmcache.pb import cache_pb2 as pb
from mmcache.why import Why


def answered(answers: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are no errors. Raises TransportError if that is none of them."""
    good = {name: answer for name, answer in answers.items() if not isinstance(answer, Exception)}
    if not answers:
        raise TransportError("no shard is known: nobody is in the cluster yet")
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


def recent_of(replies: Sequence[pb.RecentReply], limit: int) -> list[pb.Miss]:
    """The last misses of all, newest first."""
    return sorted((miss for reply in replies for miss in reply.misses), key=lambda miss: miss.ago_s)[: limit or None]


def mode_of(replies: Sequence[pb.ModeReply]) -> pb.ModeReply:
    """What is stopped where the most is."""
    return max(replies, key=lambda reply: bin(reply.mode).count("1"))


def explained(replies: Sequence[pb.ExplainReply]) -> pb.ExplainReply:
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
