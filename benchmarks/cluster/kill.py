"""A shard killed under load: what callers notice, what is kept of the prefixes, and what the simulator says of it."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.cluster.bed import Servers, redis_server
from benchmarks.cluster.figures import Windows, kept, latencies, mean, share
from benchmarks.cluster.load import Came, Load, Plan
from benchmarks.cluster.replay import Outage, Replay
from benchmarks.cluster.traffic import blocks_alone, prompts
from mmcache.cluster.placement import Member, View
from mmcache.cluster.settings import parse_cluster_url
from mmcache.cluster.urls import open_membership
from mmcache.keyset import Keys
from mmcache.testing.values import eventually

SHARDS = 4
KILL_AT = 3  # after so small a part of all requests
KEPT_BAR = 0.9  # of what is predicted
LOST_BAR = 2.0  # points of hit share, with two replicas
MODEL_BAR = 2.0  # points between what is measured and what is predicted before anything happens
DRAWS = 5  # when a client asks a shard again that did not answer is chance: so many predictions are averaged
GIVES_UP = 3  # times the pause between requests, where it takes until the load's last third that a shard is given up


@dataclass(frozen=True)
class Case:
    """`what` becomes of a shard: "nothing"; it "stays away", of a static list; it "comes back" with nothing, as soon as
    it can; or it stays away and "is given up", as its heartbeat in Redis ends."""

    workload: str
    placed: str  # "runs" or "blocks"
    replicas: int
    what: str

    def __str__(self) -> str:
        return f"{self.workload}, {self.placed}, R={self.replicas}, {self.what}"


CASES = (
    ("runs", 1, "nothing"),
    ("runs", 1, "stays away"),
    ("runs", 1, "comes back"),
    ("runs", 1, "is given up"),
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
    """Start four shards, serve the requests, kill one after a third of them; what was measured, and predicted. Raises
    ConfigError without redis-server or the extra `cluster`, where a shard is to be given up."""
    asked = prompts(case.workload, size.seed, SHARDS, size.requests, by_block=case.placed == "blocks")
    with contextlib.ExitStack() as stack:
        servers, plan, view = _cluster(case, size, stack)
        victim = busiest(view, asked)
        is_killed, back = case.what != "nothing", list[threading.Thread]()
        load = Load(plan, size.clients, (size.requests // KILL_AT, servers.pid(victim)) if is_killed else None)

        def look(number: int) -> None:
            watch(number)
            if case.what == "comes back" and not back and load.shared.killed_s.value:
                back.append(servers.start_beside(victim))

        came = load.run(look)
        for thread in back:
            thread.join()
        outage = Outage(victim, came.killed_s) if is_killed else None
        if outage and back:
            outage = replace(outage, back_s=servers.ready_s[victim])
        evicted = sum(servers.counters(name).get("evictions", 0) for name in servers.names)
    return compare(case, size, asked, came, view, outage, plan.url) | {"evictions": evicted, "victim": victim}


def _cluster(case: Case, size: Size, stack: contextlib.ExitStack) -> tuple[Servers, Plan, View]:
    options = f"replicas={case.replicas}&deadline_s={size.deadline_s}"
    plan = Plan(
        url="",
        workload=case.workload,
        seed=size.seed,
        shards=SHARDS,
        requests=size.requests,
        nbytes=size.nbytes,
        think_s=size.think_s * (GIVES_UP if case.what == "is given up" else 1),
        by_block=case.placed == "blocks",
    )
    if case.what == "is given up":
        members = f"mmcache+redis://{stack.enter_context(redis_server())}/0?cluster=bench"
        servers = stack.enter_context(Servers(size.memory_nbytes, "--join", members))
        for _ in range(SHARDS):
            servers.start()
        with contextlib.closing(open_membership(members)) as membership:
            eventually(lambda: len(membership.view().members) == SHARDS, "all shards have joined")
            return servers, replace(plan, url=f"{members}&{options}"), membership.view()
    servers = stack.enter_context(Servers(size.memory_nbytes))
    for number in range(SHARDS):
        servers.start(f"shard-{number}")
    places = ",".join(address.partition("://")[2] for _, address in servers.members)
    view = View(tuple(Member(*one) for one in servers.members))
    return servers, replace(plan, url=f"mmcache://{places}?{options}", members=servers.members), view


def compare(
    case: Case, size: Size, asked: Sequence[Keys], came: Came, view: View, outage: Outage | None, url: str
) -> dict[str, Any]:
    """What was measured beside what the simulator says of the same requests."""
    served, windows = came.served, Windows(size.requests // KILL_AT, size.requests)
    gone = outage.shard if outage else ""
    views = {one: View(tuple(m for m in view.members if one == SHARDS or m.id != gone)) for one in (SHARDS, SHARDS - 1)}
    config = parse_cluster_url(url)
    still = [one._replace(view=SHARDS) for one in served]

    def predict(prompts: Sequence[Keys], outage: Outage | None) -> list[float]:
        draws = DRAWS if outage and outage.back_s < float("inf") else 1
        rows = served if outage and outage.shard == gone else still
        return mean(
            Replay(prompts, rows, views, config, size.nbytes, outage, seed).run().found for seed in range(draws)
        )

    blocks, found = [one.blocks for one in served], [one.found for one in served]
    without, predicted = predict(asked, None), predict(asked, outage)
    alone = list(map(blocks_alone, asked))
    each: dict[str, dict[str, float]] = {}
    if outage and (case.placed, case.replicas, case.what) == ("runs", 1, "stays away"):
        for placed, keys in (("runs", asked), ("blocks", alone)):
            outages = [replace(outage, shard=member.id) for member in view.members]
            each[placed] = {one.shard: round(kept(predict(keys, one), without, windows.since), 4) for one in outages}
    return {
        **asdict(case),
        "name": str(case),
        "requests": len(served),
        "blocks": sum(blocks),
        "share": {name: round(share(found, blocks, window), 4) for name, window in windows.named().items()},
        "predicted": {name: round(share(predicted, blocks, window), 4) for name, window in windows.named().items()},
        "without": {name: round(share(without, blocks, window), 4) for name, window in windows.named().items()},
        "kept": round(kept(found, without, windows.since), 4),
        "kept_predicted": round(kept(predicted, without, windows.since), 4),
        "kept_by_block_predicted": round(kept(predict(alone, outage), without, windows.since), 4),
        "kept_each": each,
        "points_lost": round(100 * (share(without, blocks, windows.since) - share(found, blocks, windows.since)), 2),
        "latency": latencies(served[windows.at :]),
        "back_s": round(outage.back_s - outage.killed_s, 2) if outage and outage.back_s < float("inf") else None,
        **came.summary(),
    }


def missed(row: dict[str, Any], deadline_s: float) -> list[str]:
    """The bars that a case misses, in words."""
    bad = callers_missed(row, deadline_s)
    if row["kept"] < KEPT_BAR * row["kept_predicted"]:
        bad.append(f"{row['kept']:.1%} is kept, {row['kept_predicted']:.1%} predicted; the bar is {KEPT_BAR} of it")
    if row["replicas"] > 1 and row["points_lost"] > LOST_BAR:
        bad.append(f"{row['points_lost']} points of hit share are lost, the bar {LOST_BAR}")
    off = 100 * abs(row["share"]["before"] - row["predicted"]["before"])
    if off > MODEL_BAR:
        bad.append(f"before the kill the prediction is {off:.1f} points off, the bar {MODEL_BAR}")
    return [f"{row['name']}: {one}" for one in bad]


def callers_missed(row: dict[str, Any], deadline_s: float) -> list[str]:
    """The bars of every case: nothing wrong, no exception, nothing evicted, calls within their deadline."""
    bad = [f"{what} is {row[what]}, not 0" for what in ("wrong", "errors", "evictions") if row[what]]
    return bad + [
        f"p99 of {call} is {taken['p99_s']} s, the deadline {deadline_s} s"
        for call, taken in row["latency"].items()
        if taken["p99_s"] > deadline_s
    ]
