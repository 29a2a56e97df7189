"""Membership by a real Redis: joining, leaving, being killed, and Redis itself killed, emptied and full of nonsense."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import multiprocessing
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

import mmcache
from mmcache.client.cluster import ClusterClient
from mmcache.cluster import redis_members
from mmcache.cluster.beats import BEAT_S, MAX_BEAT_NBYTES, TTL_S
from mmcache.cluster.membership import Watched
from mmcache.cluster.redis_link import RedisLink
from mmcache.cluster.registration import Registration
from mmcache.cluster.seen import CONFIRM_S
from mmcache.cluster.urls import open_membership, parse_members_url
from mmcache.connect import GATHER_S
from mmcache.errors import ConfigError, TransportError
from tests.integration.members_bed import becomes, ids, leave, stays, watched
from tests.integration.redis_bed import Redis, registered, url_of
from tests.integration.support import eventually, in_time

pytestmark = pytest.mark.usefixtures("patient_with_redis")

GONE_S = TTL_S + CONFIRM_S + 3.0


@pytest.fixture
def there() -> Iterator[Redis]:
    with Redis() as one:
        yield one


@pytest.fixture
def no_poll(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is seen in time is seen because somebody was woken."""
    monkeypatch.setattr(redis_members, "POLL_S", 600.0)


@pytest.mark.usefixtures("no_poll")
def test_who_joins_is_in_at_once_and_who_leaves_is_out_at_once(there: Redis) -> None:
    url = url_of(there)
    servers = registered(url, 1, 2)
    with watched(url) as members:
        assert ids(members) == ["1", "2"]
        view = members.view()
        assert view is members.view()
        servers += registered(url, 3)
        becomes(members, "1", "2", "3")
        assert servers[0].leave()
        becomes(members, "2", "3")
        assert [one.why for one in members.seen.left_out] == ["draining"]
        servers[0].gone()
        eventually(lambda: not members.seen.left_out, "it is forgotten")
        assert members.counters["view_changes"] == 2
        leave(servers[1:])
        stays(lambda: ids(members) != [], 0.5)  # nobody is there: the last view goes on
    with pytest.raises(TransportError, match="no server has joined cluster 'test' of Redis at 127"):
        open_membership(url)


@pytest.mark.usefixtures("no_poll")
def test_a_change_takes_no_longer_than_to_be_woken(there: Redis) -> None:
    url, numbers = url_of(there), itertools.count(2)
    servers = registered(url, 1)
    with watched(url) as members:

        def seen_s() -> float:
            number = next(numbers)
            newcomer = registered(url, number)
            joined_s = becomes(members, "1", str(number))
            newcomer[0].leave()
            left_s = becomes(members, "1")
            newcomer[0].gone()
            return max(joined_s, left_s)

        in_time(seen_s, 2.0)
    leave(servers)


def test_who_is_stopped_without_a_word_is_out_after_a_time_and_no_sooner(there: Redis) -> None:
    url, numbers = url_of(there), itertools.count(1)

    def gone_s() -> float:
        dies, stays_on = str(next(numbers)), str(next(numbers))
        servers = registered(url, int(dies), int(stays_on))
        with watched(url) as members:
            servers[0]._leaving = True  # its thread ends and says nothing, as after SIGKILL
            servers[0]._wake.set()
            stays(lambda: ids(members) == sorted([dies, stays_on]), TTL_S - 2.5)
            took_s = becomes(members, stays_on, patience_s=2 * GONE_S)
        leave(servers[1:])
        return took_s

    in_time(gone_s, GONE_S)


@pytest.mark.alone
def test_redis_killed_and_back_empty_changes_no_view(
    there: Redis, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert CONFIRM_S >= 2 * BEAT_S
    confirm_s = 2 * CONFIRM_S  # also where the machine stands still while the servers say it again
    monkeypatch.setattr("mmcache.cluster.seen.CONFIRM_S", confirm_s)
    url = url_of(there)
    servers = registered(url, 1, 2, 3)
    with watched(url) as members:
        view = members.view()
        there.kill()
        stays(lambda: members.view() is view, 3.0)
        with pytest.raises(TransportError, match=r"does not do as asked: .*Connection refused.*start it, or correct"):
            open_membership(url)
        there.start()
        stays(lambda: members.view() is view, confirm_s + 1.0)
        assert members.counters["source_losses"] == 1
        assert members.counters["view_changes"] == 0
        servers += registered(url, 4)
        becomes(members, "1", "2", "3", "4")
        client = there.client()

        def is_kept() -> bool:
            client.publish("mmcache:{test}:changed", b"")  # so that it looks while the servers say it one by one
            return len(ids(members)) == 4

        client.flushall()
        stays(is_kept, confirm_s + 1.0)
    lost = [record.getMessage() for record in caplog.records if "is lost, the last view goes on" in record.getMessage()]
    assert len(lost) == 1  # once, not for each try
    leave(servers)


def test_a_redis_that_hangs_delays_nobody(there: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # WAIT_S is what it is
    url = url_of(there)
    servers = registered(url, 1)

    def views_s() -> float:
        """Of who has not met a Redis that hangs before."""
        with watched(url) as members:
            there.signal(signal.SIGSTOP)
            began_s = time.monotonic()
            for _ in range(1000):
                members.view()
            took_s = time.monotonic() - began_s
            there.signal(signal.SIGCONT)
        return took_s

    def hangs_s() -> float:
        began_s = time.monotonic()
        with pytest.raises(TransportError, match="does not do as asked"):
            open_membership(url)
        return time.monotonic() - began_s

    in_time(views_s, 0.5)
    with watched(url) as members:
        there.signal(signal.SIGSTOP)
        in_time(hangs_s, 5.5)
        there.signal(signal.SIGCONT)
        servers += registered(url, 2)
        becomes(members, "1", "2")
    leave(servers)


def test_a_server_starts_without_redis_and_joins_when_it_is_there(caplog: pytest.LogCaptureFixture) -> None:
    with Redis() as there:
        url = url_of(there)
        there.kill()
        tried: list[Registration] = []

        def starts_s() -> float:
            leave(tried[-1:])
            tried.append(Registration(parse_members_url(url), id="a", address="mmcache://a:1", weight=1.0))
            began_s = time.monotonic()
            tried[-1].start(3.0)
            return time.monotonic() - began_s

        in_time(starts_s, 3.5)
        one = tried[-1]
        eventually(lambda: "start it, or correct the URL" in one.why_not, "it knows that Redis is not there")
        assert "is not told of this server, it is tried again" in caplog.text
        there.start()
        eventually(lambda: not one.why_not, "it has joined")
        with watched(url) as members:
            assert ids(members) == ["a"]
        there.kill()
        eventually(lambda: one.why_not, "it knows that Redis is gone")
        began_s = time.monotonic()
        assert not one.leave()  # and does not wait for it
        one.gone()
        assert time.monotonic() - began_s < 5.0


def test_with_a_fallback_clients_start_without_redis_and_go_over_to_it() -> None:
    with Redis() as there:
        url = url_of(there, "&fallback=127.0.0.1:7,127.0.0.1:8")
        there.kill()
        with watched(url) as members:
            assert ids(members) == ["7", "8"]
            there.start()
            servers = registered(url_of(there), 1)
            becomes(members, "1")
        leave(servers)


def test_nonsense_in_redis_is_left_out_said_and_no_harm(there: Redis, caplog: pytest.LogCaptureFixture) -> None:
    url = url_of(there)
    servers = registered(url, 1)
    client, prefix = there.client(), "mmcache:{test}:"

    def plant(said: bytes) -> None:
        client.zadd(f"{prefix}beats", {said: time.time_ns() // 10**6 + 5000})  # it stays for a while

    good = json.loads(client.zrange(f"{prefix}beats", 0, 0)[0])
    plant(b"\xff\x00")
    plant(b"x" * (8 * MAX_BEAT_NBYTES))  # passed over
    plant(json.dumps(good | {"id": "w", "weight": -1}).encode())
    plant(json.dumps(good | {"id": "new", "schema": 2}).encode())
    plant(json.dumps(good | {"id": "old", "frame": 0}).encode())
    plant(json.dumps(good | {"id": "s", "address": "mmcache+unix:///run/x"}).encode())
    client.sadd(f"{prefix}drained", b"\xff", "x" * 10000)
    with watched(url) as members:
        assert ids(members) == ["1"]
        why = {one.id: one.why for one in members.seen.left_out}
        assert why.keys() == {"?", "w", "new", "old", "s"}
        assert "is no weight" in why["w"]
        assert "schema 2, this release reads 1" in why["new"]
        assert "frames v0" in why["old"]
        assert members.counters["left_out"] == 5
        assert "new (mmcache://127.0.0.1:1) is left out: its heartbeat has schema 2" in caplog.text
    leave(servers)


def test_who_was_heard_of_in_a_time_to_come_is_not_in_for_as_long(there: Redis) -> None:
    """The clock was put back by an hour, or another Redis took over; a server that died was not heard of since."""
    url = url_of(there)
    servers = registered(url, 1)
    client, beats = there.client(), "mmcache:{test}:beats"
    dead = json.loads(client.zrange(beats, 0, 0)[0]) | {"id": "127.0.0.1:2", "address": "mmcache://127.0.0.1:2"}
    client.zadd(beats, {json.dumps(dead): time.time_ns() // 10**6 + 3_600_000})
    with watched(url) as members:
        assert ids(members) == ["1"]
        eventually(lambda: client.zcard(beats) == 1, "it is dropped")
    leave(servers)


@pytest.mark.usefixtures("no_poll")
def test_a_burst_of_changes_is_looked_at_a_few_times(there: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when all servers of a large cluster start: each wakes every client."""
    url, looks, seen = url_of(there), [], RedisLink.seen

    def counted(self: RedisLink, connection: Any) -> Any:
        if threading.current_thread().name == "mmcache-members":
            looks.append(time.monotonic())
        return seen(self, connection)

    monkeypatch.setattr(RedisLink, "seen", counted)
    servers = registered(url, 1)
    with watched(url) as members:
        eventually(lambda: looks, "it follows")
        time.sleep(0.5)
        before = len(looks)
        burst = there.client().pipeline(transaction=True)  # a machine that stops us would spread it over seconds
        for _ in range(200):
            burst.publish("mmcache:{test}:changed", b"")
        assert burst.execute() == [1] * 200
        servers += registered(url, 2)
        becomes(members, "1", "2")
        time.sleep(2.0)
        assert len(looks) - before <= 10
    leave(servers)


def test_what_is_of_another_type_in_redis_is_an_error_and_then_the_last_view(there: Redis) -> None:
    url = url_of(there)
    servers = registered(url, 1)
    with watched(url) as members:
        there.client().delete("mmcache:{test}:beats")
        there.client().set("mmcache:{test}:beats", "not a sorted set")
        eventually(lambda: members.counters["source_losses"], "it is noticed")
        assert ids(members) == ["1"]
        with pytest.raises(TransportError, match="WRONGTYPE"):
            open_membership(url)
    leave(servers)


def test_two_servers_with_one_id_are_told_to_all_and_the_last_one_is_used(
    there: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    url = url_of(there)
    old = registered(url, 1, address="mmcache://127.0.0.1:11")
    time.sleep(0.01)
    new = registered(url, 1, address="mmcache://127.0.0.1:12")
    with watched(url) as members, caplog.at_level(logging.WARNING):
        assert [member.address for member in members.view().members] == ["mmcache://127.0.0.1:12"]
        eventually(lambda: members.counters["problems"], "it is counted", 20.0)
        eventually(lambda: any(one.levelno == logging.ERROR for one in caplog.records), "the server says it", 20.0)
        assert "two servers go by the id 127.0.0.1:1 (mmcache://127.0.0.1:11 and mmcache://127.0.0.1:12)" in caplog.text
    leave(old + new)


@pytest.mark.usefixtures("no_poll")
def test_drained_is_out_until_it_is_undone_whether_it_restarts_or_not(there: Redis) -> None:
    url = url_of(there)
    servers = registered(url, 1, 2)
    link = RedisLink(parse_members_url(url))
    with watched(url) as members, link.open() as connection:
        link.drain(connection, "127.0.0.1:1", undo=False)
        becomes(members, "2")
        leave(servers[:1])
        servers[:1] = registered(url, 1)
        stays(lambda: ids(members) == ["2"], 0.5)
        link.drain(connection, "127.0.0.1:1", undo=True)
        becomes(members, "1", "2")
    leave(servers)


def test_clusters_of_other_names_and_databases_are_others(there: Redis) -> None:
    servers = registered(url_of(there), 1)
    for url in (url_of(there).replace("test", "other"), url_of(there).replace("/0", "/1")):
        with pytest.raises(TransportError, match="no server has joined"):
            open_membership(url)
    leave(servers)


def _follow_in_a_child(members: Watched, out: Any) -> None:
    out.send(ids(members))
    eventually(lambda: ids(members) == ["1", "2"], "the child's view follows")
    out.send(ids(members))


def test_a_forked_child_follows_by_itself(there: Redis) -> None:
    url = url_of(there)
    servers = registered(url, 1)
    with watched(url) as members:
        hear, say = multiprocessing.Pipe(duplex=False)
        child = multiprocessing.get_context("fork").Process(target=_follow_in_a_child, args=(members, say))
        child.start()
        assert hear.recv() == ["1"]
        servers += registered(url, 2)
        assert hear.poll(30.0)
        assert hear.recv() == ["1", "2"]
        child.join(5.0)
        becomes(members, "1", "2")
    leave(servers)


def test_close_ends_the_thread_and_the_last_view_stays(there: Redis) -> None:
    url = url_of(there)
    servers = registered(url, 1)
    others = set(threading.enumerate())
    with watched(url) as members:
        (thread,) = (one for one in set(threading.enumerate()) - others if one.name == "mmcache-members")
    thread.join(20.0)
    assert not thread.is_alive()
    assert ids(members) == ["1"]
    leave(servers)


# ------------------------------------------------------------------------------------------ a client that starts
def test_a_client_that_starts_while_redis_hears_of_its_servers_waits_for_as_many_as_its_replicas(there: Redis) -> None:
    url = url_of(there)
    with contextlib.ExitStack() as stack:
        stack.callback(leave, registered(url, 7601))

        def join() -> None:
            time.sleep(0.3)
            stack.callback(leave, registered(url, 7602))

        thread = threading.Thread(target=join)
        thread.start()
        with mmcache.connect(f"{url}&replicas=2", lazy=True) as cache:
            assert isinstance(cache, ClusterClient)
        thread.join()

        def refused_s() -> float:
            began_s = time.monotonic()
            with pytest.raises(ConfigError, match="replicas=3 needs as many shards, and there are 2"):
                mmcache.connect(f"{url}&replicas=3", lazy=True)
            took_s = time.monotonic() - began_s
            assert took_s >= GATHER_S
            return took_s

        in_time(refused_s, GATHER_S + 2)
