"""Clients, each a process, that ask for prompts as engines do: how much is stored, read that, store the rest.

Requests have numbers, and each is taken by whichever process is free. What each came to, and when its steps began, is
written down, so that the simulator can be asked the same in the same order (replay.py). One number may be that of a
kill: who takes it kills the shard, and goes on.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from benchmarks.cluster.traffic import Values, prompts
from mmcache.client.cluster import ClusterClient
from mmcache.client.cluster_steps import Replies, Round
from mmcache.cluster.membership import Membership, Static
from mmcache.cluster.placement import Member, View
from mmcache.cluster.settings import parse_cluster_url
from mmcache.cluster.urls import open_membership
from mmcache.keyset import Keys
from mmcache.testing.values import Bytes

READY_S = 60.0
LONGEST_S = 540.0  # of all requests of one load
ENDS_S = 10.0


@dataclass(frozen=True)
class Plan:
    """What a load is: `url` with the client's options; `members` (id, address), where the URL does not follow them."""

    url: str
    workload: str
    seed: int
    shards: int
    requests: int
    nbytes: int
    think_s: float = 0.0  # of a client, after each request
    by_block: bool = False
    members: tuple[tuple[str, str], ...] = ()

    def asked(self) -> list[Keys]:
        """The prompts, by number."""
        return prompts(self.workload, self.seed, self.shards, self.requests, by_block=self.by_block)


class Served(NamedTuple):
    """One request. Times are monotonic: of the lookup, of the read's begin and end, of the put's begin and end.

    `matched` is what the lookup said, `found` how many leading blocks were read; `view` is the number of members that
    the client knew. `lookups`, `puts`: how often each shard was asked.
    """

    number: int
    worker: int
    view: int
    times: tuple[float, float, float, float, float]
    blocks: int
    matched: int
    found: int
    wrong: int
    error: str
    lookups: tuple[str, ...]
    puts: tuple[str, ...]


@dataclass
class Came:
    """What a load came to: every request, by number, when the kill was (0: never), and clients' counters added up."""

    served: list[Served]
    killed_s: float
    counters: Counter[str] = field(default_factory=Counter)

    def summary(self) -> dict[str, Any]:
        """What callers noticed."""
        return {
            "wrong": sum(one.wrong for one in self.served),
            "errors": sum(bool(one.error) for one in self.served),
            "error": next((one.error for one in self.served if one.error), ""),
            "compared": sum(one.found for one in self.served),
            "counters": dict(self.counters),
            "seconds": round(max(one.times[4] for one in self.served) - self.served[0].times[0], 2),
        }


class Asking(ClusterClient):
    """A client that writes down whom it asks."""

    def __init__(self, *given: Any) -> None:
        self.asked: list[str] = []
        super().__init__(*given)

    def _round(self, asks: Round, ask: Callable[..., Any]) -> Replies:
        self.asked += asks
        return super()._round(asks, ask)

    @property
    def members_known(self) -> int:
        """How many the next call will know of."""
        return len(self._membership.view().members)

    def told(self) -> tuple[str, ...]:
        """Whom it has asked since this was last called."""
        asked, self.asked = self.asked, []
        return tuple(asked)


class Shared:
    """What the processes of a load share."""

    def __init__(self, workers: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.next = spawn.Value("q", 0)
        self.gate = spawn.Barrier(workers + 1)
        self.kill_at, self.victim = spawn.Value("q", -1), spawn.Value("q", 0)
        self.killed_s = spawn.Value("d", 0.0)
        self.results = spawn.Queue()

    def take(self, most: int) -> int:
        """The next number, or -1 when there is none."""
        with self.next.get_lock():
            number = int(self.next.value)
            if number >= most:
                return -1
            self.next.value = number + 1
        if number == self.kill_at.value:
            os.kill(self.victim.value, signal.SIGKILL)
            self.killed_s.value = time.monotonic()
        return number


class Load:
    """The processes. `run` waits for them; meanwhile it tells `watch` the next request's number, again and again.

    `kill`: the number of the request that kills, and the process that is killed.
    """

    def __init__(self, plan: Plan, workers: int, kill: tuple[int, int] | None = None) -> None:
        self.plan, self.workers = plan, workers
        self.shared = Shared(workers)
        if kill is not None:
            self.shared.kill_at.value, self.shared.victim.value = kill
        spawn = multiprocessing.get_context("spawn")
        self._processes = [
            spawn.Process(target=work, args=(plan, number, self.shared), daemon=True) for number in range(workers)
        ]

    def run(self, watch: Callable[[int], None]) -> Came:
        """All requests. Raises RuntimeError when a process ends early, or all take too long."""
        for process in self._processes:
            process.start()
        try:
            self.shared.gate.wait(READY_S)
            ends, results = time.monotonic() + LONGEST_S, list[Any]()
            while len(results) < self.workers:
                watch(int(self.shared.next.value))
                if not self.shared.results.empty():
                    results.append(self.shared.results.get())
                if any(process.exitcode for process in self._processes) or time.monotonic() > ends:
                    raise RuntimeError("a client process ended early, or took too long")
                time.sleep(0.01)
            watch(self.plan.requests)
        finally:
            for process in self._processes:
                process.join(ENDS_S)
                process.kill()
        came = Came([], float(self.shared.killed_s.value))
        for served, counters in results:
            came.served += served
            came.counters.update(counters)
        came.served.sort()
        return came


def connect(plan: Plan) -> Asking:
    """The client that a plan says."""
    config = parse_cluster_url(plan.url)
    membership: Membership
    if plan.members:
        membership = Static(View(tuple(Member(*one) for one in plan.members)))
    else:
        membership = open_membership(config.members)
    return Asking(config, membership)


def work(plan: Plan, worker: int, shared: Shared) -> None:
    """One process."""
    asked, values = plan.asked(), Values(plan.nbytes)
    most = max(map(len, asked))
    buffers = [np.zeros(plan.nbytes, np.uint8) for _ in range(most)]
    served = []
    with connect(plan) as client:
        client.announces = False  # each would tell of the same shard, over the progress bar
        client.stat()
        client.told()
        shared.gate.wait(READY_S)
        while (number := shared.take(plan.requests)) >= 0:
            served.append(serve(client, asked[number], values, buffers, (number, worker)))
            time.sleep(plan.think_s)
        counters: Mapping[str, Any] = client.counters
        shared.results.put((served, {name: counters[name] for name in ("failovers", "copied") if name in counters}))


def serve(client: Asking, keys: Keys, values: Values, buffers: Sequence[Bytes], who: tuple[int, int]) -> Served:
    """One request. An exception of the client's is told, and ends it."""
    view = client.members_known
    times = [time.monotonic()]
    matched = found = wrong = 0
    error = ""
    lookups: tuple[str, ...] = ()
    puts: tuple[str, ...] = ()
    try:
        matched = client.match_prefix(keys)
        times.append(time.monotonic())
        lookups = client.told()
        results = client.get_into(keys[:matched], buffers[:matched]) if matched else []
        times.append(time.monotonic())
        client.told()
        found = next((row for row, result in enumerate(results) if not result), len(results))
        wrong = sum(
            bool(result) and not values.is_right(digest, buffer)
            for digest, buffer, result in zip(keys.digests, buffers, results, strict=False)
        )
        new = keys[found:]
        fresh = [values.of(digest) for digest in new.digests]
        times.append(time.monotonic())
        if fresh:
            client.put(new, fresh)
            puts = client.told()
    except Exception as raised:  # none may reach a caller: that is what is measured
        error = repr(raised)
    times += [time.monotonic()] * (5 - len(times))
    first, second, third, fourth, fifth = times
    times_of = (first, second, third, fourth, fifth)
    return Served(*who, view, times_of, len(keys), matched, found, wrong, error, lookups, puts)
