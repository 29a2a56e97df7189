"""What a refused caller can learn from how long a refusal takes, over TLS: nothing beyond noise, it should print.

    python benchmarks/bench_refusals.py [--tries 1000] [--rounds 3]

Reads: one connection of tenant b asks, in random order, for its own key, for one that tenant a stored, and for one
that nobody stored, with Contains and with Acquire. Joins: wrong tokens that share 0, 16 and 32 leading characters with
a right one, an expired one, and none, over a new connection each; timed from the request to the answer. Each pair is
compared by a permutation test of the difference of medians, on values with the slowest 5% left out; p below .01 in most
rounds counts as a difference. Exits 1 then. Control: an Acquire of the own key does differ from one of nobody's, as a
hit is more work; if p is not small there, the machine was too busy to see anything.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import numpy as np  # noqa: E402

import mmcache  # noqa: E402
from mmcache.client.credentials import Credentials  # noqa: E402
from mmcache.client.link import Link, join  # noqa: E402
from mmcache.config import parse_url  # noqa: E402
from mmcache.errors import AccessDenied  # noqa: E402
from mmcache.pb import cache_pb2 as pb  # noqa: E402
from mmcache.server.access_edit import with_token  # noqa: E402
from mmcache.server.grants import digest_of  # noqa: E402
from mmcache.testing.process import ServerProcess  # noqa: E402
from mmcache.transport.base import Op  # noqa: E402
from mmcache.transport.tcp import Channel, connect_tcp, resolve  # noqa: E402
from tests.integration.access_bed import write_access  # noqa: E402
from tests.integration.certificates import Authority  # noqa: E402
from tests.integration.support import keys_of, values_of  # noqa: E402

RIGHT = "mmc_" + "k3Jx9QvT2mWb7LrZ" + "p5NdYc8HsF1aGeUo" + "R4iXtB6wVqK0"
OTHER, EXPIRED = "token-of-a", "mmc_" + "token-of-b-that-expired" + "0" * 20
SHUFFLES = 2000
UNTRIMMED = 0.95
P_DIFFERS = 0.01


def permutation_p(left: Sequence[float], right: Sequence[float], rng: np.random.Generator) -> float:
    """How often a random split of all values has medians as far apart as these two samples."""
    a, b = (np.sort(np.asarray(sample))[: int(UNTRIMMED * len(sample))] for sample in (left, right))
    pool, seen = np.concatenate([a, b]), abs(np.median(a) - np.median(b))
    further = 0
    for _ in range(SHUFFLES):
        rng.shuffle(pool)
        further += abs(np.median(pool[: len(a)]) - np.median(pool[len(a) :])) >= seen
    return (further + 1) / (SHUFFLES + 1)


def timed(call: Callable[[], object]) -> float:
    """Microseconds."""
    start = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start) / 1000


class Asker:
    """Times what tenant b, and strangers, hear."""

    def __init__(self, url: str) -> None:
        self.config = parse_url(url, deadline_s=20.0)
        self.credentials = Credentials(self.config)
        self.addresses = resolve(self.config.host, self.config.port, time.monotonic() + 10)

    def joined(self, token: str) -> Link:
        """A fresh TLS connection, joined."""
        return join(self._channel(), self._by(), shared=False, token=token)

    def _by(self) -> float:
        return time.monotonic() + 20

    def _channel(self) -> Channel:
        return self.credentials.secure(connect_tcp(self.addresses, 10, self._by()), self._by())

    def refused_us(self, token: str) -> float:
        """How long Join takes to say no; the handshake is not counted."""
        channel = self._channel()

        def ask() -> None:
            try:
                join(channel, self._by(), shared=False, token=token)
            except AccessDenied:
                return
            raise AssertionError("a wrong token was let in")

        return timed(ask)


def reads_us(link: Link, keys: dict[str, bytes], op: Op, tries: int) -> dict[str, list[float]]:
    """Times of one question per key and try, in random order."""

    def contains(key: bytes) -> None:
        link.run(link.conversation.call(op, pb.ContainsRequest(keys=key), pb.ContainsReply()), time.monotonic() + 20)

    def acquire(key: bytes) -> None:
        acquired = link.run(link.conversation.acquire(key), time.monotonic() + 20)
        if acquired.lease_id:
            link.conversation.rider = acquired.lease_id

    ask = contains if op is Op.CONTAINS else acquire
    order = [name for name in keys for _ in range(tries)]
    random.shuffle(order)
    times: dict[str, list[float]] = {name: [] for name in keys}
    for name in [*keys] * 50 + order:
        times[name].append(timed(lambda: ask(keys[name])))  # noqa: B023
    return {name: sample[50:] for name, sample in times.items()}


def joins_us(asker: Asker, tokens: dict[str, str], tries: int) -> dict[str, list[float]]:
    """Times of refused joins, in random order."""
    order = [name for name in tokens for _ in range(tries)]
    random.shuffle(order)
    times: dict[str, list[float]] = {name: [] for name in tokens}
    for name in order:
        times[name].append(asker.refused_us(tokens[name]))
    return times


def report(what: str, times: dict[str, list[float]], pairs: Sequence[tuple[str, str]], differs: dict[str, int]) -> None:
    """Print medians and p-values of one round."""
    rng = np.random.default_rng(0)
    medians = ", ".join(f"{name} {np.median(sample):.1f}" for name, sample in times.items())
    print(f"{what}: median us: {medians}")
    for left, right in pairs:
        p = permutation_p(times[left], times[right], rng)
        apart = np.median(times[left]) - np.median(times[right])
        differs[f"{what}: {left} / {right}"] = differs.get(f"{what}: {left} / {right}", 0) + (p < P_DIFFERS)
        print(f"  {left} / {right}: {apart:+.2f} us apart, p = {p:.3f}")


def main() -> int:
    """Run the rounds; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        authority = Authority(folder)
        cert, key = authority.issue("server")
        text = with_token("", "b", digest_of(RIGHT).hex())
        text = with_token(text, "b", digest_of(EXPIRED).hex(), expires="2020-01-01T00:00:00Z")
        access = write_access(folder / "access.toml", with_token(text, "a", digest_of(OTHER).hex()))
        with ServerProcess("64MiB", "--access", access, "--tls-cert", cert, "--tls-key", key) as server:
            return run(f"{server.url}?ca={authority.ca}&transport=tcp", arguments.tries, arguments.rounds)


def run(url: str, tries: int, rounds: int) -> int:
    """All rounds against one server; 1 if something differs."""
    own, others, nobodys = (keys_of(1, label) for label in ("own", "another tenant's", "nobody's"))
    for token, stored in ((RIGHT, own), (OTHER, others)):
        with mmcache.connect(url, token=token) as cache:
            assert all(cache.put(stored, values_of(stored, 4096)))
    keys = {"own": own.digests[0], "another's": others.digests[0], "nobody's": nobodys.digests[0]}
    tokens = {f"shares {shared}": RIGHT[:shared] + "x" * (len(RIGHT) - shared) for shared in (0, 16, 32)}
    tokens |= {"expired": EXPIRED, "none": ""}
    asker, differs = Asker(url), dict[str, int]()
    link = asker.joined(RIGHT)
    for number in range(1, rounds + 1):
        print(f"round {number}, {tries} tries each")
        for op in (Op.CONTAINS, Op.ACQUIRE):
            times = reads_us(link, keys, op, tries)
            report(op.name.title(), times, [("another's", "nobody's")], differs)
            if op is Op.ACQUIRE:
                p = permutation_p(times["own"], times["nobody's"], np.random.default_rng(0))
                print(f"  control, own / nobody's: p = {p:.4f}")
        pairs = [("shares 0", "shares 16"), ("shares 0", "shares 32"), ("shares 16", "shares 32")]
        pairs += [("shares 0", "expired"), ("shares 0", "none")]
        report("Join", joins_us(asker, tokens, tries), pairs, differs)
    link.close()
    beyond = [name for name, count in differs.items() if count > rounds / 2]
    print(f"beyond noise: {', '.join(beyond) or 'nothing'}")
    return bool(beyond)


if __name__ == "__main__":
    sys.exit(main())
