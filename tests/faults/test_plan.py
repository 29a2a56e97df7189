"""Faults come from the seed, one at a time on each target; and the relay does what it is told."""

from __future__ import annotations

import itertools
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator

import pytest

from tests.faults.fault.kinds import kinds
from tests.faults.fault.memory import NoLimit, check, limited
from tests.faults.fault.relay import Relay
from tests.faults.fault.schedule import plan

KINDS = kinds(("c0", "c1"))


def test_a_plan_is_its_seeds_and_another_seed_has_another() -> None:
    assert plan(3, 100.0, KINDS) == plan(3, 100.0, KINDS)
    assert plan(3, 100.0, KINDS) != plan(4, 100.0, KINDS)


@pytest.mark.parametrize("seed", range(20))
def test_every_kind_comes_in_two_minutes_and_no_target_has_two_faults_at_once(seed: int) -> None:
    planned = plan(seed, 90.0, KINDS)
    assert {one.kind for one in planned} >= KINDS.keys() - {"drain"}
    befallen = defaultdict(list)
    for one in planned:
        kind = KINDS[one.kind]
        assert one.target in kind.targets
        assert kind.least_s <= one.length_s <= kind.most_s
        for target in (one.target, *kind.also):
            befallen[target].append((one.begin_s, one.begin_s + one.length_s))
    for spans in befallen.values():
        for (_, end_s), (begin_s, _) in itertools.pairwise(sorted(spans)):
            assert begin_s > end_s
    assert max(one.begin_s + one.length_s for one in planned) <= 90.0


def test_the_kernel_kills_what_is_limited_once_it_takes_memory() -> None:
    try:
        check()
    except NoLimit as error:
        pytest.skip(str(error))
    words = [
        sys.executable,
        "-c",
        "print(flush=True); input(); print(bytearray(b'x' * (64 << 20))[5], flush=True); input()",
    ]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"  # what it takes to start is not limited
        with limited(process.pid, "test"):
            process.stdin.write(b"\n")
            process.stdin.flush()
            assert process.wait(10) == -signal.SIGKILL


@pytest.fixture
def far() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        yield listener


def test_the_relay_delays_stalls_cuts_and_passes_on(far: socket.socket) -> None:
    with (
        Relay(0, far.getsockname()[1]) as relay,
        socket.create_connection(("127.0.0.1", relay.port)) as near,
        far.accept()[0] as server,
    ):
        near.settimeout(10)
        near.sendall(b"free")
        assert server.recv(10) == b"free"
        relay.obey("delay 0.2")
        began_s = time.monotonic()
        server.sendall(b"late")
        assert near.recv(10) == b"late"
        assert time.monotonic() - began_s >= 0.2
        relay.obey("stall")
        near.sendall(b"held")
        server.settimeout(0.3)
        with pytest.raises(TimeoutError):
            server.recv(10)
        server.settimeout(10)
        relay.obey("free")
        assert server.recv(10) == b"held"
        relay.obey("cut")
        with pytest.raises(ConnectionResetError):
            near.recv(10)


@pytest.mark.parametrize("rule", ["cut", "lose"])
def test_what_the_relay_loses_ends_the_connection(far: socket.socket, rule: str) -> None:
    sent = bytes(range(256)) * (1 << 14)
    with Relay(0, far.getsockname()[1]) as relay:
        relay.obey(rule)
        with socket.create_connection(("127.0.0.1", relay.port)) as near, far.accept()[0] as server:
            near.settimeout(10)
            got = b""
            with pytest.raises(OSError):  # noqa: PT011, PT012  # reset, or a broken pipe, on either side
                for at in range(0, len(sent), 1 << 16):
                    server.sendall(sent[at : at + (1 << 16)])
                    got += near.recv(1 << 16)
                near.recv(1)
            assert len(got) < len(sent)
