"""A shard killed under load: what callers notice, what is kept of the prefixes, and what the simulator says of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.cluster.bed import Servers
from benchmarks.cluster.figures import Windows, kept, latencies, share
from benchmarks.cluster.load import Came, Load, Plan
from benchmarks.cluster.replay import Outage, Replay
from benchmarks.cluster.traffic import prompts
from mmcache.cluster.placement import Member, View
from mmcache.cluster.settings import parse_cluster_url
from mmcache.keyset import Keys

SHARDS = 4
KILL_AT = 3  # after so small a part of all requests
KEPT_BAR = 0.9  # of what is predicted
LOST_BAR = 2.0  # points of hit share, with two replicas
MODEL_BAR = 2.0  # points between what is measured and what is predicted before anything happens


@dataclass(frozen=True)
class Case:
    """`what` happens to a shard: "nothing", it "stays away", or it "comes back" with nothing, as soon as it can."""

    workload: str
    placed: str  # "runs" or "blocks"
    replicas: int
    what: str


CASES = (
    ("runs", 1, "nothing"),
    ("runs", 1, "stays away"),
    ("runs", 1, "comes back"),
    ("blocks", 1, "stays away"),
    ("blocks", 1, "comes back"),
    ("runs", 2, "stays away"),
    ("runs", 2, "comes back"),
)


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of all cases."""

    requests: int
    nbytes: int
    clients: int
    think_s: float
    memory_nbytes: int
    deadline_s: float
    seed: int


def busiest(view: View, asked: Sequence[Keys]) -> str:
    """The shard that owns most of what is asked for."""
    owned = Counter(view.owners(home)[0] for keys in asked for home in keys.homes)
    return view.members[owned.most_common(1)[0][0]].id


def run_case(case: Case, size: Size, watch: Callable[[int], None]) -> dict[str, Any]:
    """Start four shards, serve the requests, kill one at the middle; what was measured, and predicted."""
    asked = prompts(case.workload, size.seed, SHARDS, size.requests, by_block=case.placed == "blocks")
    at = size.requests // KILL_AT
    with Servers(size.memory_nbytes) as servers:
        for number in range(SHARDS):
            servers.start(f"shard-{number}")
        view = View(tuple(Member(*one) for one in servers.members))
        victim = busiest(view, asked)
        places = ",".join(address.partition("://")[2] for _, address in servers.members)
        url = f"mmcache://{places}?replicas={case.replicas}&deadline_s={size.deadline_s}"
        is_killed, comes_back = case.what != "nothing", case.what == "comes back"
        plan = Plan(
            url,
            case.workload,
            size.seed,
            SHARDS,
            size.requests,
            size.nbytes,
            size.think_s,
            case.placed == "blocks",
            servers.members,
        )
        load = Load(plan, size.clients, (at, servers.pid(victim)) if is_killed else None)
        back = []

        def look(number: int) -> None:
            watch(number)
            if comes_back and not back and load.shared.killed_s.value:
                back.append(servers.start_beside(victim))

        came = load.run(look)
        for thread in back:
            thread.join()
        outage = Outage(victim, came.killed_s, servers.ready_s[victim]) if comes_back else Outage(victim, came.killed_s)
        evicted = sum(servers.counters(name).get("evictions", 0) for name in servers.names)
    row = compare(case, size, asked, came, view, outage if is_killed else None, url)
    return row | {"evictions": evicted, "victim": victim}


def compare(
    case: Case, size: Size, asked: Sequence[Keys], came: Came, view: View, outage: Outage | None, url: str
) -> dict[str, Any]:
    """What was measured beside what the simulator says of the same requests."""
    served, windows = came.served, Windows(size.requests // KILL_AT, size.requests)

    def predict(prompts: Sequence[Keys], outage: Outage | None) -> list[int]:
        views = {len(view.members): view}
        return Replay(prompts, served, views, parse_cluster_url(url), size.nbytes, outage).run().found

    blocks = [one.blocks for one in served]
    found = [one.found for one in served]
    without, predicted = predict(asked, None), predict(asked, outage)
    blocks_alone = prompts(case.workload, size.seed, SHARDS, size.requests, by_block=True)
    each: dict[str, dict[str, float]] = {}
    if outage is not None and (case.placed, case.replicas, case.what) == ("runs", 1, "stays away"):
        for placed, keys in (("runs", asked), ("blocks", blocks_alone)):
            each[placed] = {
                member.id: round(kept(predict(keys, replace(outage, shard=member.id)), without, windows.since), 4)
                for member in view.members
            }
    by_block = predict(blocks_alone, outage)
    measured = kept(found, without, windows.since)
    expected = kept(predicted, without, windows.since)
    return {
        **asdict(case),
        "requests": len(served),
        "blocks": sum(blocks),
        "share": {name: round(share(found, blocks, window), 4) for name, window in windows.named().items()},
        "predicted": {name: round(share(predicted, blocks, window), 4) for name, window in windows.named().items()},
        "without": {name: round(share(without, blocks, window), 4) for name, window in windows.named().items()},
        "kept": round(measured, 4),
        "kept_predicted": round(expected, 4),
        "kept_by_block_predicted": round(kept(by_block, without, windows.since), 4),
        "kept_each": each,
        "points_lost": round(100 * (share(without, blocks, windows.since) - share(found, blocks, windows.since)), 2),
        "wrong": sum(one.wrong for one in served),
        "errors": sum(bool(one.error) for one in served),
        "error": next((one.error for one in served if one.error), ""),
        "compared": sum(one.found for one in served),
        "latency": latencies(served),
        "latency_since": latencies(served[windows.at :]),
        "deadline_s": size.deadline_s,
        "back_s": round(outage.back_s - outage.killed_s, 2) if outage and outage.back_s < float("inf") else None,
        "counters": dict(came.counters),
        "seconds": round(max(one.times[4] for one in served) - served[0].times[0], 2),
    }


def missed(row: dict[str, Any]) -> list[str]:
    """The bars that a case misses, in words."""
    name = f"{row['workload']}, {row['placed']}, R={row['replicas']}, {row['what']}"
    bad = [f"{name}: {what} is {row[what]}, not 0" for what in ("wrong", "errors", "evictions") if row[what]]
    for call, taken in row["latency_since"].items():
        if taken["p99_s"] > row["deadline_s"]:
            bad.append(f"{name}: p99 of {call} is {taken['p99_s']} s, the deadline {row['deadline_s']} s")
    if row["kept"] < KEPT_BAR * row["kept_predicted"]:
        bad.append(
            f"{name}: {row['kept']:.1%} is kept, {row['kept_predicted']:.1%} predicted; the bar {KEPT_BAR} of it"
        )
    if row["replicas"] > 1 and row["points_lost"] > LOST_BAR:
        bad.append(f"{name}: {row['points_lost']} points of hit share are lost, the bar {LOST_BAR}")
    off = 100 * abs(row["share"]["before"] - row["predicted"]["before"])
    if off > MODEL_BAR:
        bad.append(f"{name}: before the kill the prediction is {off:.1f} points off, the bar {MODEL_BAR}")
    return bad
