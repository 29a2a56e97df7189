"""A fifth shard joins four full ones under load: what moves, what callers notice, and what the simulator says of it."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.cluster.bed import Servers, redis_server
from benchmarks.cluster.figures import latencies, share
from benchmarks.cluster.kill import MODEL_BAR, SHARDS, Size, callers_missed
from benchmarks.cluster.load import Came, Load, Plan
from benchmarks.cluster.replay import Predicted, Replay
from mmcache.cluster.membership import Watched
from mmcache.cluster.placement import View
from mmcache.cluster.routes import RAMP_S
from mmcache.cluster.settings import parse_cluster_url
from mmcache.cluster.urls import open_membership
from mmcache.keyset import Key, Keys
from mmcache.testing.values import eventually

JOIN_AT = 3  # after so small a part of all requests
WINDOWS = 12
MOVED_BAR = 1.05  # of the least that must move
ATTRACTS_BAR = 1.5  # times its share of the keys
LOST_BAR = 2.0  # points of hit share, at the end
HELD_BAR = 0.1  # of the blocks that the newcomer is predicted to hold at the end
MIB = 1 << 20


@dataclass(frozen=True)
class Case:
    """`ramp_s`: for how long clients ask, too, who owned a run before; 0: a newcomer is all there is."""

    workload: str
    ramp_s: float


RAMPS = (RAMP_S, 0.0)


@dataclass
class Watch:
    """What is seen of the servers meanwhile: counters at the windows' bounds, and who has which block at the join."""

    servers: Servers
    keys: Keys
    requests: int
    counters: list[dict[str, dict[str, Any]]] = field(default_factory=list)
    held: dict[str, set[bytes]] = field(default_factory=dict)
    joined_at: int = -1

    def look(self, number: int) -> None:
        """So many requests have begun."""
        while len(self.counters) <= WINDOWS and number >= len(self.counters) * self.requests // WINDOWS:
            self.counters.append({name: self.servers.counters(name) for name in self.servers.names})

    def hold(self) -> dict[str, set[bytes]]:
        """Who has which block now."""
        return {name: self.servers.holding(name, self.keys) for name in self.servers.names}


def run_case(case: Case, size: Size, watch: Callable[[int], None]) -> dict[str, Any]:
    """Start Redis and four shards, serve the requests, have a fifth join; what was measured, and predicted. Raises
    ConfigError without redis-server or the extra `cluster`."""
    with redis_server() as redis:
        members = f"mmcache+redis://{redis}/0?cluster=bench"
        with Servers(size.memory_nbytes, "--join", members) as servers:
            for _ in range(SHARDS):
                servers.start()
            membership = open_membership(members)
            assert isinstance(membership, Watched)
            try:
                before = _view_of(membership, SHARDS)
                url = f"{members}&deadline_s={size.deadline_s}&ramp_s={case.ramp_s}"
                plan = Plan(url, case.workload, size.seed, SHARDS, size.requests, size.nbytes, size.think_s)
                asked = plan.asked()
                seen = Watch(servers, _all(asked), size.requests)
                came = _serve(plan, size, seen, watch)
                after = _view_of(membership, SHARDS + 1)
            finally:
                membership.close()
            held = seen.hold()
    predicted = _replay(asked, came, {SHARDS: before, SHARDS + 1: after}, url, size)
    without = _replay(asked, _still(came), {SHARDS: before}, url, size)
    return {
        **asdict(case),
        "name": f"{case.workload}, joins, ramp_s={case.ramp_s:g}",
        "windows": _windows(came, predicted, without, seen, before, after, size),
        **_moved(came, predicted, seen, held, before, after, size),
        "requests": len(came.served),
        **came.summary(),
        "evictions": sum(one.get("evictions", 0) for one in seen.counters[-1].values()),
        "latency": latencies(came.served),
    }


def _view_of(membership: Watched, members: int) -> View:
    eventually(lambda: len(membership.view().members) == members, f"{members} members are known")
    return membership.view()


def _all(asked: Sequence[Keys]) -> Keys:
    first: dict[bytes, Key] = {}
    for keys in asked:
        if any(digest not in first for digest in keys.digests):
            first |= {key.digest: key for key in keys if key.digest not in first}
    return Keys.of(first.values())


def _serve(plan: Plan, size: Size, seen: Watch, watch: Callable[[int], None]) -> Came:
    load = Load(plan, size.clients)
    joining: list[threading.Thread] = []

    def look(number: int) -> None:
        watch(number)
        if not joining and number >= size.requests // JOIN_AT:
            seen.held, seen.joined_at = seen.hold(), number
            joining.append(seen.servers.start_beside())
        seen.look(number)

    came = load.run(look)
    for thread in joining:
        thread.join()
    return came


def _replay(asked: Sequence[Keys], came: Came, views: dict[int, View], url: str, size: Size) -> Predicted:
    return Replay(asked, came.served, views, parse_cluster_url(url), size.nbytes).run()


def _still(came: Came) -> Came:
    """The same requests, with nobody who joins."""
    return Came([one._replace(view=SHARDS) for one in came.served], 0.0)


def _windows(
    came: Came, predicted: Predicted, without: Predicted, seen: Watch, before: View, after: View, size: Size
) -> list[dict[str, Any]]:
    served = came.served
    blocks, found = [one.blocks for one in served], [one.found for one in served]
    newcomer = _newcomer(before, after)
    rows = []
    for place in range(WINDOWS):
        window = range(place * size.requests // WINDOWS, (place + 1) * size.requests // WINDOWS)
        known = [served[number].view for number in window]
        counters = seen.counters[place + 1]
        rows.append(
            {
                "first": window.start,
                "know_it": round(sum(count > SHARDS for count in known) / len(known), 3),
                "share": round(share(found, blocks, window), 4),
                "predicted": round(share(predicted.found, blocks, window), 4),
                "without": round(share(without.found, blocks, window), 4),
                "lookups": _part([served[number].lookups for number in window], newcomer),
                "lookups_predicted": _part([predicted.lookups[number] for number in window], newcomer),
                "puts": _part([served[number].puts for number in window], newcomer),
                "puts_predicted": _part([predicted.puts[number] for number in window], newcomer),
                "requests": _counted([served[number].lookups + served[number].puts for number in window], after),
                "held_mib": round(counters.get(newcomer, {}).get("bytes_used", 0) / MIB, 2),
                "held_blocks": counters.get(newcomer, {}).get("entries", 0),
                "held_blocks_predicted": predicted.held[window.stop - 1],
                "copied_predicted": sum(predicted.copied[number] for number in window),
            }
        )
    return rows


def _newcomer(before: View, after: View) -> str:
    (newcomer,) = {member.id for member in after.members} - {member.id for member in before.members}
    return newcomer


def _part(asked: Sequence[tuple[str, ...]], name: str) -> float:
    """Of all requests to shards, those to one."""
    counts = Counter(one for names in asked for one in names)
    return round(counts[name] / max(1, counts.total()), 4)


def _counted(asked: Sequence[tuple[str, ...]], view: View) -> list[int]:
    counts = Counter(one for names in asked for one in names)
    return [counts[member.id] for member in view.members]


def _moved(
    came: Came, predicted: Predicted, seen: Watch, held: dict[str, set[bytes]], before: View, after: View, size: Size
) -> dict[str, Any]:
    """Of the blocks there at the join: those whose owner is another one, and those that the newcomer owns; those that
    it really has by the end, copied or stored anew; and those that came to other shards than had them."""
    newcomer = _newcomer(before, after)
    there = set[bytes]().union(*seen.held.values())
    moved = its = 0
    for digest in there:
        home = predicted.homes[digest]
        old, new = before.members[before.owners(home)[0]].id, after.members[after.owners(home)[0]].id
        moved += old != new
        its += new == newcomer
    elsewhere = sum(len((held[name] - seen.held[name]) & there) for name in seen.held)
    return {
        "joined_at": seen.joined_at,
        "blocks_at_join": len(there),
        "owner_changed_mib": round(moved * size.nbytes / MIB, 2),
        "least_mib": round(its * size.nbytes / MIB, 2),
        "over_least": round(moved / max(1, its), 4),
        "newcomer_has_mib": round(len(held[newcomer] & there) * size.nbytes / MIB, 2),
        "others_gained_mib": round(elsewhere * size.nbytes / MIB, 2),
        "held_at_end_mib": round(len(held[newcomer]) * size.nbytes / MIB, 2),
    }


def missed(row: dict[str, Any], deadline_s: float) -> list[str]:
    """The bars that a case misses, in words."""
    bad = callers_missed(row, deadline_s)
    if not 1 / MOVED_BAR <= row["over_least"] <= MOVED_BAR:
        bad.append(f"{row['over_least']} times the least bytes change owners, the bar {MOVED_BAR}")
    for window in row["windows"]:
        begins, off = f"from request {window['first']}", 100 * abs(window["share"] - window["predicted"])
        if off > MODEL_BAR:
            bad.append(f"{begins} the prediction is {off:.1f} points off, the bar {MODEL_BAR}")
        for what in ("lookups", "puts"):
            if window[what] > ATTRACTS_BAR / (SHARDS + 1):
                bad.append(f"{begins} the newcomer has {window[what]:.1%} of {what}, the bar {ATTRACTS_BAR} shares")
    last = row["windows"][-1]
    if 100 * (last["without"] - last["share"]) > LOST_BAR:
        bad.append(f"at the end {last['share']:.1%} are hits, {last['without']:.1%} had nobody joined")
    if abs(last["held_blocks"] - last["held_blocks_predicted"]) > HELD_BAR * last["held_blocks_predicted"]:
        bad.append(f"the newcomer holds {last['held_blocks']} blocks, {last['held_blocks_predicted']} predicted")
    return [f"{row['name']}: {one}" for one in bad]
