"""A full server killed under load, with SIGKILL: how soon it serves again, and what is left of what it stored.

    python benchmarks/bench_restart.py [--memory 4GiB] [--value 256KiB] [--kills 3] [--json FILE|-]

`mmcache serve --hold` in processes of its own, filled to the brim. Then two processes read values, some more often than
others, out of more than fit, and store what they miss; each byte that arrives is compared with what belongs there.
Meanwhile the server is killed. `serves`: seconds from the kill until a client that connects anew has a hit. `resumes`:
until a client that was connected has one. `kept`: the share of the entries there just before the kill that are there
just after, asked with the load going on, so what the load replaced meanwhile counts as lost. `restored`: the share that
the new server says it took over. Hit rates are of the seconds before the kill and from `resumes` on. Exits 1 when a bar
is missed: 2 s, 99%, one point, no wrong byte, no exception.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

import mmcache  # noqa: E402
from mmcache.client.blocking import Client  # noqa: E402
from mmcache.errors import MMCacheError  # noqa: E402
from mmcache.keyset import Keys  # noqa: E402
from mmcache.testing.process import ServerProcess, children_of  # noqa: E402
from mmcache.testing.values import Bytes  # noqa: E402
from mmcache.units import parse_nbytes  # noqa: E402

BARS = {"serves_s": 2.0, "kept": 0.99, "restored": 0.99, "points": 1.0}
STEADY_POINTS, MOST_WINDOWS = 0.3, 12
PROCESSES = 2
PACE_S = 0.002
BATCH = 8
CHUNK = 1024


class Values:
    """Keys and the only right value of each: a window of random bytes that begins with the key's number."""

    def __init__(self, count: int, nbytes: int) -> None:
        space = mmcache.Namespace(kind="kv", model="bench/restart", dtype="uint8", layout="flat", block_size=1)
        self.nbytes = nbytes
        self.keys = [mmcache.opaque_key(space, number.to_bytes(8, "little")) for number in range(count)]
        self._pool = np.random.default_rng(1).integers(0, 256, 2 * nbytes, np.uint8)

    def value(self, number: int) -> Bytes:
        """The value, a copy."""
        start = number * 64 % self.nbytes
        value = self._pool[start : start + self.nbytes].copy()
        value[:8] = np.frombuffer(number.to_bytes(8, "little"), np.uint8)
        return value

    def is_right(self, number: int, found: Bytes) -> bool:
        """Whether each byte is."""
        start = number * 64 % self.nbytes
        head = np.frombuffer(number.to_bytes(8, "little"), np.uint8)
        return bool(
            np.array_equal(found[:8], head) and np.array_equal(found[8:], self._pool[start + 8 : start + self.nbytes])
        )

    def put(self, client: Client, numbers: list[int]) -> None:
        """Store these; what is refused is left."""
        client.put(Keys.of([self.keys[one] for one in numbers]), [self.value(one) for one in numbers])

    def present(self, client: Client) -> set[int]:
        """The numbers of those stored now; asking is no use of them."""
        found: set[int] = set()
        for start in range(0, len(self.keys), CHUNK):
            answers = client.contains(Keys.of(self.keys[start : start + CHUNK]))
            found.update(start + place for place, is_there in enumerate(answers) if is_there)
        return found


class Load:
    """Processes that read and, where they miss, store; a client each. Counts grow; see `Counts`."""

    def __init__(self, url: str, values: Values) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._stop, self.killed_s = spawn.Event(), spawn.Value("d", 0.0)
        self._counts = [spawn.Array("d", len(Counts._fields)) for _ in range(PROCESSES)]
        given = (url, len(values.keys), values.nbytes, self._stop, self.killed_s)
        self._processes = [
            spawn.Process(target=run_load, args=(seed, counts, *given), daemon=True)
            for seed, counts in enumerate(self._counts)
        ]
        for process in self._processes:
            process.start()

    def counts(self) -> list[Counts]:
        """Of each process, now."""
        return [Counts._make(counts[:]) for counts in self._counts]

    def total(self, name: str) -> int:
        """Of all processes."""
        return int(sum(getattr(counts, name) for counts in self.counts()))

    def rate_of(self, seconds: float) -> float:
        """Of hits among what is asked for in the next so many seconds."""
        hits, asked = self.total("hits"), self.total("asked")
        time.sleep(seconds)
        return (self.total("hits") - hits) / max(1, self.total("asked") - asked)

    def stop(self) -> None:
        """End all."""
        self._stop.set()
        for process in self._processes:
            process.join()


class Counts(NamedTuple):
    """Of one process; `resumed_s` is when it had its first hit after the last kill, monotonic."""

    hits: float = 0
    asked: float = 0
    wrong: float = 0
    errors: float = 0
    resumed_s: float = 0


def run_load(seed: int, shared: Any, url: str, count: int, nbytes: int, stop: Any, killed_s: Any) -> None:
    """One process of the load. An exception of the client's is counted, told, and the next step tried."""
    values, random = Values(count, nbytes), np.random.default_rng(100 + seed)
    order = np.random.default_rng(7).permutation(count)
    buffers = [np.zeros(nbytes, np.uint8) for _ in range(BATCH)]
    counts = Counts()
    with mmcache.connect(url) as client:
        while not stop.is_set():
            # a power of a uniform number: the first tenth of the keys gets a good third of the reads
            drawn = list(dict.fromkeys(order[(count * random.random(BATCH) ** 2.2).astype(int)].tolist()))
            began_s = time.monotonic()
            try:
                found, wrong = step(client, values, drawn, buffers)
            except Exception as error:  # none may reach a caller: that is what is measured
                print(f"bench_restart: {error!r}", file=sys.stderr)
                found, wrong, counts = 0, 0, counts._replace(errors=counts.errors + 1)
            resumed_s = counts.resumed_s
            if found and began_s > killed_s.value >= resumed_s:
                resumed_s = time.monotonic()
            hits, asked = counts.hits + found, counts.asked + len(drawn)
            counts = Counts(hits, asked, counts.wrong + wrong, counts.errors, resumed_s)
            shared[:] = counts
            time.sleep(PACE_S)


def step(client: Client, values: Values, numbers: list[int], buffers: list[Bytes]) -> tuple[int, int]:
    """Read these, and store those that are not there: how many were found, and how many of them were wrong."""
    results = client.get_into(Keys.of([values.keys[one] for one in numbers]), buffers[: len(numbers)])
    found = [bool(result) for result in results]
    wrong = sum(
        hit and not values.is_right(one, buffer) for one, buffer, hit in zip(numbers, buffers, found, strict=False)
    )
    missing = [one for one, hit in zip(numbers, found, strict=True) if not hit]
    if missing:
        values.put(client, missing)
    return sum(found), wrong


def serves_again(url: str, values: Values, some: list[int], was: int, patience_s: float = 60.0) -> dict[str, int]:
    """Wait until a new client of another life has a hit; that life's counters."""
    end = time.monotonic() + patience_s
    keys, buffers = Keys.of([values.keys[one] for one in some]), [np.zeros(values.nbytes, np.uint8) for _ in some]
    while time.monotonic() < end:
        with contextlib.suppress(MMCacheError), mmcache.connect(url, deadline_s=1.0) as client:
            if any(client.get_into(keys, buffers)) and not alive(was):
                counters: dict[str, int] = client.stat()["counters"]
                return counters
        time.sleep(0.01)
    raise SystemExit(f"the server did not serve again within {patience_s:g} s")


def alive(pid: int) -> bool:
    """Whether there is such a process, still running."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def one_kill(server: ServerProcess, values: Values, load: Load, seconds: float) -> dict[str, Any]:
    """Measure, kill, measure."""
    with mmcache.connect(server.url) as client:
        before_rate = load.rate_of(seconds)
        before = values.present(client)
        entries = client.stat()["counters"]["entries"]
    (pid,) = children_of(server.pid)
    some = sorted(before)[:: max(1, len(before) // 16)][:16]
    killed_s = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    load.killed_s.value = time.monotonic()
    counters = serves_again(server.url, values, some, pid)
    serves_s = time.monotonic() - killed_s
    with mmcache.connect(server.url) as client:
        after = values.present(client)
    while min(counts.resumed_s for counts in load.counts()) < killed_s:
        time.sleep(0.01)
    resumed_s = max(counts.resumed_s for counts in load.counts())
    after_rate = load.rate_of(seconds)
    return {
        "entries": entries,
        "serves_s": round(serves_s, 3),
        "resumes_s": round(resumed_s - killed_s, 3),
        "kept": round(len(before & after) / len(before), 5),
        "restored": round(counters["restored_entries"] / entries, 5),
        "dropped": counters["restored_dropped"],
        "hit_rate_before": round(before_rate, 4),
        "hit_rate_after": round(after_rate, 4),
        "points": round(100 * abs(after_rate - before_rate), 2),
    }


def settle(load: Load, seconds: float) -> None:
    """Wait until the hit rate no longer rises: the policy learns at first, and what it learns is not measured here."""
    rate, windows = load.rate_of(seconds), 1
    while windows < MOST_WINDOWS:
        before, rate, windows = rate, load.rate_of(seconds), windows + 1
        if abs(rate - before) < STEADY_POINTS / 100:
            break


def read_all(client: Client, values: Values) -> tuple[int, int, int]:
    """Read what is there: how many values, how many that were not to be had, and how many wrong ones."""
    buffers = [np.zeros(values.nbytes, np.uint8) for _ in range(BATCH)]
    present = sorted(values.present(client))
    unread = wrong = 0
    for start in range(0, len(present), BATCH):
        numbers = present[start : start + BATCH]
        results = client.get_into(Keys.of([values.keys[one] for one in numbers]), buffers[: len(numbers)])
        for one, result, buffer in zip(numbers, results, buffers, strict=False):
            unread += not result
            wrong += bool(result) and not values.is_right(one, buffer)
    return len(present) - unread, unread, wrong


def missed(report: dict[str, Any]) -> list[str]:
    """The bars that a report misses, in words."""
    bad = [
        f"{name} is {report[name]}, not 0"
        for name in ("wrong", "errors", "corrupt", "unread_at_the_end")
        if report[name]
    ]
    for number, row in enumerate(report["kills"]):
        for name, bar in BARS.items():
            if row[name] < bar if name in ("kept", "restored") else row[name] > bar:
                bad.append(f"kill {number}: {name} is {row[name]}, the bar {bar}")
    return bad


def main() -> int:
    """Fill, load, kill, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", type=parse_nbytes, default=4 << 30)
    parser.add_argument("--value", type=parse_nbytes, default=256 << 10)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0, help="of load before and after each kill")
    parser.add_argument("--json", metavar="FILE", help="also write the report here; - writes it to stdout alone")
    chosen = parser.parse_args()
    fit = chosen.memory // (chosen.value + 1024)
    values = Values(fit * 5 // 4, chosen.value)
    with ServerProcess(str(chosen.memory), "--hold") as server:
        with mmcache.connect(server.url) as client:
            for start in range(0, len(values.keys), 64):
                values.put(client, list(range(start, min(start + 64, len(values.keys)))))
        load = Load(server.url, values)
        settle(load, chosen.seconds)
        kills = [one_kill(server, values, load, chosen.seconds) for _ in range(chosen.kills)]
        load.stop()
        with mmcache.connect(server.url) as client:
            read, unread, wrong = read_all(client, values)
            bad = client.stat()["counters"]["corrupt_dropped"]
    report = {
        "memory_nbytes": chosen.memory,
        "value_nbytes": chosen.value,
        "kills": kills,
        "wrong": load.total("wrong") + wrong,
        "errors": load.total("errors"),
        "values_read": load.total("hits"),
        "read_at_the_end": read,
        "unread_at_the_end": unread,
        "corrupt": bad,
    }
    report["missed"] = missed(report)
    show(report, chosen.json)
    return 1 if report["missed"] else 0


def show(report: dict[str, Any], where: str | None) -> None:
    """A table, and JSON where it is wanted."""
    text = json.dumps(report, indent=1)
    if where == "-":
        print(text)
        return
    if where:
        Path(where).write_text(text)
    names = list(report["kills"][0])
    print("  ".join(f"{name:>15}" for name in names))
    for row in report["kills"]:
        print("  ".join(f"{row[name]:>15}" for name in names))
    print(
        f"every byte of {report['values_read']} values compared under load, and of all {report['read_at_the_end']} at "
        f"the end: {report['wrong']} wrong, {report['corrupt']} corrupt, {report['unread_at_the_end']} not to be had; "
        f"{report['errors']} exceptions"
    )
    print("; ".join(report["missed"]) or "all bars are met")


if __name__ == "__main__":
    sys.exit(main())
