"""`mmcache serve --hold`: servers that are killed come back with what they stored, and never with anything else."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mmcache
from mmcache.client.blocking import Client
from mmcache.errors import LeaseLost, TransportError
from mmcache.server import holder
from mmcache.store.kept import JOURNAL_NBYTES, LAYOUT, PAGE_NBYTES
from mmcache.store.rows import LIVE, RECORD
from mmcache.testing.process import ServerProcess, children_of
from tests.integration.access_bed import TOKENS, write_access
from tests.integration.held import COUNT, NBYTES, Memory, counters_of, kill, reads, replace, stores
from tests.integration.support import ROOT, blanks, eventually, keys_of, run_cli, value_of, values_of

COLUMNS_AT = holder.PAGE_NBYTES + PAGE_NBYTES + JOURNAL_NBYTES
ENTRIES = 1024  # a server of 16 MiB has as many
RECORDS_AT = COLUMNS_AT + ENTRIES


@pytest.fixture
def server() -> Iterator[ServerProcess]:
    with ServerProcess("16MiB", "--hold") as process:
        yield process


@pytest.fixture
def cache(server: ServerProcess) -> Iterator[Client]:
    with mmcache.connect(server.url) as client:
        yield client


def namespaces_of(url: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run_cli("ls", "-c", url, "--json").stdout.splitlines()]


def all_is_sound(url: str) -> dict[str, int]:
    """An audit of everything finds nothing, and what namespaces hold is what the index holds; its counters."""
    audit = json.loads(run_cli("audit", "-c", url, "--share", "100%", "--json").stdout)
    counters = counters_of(url)
    assert (audit["bad"], audit["entries"]) == ([], counters["entries"])
    assert sum(one["entries"] for one in namespaces_of(url)) == counters["entries"]
    assert counters["bytes_used"] <= counters["bytes_capacity"]
    return counters


def test_a_killed_server_comes_back_with_everything_and_clients_keep_their_map(
    server: ServerProcess, cache: Client
) -> None:
    assert stores(cache)
    expected, arena = counters_of(server.url), cache._arena
    assert arena is not None
    counters = kill(server)
    assert (counters["restored_entries"], counters["restored_dropped"]) == (COUNT, 0)
    for name in ("entries", "bytes_used", "bytes_kv", "largest_free_bytes"):
        assert counters[name] == expected[name]
    eventually(lambda: reads(cache) == COUNT, "the client that was there reads again")
    assert cache._arena is arena
    assert cache.stat()["transport"] == "shm"
    all_is_sound(server.url)
    (namespace,) = namespaces_of(server.url)
    assert namespace["facts"]["model"] == "test/model"
    assert server.stop() == 0
    assert f"was killed by signal 9; {COUNT} entries" in server.said


def test_leases_of_the_life_before_are_void(server: ServerProcess, cache: Client) -> None:
    assert stores(cache)
    keys = keys_of(COUNT, "kept")
    with mmcache.connect(server.url) as other:
        leased = other.acquire(keys)
        assert leased.__enter__().frames[0] is not None
        counters = kill(server)
        assert (counters["leases"], counters["held_bytes"]) == (0, 0)
        eventually(lambda: reads(cache), "it serves")
        assert all(cache.delete(keys))
        eventually(lambda: counters_of(server.url).get("bytes_used") == 0, "what the lease held is free")
        with pytest.raises(LeaseLost):
            leased.__exit__(None, None, None)


@pytest.mark.alone
def test_kills_under_traffic_lose_nothing_that_was_stored_and_give_nothing_wrong(server: ServerProcess) -> None:
    stop, lives = threading.Event(), 4
    trouble: list[str] = []

    def traffic(number: int) -> None:
        step = 0
        with mmcache.connect(server.url, deadline_s=2.0) as client:
            while not stop.is_set():
                step += 1
                label, nbytes = f"{number}/{step % 50}", 1000 * (50 + step % 50)
                keys, buffers = keys_of(4, label), blanks(4, nbytes)
                try:
                    results = client.get_into(keys, buffers)
                    if step % 7 == 0:
                        with contextlib.suppress(TransportError):  # unlike the others, this one says so
                            client.delete(keys[:1])
                    if not all(results):
                        client.put(keys, values_of(keys, nbytes))
                except Exception as error:
                    trouble.append(repr(error))
                    return
                for digest, result, buffer in zip(keys.digests, results, buffers, strict=True):
                    if result and not np.array_equal(buffer, value_of(digest, nbytes)):
                        trouble.append(f"{label}: wrong bytes")

    threads = [threading.Thread(target=traffic, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        for life in range(lives):
            eventually(lambda: trouble or counters_of(server.url).get("evictions", 0) > 20, "memory is turned over")
            stored = eventually(lambda: counters_of(server.url), "it answers")["entries"]
            counters = kill(server)
            assert counters["restored_dropped"] == 0
            assert counters["restored_entries"] > stored // 2, f"life {life}"
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert trouble == []
    all_is_sound(server.url)


def test_memory_is_evicted_and_filled_right_after_a_restart(server: ServerProcess, cache: Client) -> None:
    for batch in range(8):
        assert stores(cache, f"before/{batch}")  # more than there is room for
    before = counters_of(server.url)
    counters = kill(server)
    assert counters["entries"] == before["entries"] == counters["restored_entries"]
    eventually(lambda: stores(cache, "after/0"), "it stores again")
    for batch in range(1, 8):
        assert stores(cache, f"after/{batch}")
    assert all_is_sound(server.url)["evictions"] > COUNT
    assert reads(cache, "after/7") == COUNT


def test_a_flipped_byte_in_what_was_restored_is_a_miss_and_the_entry_goes(server: ServerProcess, cache: Client) -> None:
    assert stores(cache)
    digest = keys_of(COUNT, "kept").digests[7]
    with Memory(server.pid, "memfd:mmcache-arena") as arena:
        at = arena.read(0, arena.nbytes).index(value_of(digest, NBYTES).tobytes()) + 1234
        arena.write(at, bytes([arena.read(at, 1)[0] ^ 0x10]))
    kill(server)
    eventually(lambda: reads(cache), "it serves")
    assert reads(cache) == COUNT - 1
    eventually(lambda: counters_of(server.url).get("entries") == COUNT - 1, "it was dropped")


def test_a_torn_row_is_dropped_at_the_start_or_when_it_is_first_read(server: ServerProcess, cache: Client) -> None:
    assert stores(cache)
    with Memory(server.pid, "memfd:mmcache-index") as index:
        states = index.read(COLUMNS_AT, ENTRIES)
        first, second = (row for row in range(ENTRIES) if states[row] == LIVE and row in (4, 9))
        index.write(RECORDS_AT + first * RECORD.size + 8, bytes(8))  # its size was not written
        at = RECORDS_AT + second * RECORD.size + 20
        index.write(at, index.read(at, 8) + bytes(8))  # nor half of its header's checksum
    counters = kill(server)
    assert (counters["restored_entries"], counters["restored_dropped"]) == (COUNT - 1, 1)
    eventually(lambda: reads(cache), "it serves")
    assert reads(cache) == COUNT - 2
    all_is_sound(server.url)


def test_what_was_being_written_is_free_again(server: ServerProcess) -> None:
    """A writer announces a value, sends half of it, and the server is killed."""
    from mmcache.pb import cache_pb2 as pb
    from mmcache.transport.base import PROTOCOL, Op
    from tests.integration.support import Raw, frame_bytes, reserve_request

    keys = keys_of(1, "half")
    frame = frame_bytes(keys, value_of(keys.digests[0], NBYTES))
    with Raw(server) as raw:
        raw.ask(Op.JOIN, pb.JoinRequest(protocol=PROTOCOL))
        assert raw.answer()[0] == Op.JOIN
        raw.ask(Op.RESERVE, reserve_request(keys, [len(frame)]))
        assert raw.answer()[0] == Op.RESERVE
        raw.send(frame[: len(frame) // 2])
        eventually(lambda: counters_of(server.url).get("reservations") == 1, "it is being written")
        counters = kill(server)
    assert (counters["entries"], counters["bytes_used"], counters["reservations"]) == (0, 0, 0)


def test_tenants_keep_their_numbers_whatever_becomes_of_the_access_file(tmp_path: Path) -> None:
    def access(*tenants: str) -> str:
        from mmcache.server.access_edit import with_token
        from mmcache.server.grants import digest_of

        text = ""
        for tenant in tenants:
            text = with_token(text, tenant, digest_of(TOKENS[tenant]).hex(), admin=tenant == "ops")
        return write_access(tmp_path / "access.toml", text)

    with ServerProcess("16MiB", "--hold", "--access", access("a", "b", "ops")) as server:

        def client_of(tenant: str) -> Client:
            return mmcache.connect(server.url, token=TOKENS[tenant])

        with client_of("a") as a, client_of("b") as b:
            assert stores(a, count=10)
            assert stores(b, "kept of b", count=5)
        access("ops", "b", "a")
        before = children_of(server.pid)
        os.kill(before[0], signal.SIGKILL)
        eventually(lambda: children_of(server.pid) not in ([], before), "another one is started")

        def is_back() -> bool:
            with contextlib.suppress(TransportError), client_of("a") as a:
                return reads(a, count=10) == 10
            return False

        eventually(is_back, "a has its own")
        with client_of("a") as a, client_of("b") as b:
            assert (reads(b, count=10), reads(b, "kept of b", count=5), reads(a, "kept of b", count=5)) == (0, 5, 0)
            assert 10 * NBYTES < a.stat()["counters"]["bytes_used"] < 11 * NBYTES
            assert 5 * NBYTES < b.stat()["counters"]["bytes_used"] < 6 * NBYTES


def test_what_operators_stopped_stays_stopped(server: ServerProcess, cache: Client) -> None:
    assert stores(cache)
    assert run_cli("mode", "-c", server.url, "read").returncode == 0
    assert run_cli("mode", "-c", server.url, "off", "--namespace", "model=test/model").returncode == 0
    kill(server)
    told = json.loads(run_cli("mode", "-c", server.url, "--json").stdout)
    assert told["mode"] == "read"
    assert [rule["mode"] for rule in told["rules"]] == ["off"]
    assert reads(cache) == 0
    assert run_cli("mode", "-c", server.url, "both", "--namespace", "model=test/model").returncode == 0
    eventually(lambda: reads(cache) == COUNT, "it may be read again")


def test_times_to_live_go_on(server: ServerProcess, cache: Client) -> None:
    keys = keys_of(4, "mortal")
    began_s = time.monotonic()
    assert all(cache.put(keys[:2], values_of(keys[:2], NBYTES), ttl_s=10.0))
    assert all(cache.put(keys[2:], values_of(keys[2:], NBYTES), ttl_s=60.0))
    kill(server)
    there = eventually(
        lambda: (flags := cache.contains(keys))[2:] == [True] * 2 and flags, "those that live longer are there"
    )
    assert there[:2] == [True] * 2 or time.monotonic() > began_s + 10
    eventually(lambda: cache.contains(keys) == [False, False, True, True], "two have expired", 30)


def of_a_copy(folder: Path) -> ServerProcess:
    """A held server that runs a copy of the package, which may be changed."""
    shutil.copytree(ROOT / "mmcache", folder / "mmcache")
    return ServerProcess("16MiB", "--hold", environment={"PYTHONPATH": str(folder)}, under=("env", "-C", str(folder)))


def test_another_build_takes_the_place_of_one_that_serves(tmp_path: Path) -> None:
    """A copy of the package is changed while its server runs: an upgrade, then one that lays columns out otherwise."""
    with of_a_copy(tmp_path) as server, mmcache.connect(server.url) as cache:
        assert stores(cache)
        version = tmp_path / "mmcache/_version.py"
        version.write_text('"""The release."""\n\n__version__ = "99.0+another.build"\n')
        assert replace(server)["restored_entries"] == COUNT
        eventually(lambda: reads(cache) == COUNT, "it serves")
        assert cache.stat()["server"] == "mmcache/99.0+another.build"
        kept = tmp_path / "mmcache/store/kept.py"
        kept.write_text(kept.read_text().replace(f"LAYOUT: Final = {LAYOUT} ", "LAYOUT: Final = 1001 "))
        assert replace(server)["entries"] == 0
        eventually(lambda: stores(cache), "it stores")
        assert kill(server)["restored_entries"] == COUNT
        assert server.stop() == 0
    assert "was asked to make room for this one; 40 entries" in server.said
    assert f"this one starts empty: layout was {LAYOUT} and is 1001" in server.said


def test_servers_that_cannot_start_on_what_is_there_do_not_keep_the_next_from_starting(tmp_path: Path) -> None:
    with of_a_copy(tmp_path) as server, mmcache.connect(server.url) as cache:
        assert stores(cache)
        restore = tmp_path / "mmcache/store/restore.py"
        sound = restore.read_text()
        restore.write_text(
            sound.replace("    rows, extents = index", "    import os\n\n    os.abort()\n    rows, extents = index")
        )
        counters = replace(server)
        assert (counters["entries"], counters["restored_entries"]) == (0, 0)
        assert server.stop() == 0
    assert "starts empty: the last servers did not start on what was there" in server.said


def test_each_held_shard_comes_back_at_its_address() -> None:
    with ServerProcess("32MiB", "--shards", "2", "--hold") as server:
        holders, urls = children_of(server.pid), [shard["url"] for shard in server.shards]
        with mmcache.connect(urls[1]) as cache:
            assert stores(cache)
            for _ in range(2):
                (pid,) = children_of(holders[1])
                os.kill(pid, signal.SIGKILL)
                eventually(partial(came_back, holders[1], pid, urls[1]), "it is back")
                eventually(lambda: reads(cache) == COUNT, "with its entries")
        assert children_of(server.pid) == holders
        assert server.stop() == 0
    assert f"shard 1 is back at {urls[1]}, with {COUNT} entries" in server.said


def came_back(holder_pid: int, before: int, url: str) -> bool:
    return children_of(holder_pid) not in ([], [before]) and bool(counters_of(url))
