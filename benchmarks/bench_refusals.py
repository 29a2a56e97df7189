"""What a stranger can learn from how long a refusal takes: nothing, if another tenant's key takes as long as no key.

    python benchmarks/bench_refusals.py [--tries 1000]

A real server with two tenants, over framed TCP and gRPC. For a tenant's token: keys of its own that are stored, keys
that another tenant stored, keys nobody stored. For tokens: one that differs from a good one in its last character, and
one that has nothing in common with it. Tries are interleaved in random order. Prints medians, and for each pair that
must not be told apart the difference of the medians with its 95% bootstrap interval, the chance that one try tells the
two apart (50%: none) and Mann-Whitney's two-sided p. A pair is within noise unless p is below .01 over the number of
pairs. A tenant's own keys are a control: they are told apart, so a difference would have been seen. Exits 1 if a pair
is not within noise, or the control is.
"""

from __future__ import annotations

import argparse
import math
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import grpc  # noqa: E402
import numpy as np  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

import mmcache  # noqa: E402
from mmcache.keys import Namespace, opaque_key  # noqa: E402
from mmcache.keyset import Keys  # noqa: E402
from mmcache.pb import cache_pb2 as pb  # noqa: E402
from mmcache.server.grants import digest_of  # noqa: E402
from mmcache.testing.process import ServerProcess  # noqa: E402
from mmcache.transport.base import PRELUDE_NBYTES, PROTOCOL, Op, pack_prelude, parse_prelude  # noqa: E402

ALPHA = 0.01
KEYS, VALUE_NBYTES = 64, 4096
OURS, THEIRS = "mmc_" + "a" * 43, "mmc_" + "b" * 43
ALMOST, FOREIGN = OURS[:-1] + "z", "mmc_" + "q" * 43
SERVICE = "/mmcache.v1.Cache/"
Microseconds = NDArray[np.float64]


class Pair(NamedTuple):
    """Two samples that must not differ, or, for the control, must."""

    what: str
    first: Microseconds
    second: Microseconds
    control: bool = False


class Framed:
    """A connection that has joined with a token."""

    def __init__(self, url: str, token: str) -> None:
        host, _, port = url.removeprefix("mmcache://").rpartition(":")
        self._sock = socket.create_connection((host, int(port)), 10)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.joined = self.ask(
            Op.JOIN, pb.JoinRequest(protocol=PROTOCOL, client="bench", token=token).SerializeToString()
        )

    def ask(self, op: Op, body: bytes) -> Op:
        """Send a request and take the whole answer; what it is."""
        self._sock.sendall(pack_prelude(op, 1, len(body)) + body)
        prelude = parse_prelude(self._take(PRELUDE_NBYTES), 1 << 24)
        self._take(prelude.body_nbytes + prelude.payload_nbytes)
        return prelude.op

    def _take(self, nbytes: int) -> bytes:
        data = b""
        while len(data) < nbytes:
            piece = self._sock.recv(nbytes - len(data))
            if not piece:
                raise ConnectionError("the server ended the connection")
            data += piece
        return data

    def close(self) -> None:
        """End it."""
        self._sock.close()


def mann_whitney(first: Microseconds, second: Microseconds) -> tuple[float, float]:
    """(chance that a value of `second` is the larger, two-sided p), by the normal approximation with ties."""
    both = np.concatenate([first, second])
    _, places, counts = np.unique(both, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[places]
    n, m = len(first), len(second)
    u = ranks[n:].sum() - m * (m + 1) / 2
    spread = math.sqrt(n * m / 12 * (n + m + 1 - (counts**3 - counts).sum() / ((n + m) * (n + m - 1))))
    z = max(abs(u - n * m / 2) - 0.5, 0) / spread
    return float(u / (n * m)), math.erfc(z / math.sqrt(2))


def interval(first: Microseconds, second: Microseconds) -> tuple[float, float]:
    """95% bootstrap interval of the difference of the medians."""
    random = np.random.default_rng(0)
    differences = [
        np.median(random.choice(second, len(second))) - np.median(random.choice(first, len(first))) for _ in range(1000)
    ]
    low, high = np.percentile(differences, [2.5, 97.5])
    return float(low), float(high)


def interleaved(tries: int, cases: dict[str, Callable[[], object]]) -> dict[str, Microseconds]:
    """Microseconds of each try; every round does every case once, in random order."""
    random, names = Random(1), list(cases)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-max(tries // 10, 10), tries):
        random.shuffle(names)
        for name in names:
            begin = time.perf_counter_ns()
            cases[name]()
            if turn >= 0:
                taken[name].append((time.perf_counter_ns() - begin) / 1000)
    return {name: np.array(values) for name, values in taken.items()}


def keys_cases(ask: Callable[[bytes], object], keys: dict[str, list[bytes]]) -> dict[str, Callable[[], object]]:
    """Asks for one key after the other of each sort."""

    def asking(digests: list[bytes]) -> Callable[[], object]:
        turns: Iterator[bytes] = (digests[turn % len(digests)] for turn in range(1 << 62))
        return lambda: ask(next(turns))

    return {name: asking(digests) for name, digests in keys.items()}


def framed_pairs(url: str, tries: int, keys: dict[str, list[bytes]]) -> Iterator[Pair]:
    """Over framed TCP."""
    link = Framed(url, OURS)
    assert link.joined is Op.JOIN
    questions: dict[str, Callable[[bytes], object]] = {
        "contains": lambda key: link.ask(Op.CONTAINS, pb.ContainsRequest(keys=key).SerializeToString()),
        "get": lambda key: link.ask(Op.ACQUIRE, pb.AcquireRequest(keys=key, inline=True).SerializeToString()),
        "explain": lambda key: link.ask(Op.EXPLAIN, pb.ExplainRequest(keys=key).SerializeToString()),
        "inspect": lambda key: link.ask(Op.INSPECT, pb.InspectRequest(key=key).SerializeToString()),
    }
    yield from asked("framed TCP", tries, questions, keys)
    link.close()

    def join(token: str) -> None:
        refused = Framed(url, token)
        assert refused.joined is Op.ERROR
        refused.close()

    yield tokens("framed TCP, join", tries, join)


def grpc_pairs(address: str, tries: int, keys: dict[str, list[bytes]]) -> Iterator[Pair]:
    """Over gRPC."""
    channel = grpc.insecure_channel(address)
    calls = {name: channel.unary_unary(SERVICE + name) for name in ("Contains", "Get", "Explain", "Inspect")}

    def metadata(token: str) -> Sequence[tuple[str, str]]:
        return [("authorization", f"Bearer {token}")]

    def asks(name: str, make: Callable[[bytes], Any]) -> Callable[[bytes], object]:
        return lambda key: calls[name](make(key).SerializeToString(), metadata=metadata(OURS))

    questions = {
        "Contains": asks("Contains", lambda key: pb.ContainsRequest(keys=key)),
        "Get": asks("Get", lambda key: pb.GetRequest(keys=key)),
        "Explain": asks("Explain", lambda key: pb.ExplainRequest(keys=key)),
        "Inspect": asks("Inspect", lambda key: pb.InspectRequest(key=key)),
    }
    yield from asked("gRPC", tries, questions, keys)
    body = pb.ContainsRequest(keys=bytes(32)).SerializeToString()

    def refused(token: str) -> None:
        try:
            calls["Contains"](body, metadata=metadata(token))
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                return
            raise
        raise AssertionError("a wrong token was let in")

    yield tokens("gRPC, Contains", tries, refused)
    channel.close()


def asked(
    carrier: str, tries: int, questions: dict[str, Callable[[bytes], object]], keys: dict[str, list[bytes]]
) -> Iterator[Pair]:
    """Each question about each sort of key."""
    for name, ask in questions.items():
        taken = interleaved(tries, keys_cases(ask, keys))
        medians = ", ".join(f"{sort} {np.median(values):.1f}" for sort, values in taken.items())
        print(f"{carrier}, {name}: median us of {tries} tries: {medians}")
        yield Pair(f"{carrier}, {name}: another tenant's or nobody's", taken["another tenant's"], taken["nobody's"])
        if name.lower() == "get":
            yield Pair(f"{carrier}, {name}: our own or nobody's (control)", taken["our own"], taken["nobody's"], True)


def tokens(what: str, tries: int, refuse: Callable[[str], None]) -> Pair:
    """Two wrong tokens."""
    taken = interleaved(tries, {"almost right": lambda: refuse(ALMOST), "unknown": lambda: refuse(FOREIGN)})
    medians = ", ".join(f"{sort} {np.median(values):.1f}" for sort, values in taken.items())
    print(f"{what} with a wrong token: median us of {tries} tries: {medians}")
    return Pair(f"{what}: an almost right or an unknown token", taken["almost right"], taken["unknown"])


def judge(pairs: Sequence[Pair]) -> bool:
    """Print a line a pair; whether all are as they must be."""
    limit, good = ALPHA / len(pairs), True
    for pair in pairs:
        chance, p = mann_whitney(pair.first, pair.second)
        low, high = interval(pair.first, pair.second)
        difference = float(np.median(pair.second) - np.median(pair.first))
        noise = p >= limit
        good &= noise != pair.control
        verdict = "within noise" if noise else "told apart"
        print(
            f"{pair.what}: {difference:+.1f} us [{low:+.1f}, {high:+.1f}], one try tells with "
            f"{max(chance, 1 - chance):.1%}, p = {p:.2g}: {verdict}"
        )
    return good


def main() -> int:
    """Store, ask, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=1000, help="of each case (default: %(default)s)")
    tries = max(20, parser.parse_args().tries)
    namespace = Namespace(kind="embedding", model="bench/refusals", dtype="uint8")
    sorts = {
        name: Keys.of([opaque_key(namespace, f"{name}/{place}".encode()) for place in range(KEYS)])
        for name in ("our own", "another tenant's", "nobody's")
    }
    with tempfile.TemporaryDirectory() as folder:
        access = Path(folder, "access.toml")
        access.touch(mode=0o600)
        access.write_text(
            "".join(
                f'[[tenant]]\nname = "{name}"\n[[token]]\ntenant = "{name}"\nsha256 = "{digest_of(token).hex()}"\n'
                for name, token in (("ours", OURS), ("theirs", THEIRS))
            )
        )
        with ServerProcess("64MiB", "--unix", "", "--access", str(access), "--grpc", "127.0.0.1:0") as server:
            for name, token in (("our own", OURS), ("another tenant's", THEIRS)):
                with mmcache.connect(server.url, token=token) as client:
                    assert all(client.put(sorts[name], [np.ones(VALUE_NBYTES, np.uint8)] * KEYS))
            keys = {name: list(found.digests) for name, found in sorts.items()}
            pairs = [*framed_pairs(server.url, tries, keys), *grpc_pairs(server.grpc_address, tries, keys)]
    return 0 if judge(pairs) else 1


if __name__ == "__main__":
    sys.exit(main())
