"""What every transport must do when its peer is killed, stopped, half closed, slow or elsewhere: checks of a Way.

`TROUBLES` has them all. Real servers in processes of their own, and real signals; a check raises AssertionError where
a promise is broken: no call takes longer than its deadline and a little, none raises, no wrong byte is a hit, what is
back is used again, and nothing stays: descriptors, threads, memory, leases. They stop processes and measure time, so
run them alone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, Final, NamedTuple

from mmcache.client.blocking import Client
from mmcache.errors import TransportError
from mmcache.testing.between import FREE, Between, Limit
from mmcache.testing.leaks import many_failures_leave_no_descriptor_thread_or_memory
from mmcache.testing.process import suspend
from mmcache.testing.values import eventually
from mmcache.testing.way import DEADLINE_S, MEMORY, LateError, Stored, Way, holds_nothing, led
from mmcache.transport.base import Outcome


class Trouble(NamedTuple):
    """One promise, and what tries it."""

    name: str
    run: Callable[[Way], None]


TROUBLES: Final[list[Trouble]] = []
TRIES: Final = 3


def _trouble(function: Callable[[Way], None]) -> Callable[[Way], None]:
    """A check whose calls are in time at one of several tries: a machine that stands still spoils one, a fault all."""

    @wraps(function)
    def run(way: Way) -> None:
        for tries_left in reversed(range(TRIES)):
            try:
                return function(way)
            except LateError:
                if not tries_left:
                    raise

    TROUBLES.append(Trouble(function.__name__, run))
    return run


def misses_everything(cache: Client, stored: Stored) -> None:
    """Every call ends in time, raises nothing, and finds nothing."""
    began = time.monotonic()
    assert stored.get(cache) == 0
    assert {result.outcome for result in cache.put(stored.keys, stored.values)} == {Outcome.UNAVAILABLE}
    assert cache.match_prefix(stored.keys) == 0
    assert not any(cache.contains(stored.keys))
    with cache.acquire(stored.keys) as lease:
        assert not any(lease.frames)
    if hasattr(cache, "pin_prefix"):  # the asyncio client has none
        assert cache.pin_prefix(stored.keys).release()
    if time.monotonic() - began > 5 * DEADLINE_S:
        raise LateError("calls after a failure must not wait each")


def _is_known(stored: Stored, cache: Client) -> None:
    """Stored, and read back: soon, where a server was slow to answer."""
    eventually(partial(stored.put, cache), "it stores")
    eventually(partial(stored.reads, cache), "it hits")


def _told(cache: Client) -> Any:
    def stat() -> Any:
        with contextlib.suppress(TransportError):
            return cache.stat()

    return eventually(stat, "the server says how it is")


@_trouble
def a_killed_server_is_a_miss_and_used_again_once_it_is_back_at_its_address(way: Way) -> None:
    stored = Stored("killed")
    with (
        way.server(MEMORY) as server,
        way.connect(way.address(server), DEADLINE_S) as cache,
        way.connect(way.address(server), DEADLINE_S) as idle,
    ):
        address = way.address(server)
        _is_known(stored, cache)
        assert server.stop(signal.SIGKILL) == -signal.SIGKILL
        for client in (cache, idle):
            misses_everything(client, stored)
        with way.server(MEMORY, address):
            for client in (cache, idle):
                eventually(partial(stored.put, client), "it stores again")
                eventually(partial(stored.reads, client), "it reads again")
                assert _told(client)["transport"] == way.name


@_trouble
def a_server_that_moved_is_found_where_the_address_now_leads(way: Way) -> None:
    stored = Stored("moved")
    with (
        way.server(MEMORY) as first,
        led(way, first) as between,
        way.connect(between.address, DEADLINE_S) as cache,
    ):
        _is_known(stored, cache)
        before = _told(cache)["server_id"]
        assert first.stop(signal.SIGKILL) == -signal.SIGKILL
        with way.server(MEMORY) as second:
            between.lead_to(way.address(second))
            assert stored.get(cache) == 0
            _is_known(stored, cache)
            after = _told(cache)
            assert (after["transport"], after["server_id"] != before) == (way.name, True)


@_trouble
def a_stopped_server_costs_one_deadline_and_goes_on_where_it_was(way: Way) -> None:
    stored = Stored("stopped")
    with (
        way.server(MEMORY) as server,
        way.connect(way.address(server), DEADLINE_S) as known,
        way.connect(way.address(server), DEADLINE_S, lazy=True) as unknown,
    ):
        _is_known(stored, known)
        suspend(server.pid)
        try:
            for client in (known, unknown):
                began = time.monotonic()
                assert stored.get(client) == 0
                assert time.monotonic() - began > 0.8 * DEADLINE_S, "the server was not waited for"
                misses_everything(client, stored)
        finally:
            os.kill(server.pid, signal.SIGCONT)
        for client in (known, unknown):
            eventually(partial(stored.reads, client), "it hits again")


def _asks_until_cut(way: Way, between: Between, stored: Stored, client: Client) -> None:
    cuts = between.cuts

    def cut() -> bool:
        hits = stored.get(client)
        assert hits < len(stored.keys) or between.cuts == cuts, "what did not come was a hit"
        return between.cuts > cuts or way.name in ("shm", "nixl")  # their bytes go by another way

    eventually(cut, "the connection is cut")


def _is_cut(way: Way, limit: Limit) -> None:
    stored = Stored("cut")
    with way.server(MEMORY) as server, led(way, server) as between:
        with way.connect(way.address(server), DEADLINE_S) as direct:
            _is_known(stored, direct)
        with (
            way.connect(between.address, DEADLINE_S) as known,
            way.connect(between.address, DEADLINE_S, lazy=True) as unknown,
        ):
            eventually(partial(stored.reads, known), "it hits")
            for client in (known, unknown):
                between.limit(limit)
                _asks_until_cut(way, between, stored, client)
            between.limit(FREE)
            for client in (known, unknown):
                eventually(partial(stored.reads, client), "it hits again")
        holds_nothing(way, server)


@_trouble
def a_connection_half_closed_before_the_answer_is_a_miss(way: Way) -> None:
    _is_cut(way, Limit(nbytes=10))


@_trouble
def a_connection_half_closed_within_the_bytes_is_a_miss(way: Way) -> None:
    _is_cut(way, Limit(nbytes=100_000))


@_trouble
def a_connection_reset_within_the_bytes_is_a_miss(way: Way) -> None:
    _is_cut(way, Limit(nbytes=100_000, reset=True))


@_trouble
def a_peer_too_slow_costs_one_deadline_and_one_in_dribbles_is_read(way: Way) -> None:
    large, small = Stored("slow"), Stored("dribbles", nbytes=20_000)
    with way.server(MEMORY) as server, led(way, server) as between:
        with way.connect(way.address(server), DEADLINE_S) as direct:
            _is_known(large, direct)
            _is_known(small, direct)
        with way.connect(between.address, DEADLINE_S) as cache:
            eventually(partial(small.reads, cache), "it hits")
            between.limit(Limit(piece_nbytes=16 << 10, pause_s=0.1))  # 2 MiB would take 13 s
            hits = large.get(cache)
            assert hits < len(large.keys) or way.name in ("shm", "nixl"), "it came faster than it could"
            between.limit(Limit(piece_nbytes=1000, pause_s=0.002))
            eventually(lambda: small.reads(cache), "what comes in dribbles, in time, is read")
        holds_nothing(way, server)


@_trouble
def a_killed_client_leaves_nothing_behind(way: Way) -> None:
    with way.server(MEMORY) as server:
        url = way.url(way.address(server))
        child = subprocess.Popen([sys.executable, "-c", _BUSY, url], stdout=subprocess.PIPE)
        assert child.stdout is not None
        with child, child.stdout:
            assert child.stdout.readline() == b"busy\n"
            time.sleep(0.2)
            child.kill()
        holds_nothing(way, server)
        with way.connect(way.address(server), 5.0) as cache:
            stored = Stored("busy", count=4)
            eventually(lambda: stored.put(cache), "what it was writing can be written")
            assert stored.reads(cache)


_BUSY: Final = """
import sys, mmcache
from mmcache.testing.values import blanks, keys_of, values_of
keys = keys_of(4, "trouble/busy")
values, buffers = values_of(keys, 1 << 20), blanks(4, 1 << 20)
cache = mmcache.connect(sys.argv[1])
cache.put(keys, values)
print("busy", flush=True)
while True:
    cache.get_into(keys, buffers)
    lease = cache.acquire(keys)
    cache.delete(keys)
    cache.put(keys, values)
"""


_trouble(many_failures_leave_no_descriptor_thread_or_memory)
