"""Membership decided: what a set of heartbeats means, what is believed over time, and what URLs say."""

from __future__ import annotations

import json
import math
import multiprocessing
import sys
import threading
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmcache.cluster.beats import MAX_BEAT_NBYTES, Beat, NoBeat, draining, parse_beat, who_is_in
from mmcache.cluster.membership import LONGEST_PAUSE_S, Pauses, Tell, Watched
from mmcache.cluster.placement import Member, View
from mmcache.cluster.seen import CONFIRM_S, LeftOut, Roster, Seen, check_address, check_id, check_weight
from mmcache.cluster.urls import MembersUrl, open_membership, parse_members_url, redis_url
from mmcache.errors import ConfigError
from mmcache.testing.values import eventually
from tests.unit.threads import without_threads


def beat_of(id_: str = "a:1", **changed: Any) -> Beat:
    fields: dict[str, Any] = {
        "id": id_,
        "address": f"mmcache://{id_}",
        "weight": 2.0,
        "registration": "0" * 32,
        "since_ms": 1000,
    }
    return Beat(**(fields | changed))


IDS = st.sampled_from(["a:1", "b:1", "c:1", "d:1"])
BEATS = st.builds(
    lambda id_, registration, **others: beat_of(id_, registration=f"{registration:032x}", **others),
    IDS, st.integers(0, 1 << 64), since_ms=st.integers(0, 5),
    state=st.sampled_from(["serving", "draining"]), weight=st.floats(0.1, 100),
)  # fmt: skip


# ------------------------------------------------------------------------------------------ one heartbeat
@given(BEATS)
def test_a_heartbeat_comes_back_as_it_was_said(beat: Beat) -> None:
    assert len(beat.pack()) <= MAX_BEAT_NBYTES
    assert parse_beat(beat.pack()) == beat


def test_fields_of_later_releases_are_no_harm() -> None:
    said = json.loads(beat_of().pack()) | {"zone": "eu-1"}
    assert parse_beat(json.dumps(said).encode()) == beat_of()


BAD_FIELDS: list[tuple[str, Any, str]] = [
    ("schema", 2, "schema 2"),
    ("schema", None, "schema None"),
    ("id", "", "is no id"),
    ("id", "x\ty", "is no id"),
    ("id", 7, "is no id"),
    ("address", "embedded://", "is no address"),
    ("address", "mmcache+unix:///run/x", "is no address"),
    ("address", "mmcache://a:1?token_file=/etc/shadow", "is no address"),
    ("address", "mmcache://a:1/x", "is no address"),
    ("address", "mmcache://me@a:1", "is no address"),
    ("address", "mmcache://a:1,b:2", "is no address"),
    ("address", "mmcache://a", "is no address"),
    ("address", "mmcache://a:99999", "is no address"),
    ("address", ["mmcache://a:1"], "is no address"),
    ("weight", 0, "is no weight"),
    ("weight", -1, "is no weight"),
    ("weight", "1", "is no weight"),
    ("weight", True, "is no weight"),
    ("weight", math.nan, "is no weight"),
    ("weight", math.inf, "is no weight"),
    ("weight", 10**400, "is no weight"),
    ("weight", "\x1b[2J\nERROR all is lost", "is no weight"),
    ("registration", None, "is no id"),
    ("since_ms", -1, "not a whole number"),
    ("since_ms", 1 << 80, "not a whole number"),
    ("frame", 1.5, "not a whole number"),
    ("protocol", "2", "not a whole number"),
    ("state", "asleep", "not one of"),
    ("state", ["serving"], "not one of"),
]


@pytest.mark.parametrize(("name", "value", "says"), BAD_FIELDS)
def test_a_heartbeat_with_nonsense_is_left_out_with_its_name(name: str, value: Any, says: str) -> None:
    data = json.dumps(json.loads(beat_of().pack()) | {name: value}).encode()
    with pytest.raises(NoBeat) as refused:
        parse_beat(data)
    assert says in refused.value.left_out.why
    assert refused.value.left_out.why.isprintable()  # it goes to logs
    if name != "id":
        assert refused.value.left_out.id == "a:1"


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"\xff", b"{", b"[" * 4000, b" " * 5000 + b"{}"])
def test_what_is_no_heartbeat_at_all_is_refused(data: bytes) -> None:
    with pytest.raises(NoBeat):
        parse_beat(data)


@given(st.binary(max_size=200) | st.from_type(dict[str, int]).map(lambda found: json.dumps(found).encode()))
def test_any_bytes_are_refused_in_one_way(data: bytes) -> None:
    with pytest.raises(NoBeat):
        parse_beat(data)


# ------------------------------------------------------------------------------------------ who is in
HEARD = st.lists(st.tuples(BEATS, st.integers(0, 9)), unique_by=lambda heard: heard[0].registration)


@given(HEARD, st.frozensets(IDS), st.randoms())
def test_who_is_in_does_not_depend_on_order_and_makes_a_view(
    heard: list[tuple[Beat, int]], drained: frozenset[str], mix: Any
) -> None:
    seen = who_is_in(heard, drained)
    mix.shuffle(heard)
    again = who_is_in(heard, drained)
    assert sorted(again.members) == sorted(seen.members)
    assert again.problems == seen.problems
    ids = [member.id for member in seen.members]
    assert len(set(ids)) == len(ids)
    assert drained.isdisjoint(ids)
    assert {*ids, *(one.id for one in seen.left_out)} == {beat.id for beat, _ in heard}
    if ids:
        View(seen.members)
    for member in seen.members:
        of_it = [beat for beat, _ in heard if beat.id == member.id]
        newest = max(of_it, key=lambda one: (one.since_ms, one.registration))
        assert (member.address, member.weight, newest.state) == (newest.address, newest.weight, "serving")


OLD = beat_of(address="mmcache://old:1", since_ms=1000)
NEW = beat_of(address="mmcache://new:1", registration="1" * 32, since_ms=9000)


def test_of_two_with_one_id_the_one_that_came_last_is_in_and_it_is_said() -> None:
    seen = who_is_in([(NEW, 9000), (OLD, 9001)])
    assert [member.address for member in seen.members] == ["mmcache://new:1"]
    assert len(seen.problems) == 1
    assert "two servers go by the id a:1 (mmcache://old:1 and mmcache://new:1)" in seen.problems[0]


def test_a_restart_is_not_taken_for_two() -> None:
    assert not who_is_in([(OLD, 8999), (NEW, 20000)]).problems  # it was heard of last before the new one came
    assert not who_is_in([(draining(OLD), 9500), (NEW, 9500)]).problems


@pytest.mark.parametrize("changed", [{"frame": 2}, {"protocol": 9, "oldest_protocol": 8}, {"protocol": 0}])
def test_a_server_that_clients_of_this_release_cannot_use_is_left_out_and_it_is_said(changed: dict[str, int]) -> None:
    seen = who_is_in([(beat_of("b:1", **changed), 1), (beat_of(), 1)])
    assert [member.id for member in seen.members] == ["a:1"]
    assert [one.id for one in seen.left_out] == ["b:1"]
    assert "upgrade the older" in seen.left_out[0].why


def test_a_newer_server_that_still_speaks_our_protocol_is_in() -> None:
    assert len(who_is_in([(beat_of(protocol=3, oldest_protocol=2), 1)]).members) == 1


# ------------------------------------------------------------------------------------------ over time
A, B = Member("a", "mmcache://a:1"), Member("b", "mmcache://b:1")


def test_who_is_only_missing_stays_until_that_is_confirmed() -> None:
    roster = Roster()
    assert roster.update(Seen((A, B)), 0.0).members == (A, B)
    assert roster.next_s(0.0) is None
    assert roster.update(Seen((A,)), 10.0).members == (A, B)
    assert roster.next_s(11.0) == CONFIRM_S - 1
    assert roster.update(Seen((A,)), 10.0 + CONFIRM_S).members == (A,)
    assert roster.next_s(20.0) is None


def test_an_emptied_source_moves_nothing() -> None:
    roster = Roster()
    roster.update(Seen((A, B)), 0.0)
    assert roster.update(Seen(), 1.0).members == (A, B)
    assert roster.update(Seen((B,)), 2.0).members == (A, B)
    assert roster.update(Seen((A, B)), 1.0 + CONFIRM_S).members == (A, B)
    assert roster.update(Seen((B,)), 20.0).members == (A, B)  # it begins anew


def test_while_the_source_is_lost_nobody_is_given_up() -> None:
    roster = Roster()
    roster.update(Seen((A, B)), 0.0)
    roster.update(Seen((B,)), 1.0)
    roster.lost()
    assert roster.update(Seen((B,)), 100.0).members == (A, B)
    assert roster.update(Seen((B,)), 100.0 + CONFIRM_S).members == (B,)


def test_goodbye_is_believed_at_once_and_so_is_a_new_address() -> None:
    roster = Roster()
    roster.update(Seen((A, B)), 0.0)
    assert roster.update(Seen((B,), (LeftOut("a", A.address, "draining"),)), 0.1).members == (B,)
    moved = replace(B, address="mmcache://b:2")
    assert roster.update(Seen((moved,)), 0.2).members == (moved,)


@given(st.lists(st.tuples(st.frozensets(st.sampled_from("abc")), st.floats(0, 3)), min_size=1))
def test_a_member_is_believed_exactly_while_it_was_seen_within_the_time(
    steps: list[tuple[frozenset[str], float]],
) -> None:
    roster, now_s = Roster(), 0.0
    believed: set[str] = set()
    missing_since: dict[str, float] = {}
    for ids, pause_s in steps:
        now_s += pause_s
        for id_ in believed - ids:
            missing_since.setdefault(id_, now_s)
        for id_ in ids:
            missing_since.pop(id_, None)
        believed = {id_ for id_ in believed | ids if id_ in ids or now_s - missing_since[id_] < CONFIRM_S}
        missing_since = {id_: since for id_, since in missing_since.items() if id_ in believed}
        seen = roster.update(Seen(tuple(Member(id_, f"mmcache://{id_}:1") for id_ in ids)), now_s)
        assert {member.id for member in seen.members} == believed


def test_pauses_grow_to_the_longest_and_are_not_all_alike() -> None:
    pauses = Pauses()
    found = [pauses.next_s() for _ in range(200)]
    assert max(found) <= LONGEST_PAUSE_S
    assert min(found[20:]) >= LONGEST_PAUSE_S / 2
    assert len(set(found[20:])) > 100
    pauses.reset()
    assert pauses.next_s() < LONGEST_PAUSE_S / 4


# ------------------------------------------------------------------------------------------ who follows
class Nobody:
    """A source where nothing changes."""

    def look(self) -> Seen:
        return Seen((Member("a:1", "mmcache://a:1"),))

    def follow(self, tell: Tell, stopping: threading.Event) -> None:
        tell(self.look())
        stopping.wait()


def followers() -> int:
    """Of this module's tests and of others': one that was closed is there for a moment yet."""
    return sum(one.name == "mmcache-members" for one in threading.enumerate())


def test_in_a_forked_child_one_thread_follows_however_many_ask_first() -> None:
    def asked_at_once(say: Any) -> None:
        sys.setswitchinterval(1e-6)
        ready = threading.Barrier(16)
        threads = [threading.Thread(target=lambda: (ready.wait(), members.view())) for _ in range(16)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
        say.send(followers())

    members = Watched(Nobody(), "nobody")
    fork = multiprocessing.get_context("fork")
    try:
        for _ in range(40):
            hear, say = fork.Pipe(duplex=False)
            child = fork.Process(target=asked_at_once, args=(say,))
            child.start()
            assert hear.recv() == 1
            child.join()
    finally:
        members.close()


def test_where_no_thread_can_be_had_the_view_is_answered_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    eventually(lambda: not followers(), "those of other tests have ended")
    with monkeypatch.context() as patch:
        without_threads(patch)
        members = Watched(Nobody(), "nobody")
        assert [member.id for member in members.view().members] == ["a:1"]
    assert followers() == 0
    assert members.view() is members.view()
    assert followers() == 1
    members.close()


# ------------------------------------------------------------------------------------------ URLs
def test_what_urls_say() -> None:
    assert parse_members_url("mmcache://a:1,b") == MembersUrl(kind="static", hosts=(("a", 1), ("b", 7600)))
    found = parse_members_url("mmcache+rediss://me@h/3?cluster=prod&password_file=p&fallback=a,b:1")
    assert (found.kind, found.hosts, found.tls, found.user, found.db) == ("redis", (("h", 6379),), True, "me", 3)
    assert (found.name, found.fallback) == ("prod", (("a", 7600), ("b", 1)))
    found = parse_members_url("mmcache+redis+sentinel://a,b:1/main/2")
    assert (found.kind, found.hosts, found.master, found.db) == ("sentinel", (("a", 26379), ("b", 1)), "main", 2)
    found = parse_members_url("mmcache+redis+cluster://a,b:1")
    assert (found.kind, found.hosts, found.name) == ("cluster", (("a", 6379), ("b", 1)), "mmcache")
    found = parse_members_url("mmcache+k8s://ns/cache?port=mm&tls=true")
    assert (found.kind, found.namespace, found.service, found.options["port"]) == ("k8s", "ns", "cache", "mm")
    assert found.scheme == "mmcaches"


BAD_URLS = [
    ("mmcache+redis://:hunter2@h", "a password does not belong in a URL"),
    ("mmcache+redis://me:hunter2@h/0", "a password does not belong in a URL"),
    ("mmcache+redis://h?password=hunter2", "a password does not belong in a URL"),
    ("mmcache+redis://:hun/hunter2@h/0", "a password does not belong in a URL"),
    ("mmcache+redis://:hun#hunter2@h/0", "a password does not belong in a URL"),
    ("mmcache+redis://:hun?hunter2@h/0", "a password does not belong in a URL"),
    ("mmcache+redis://:hunter2[@h/0", "cannot be read"),
    ("mmcache+redis://a,b", "say mmcache+redis+sentinel or mmcache+redis+cluster"),
    ("mmcache+redis://h/zero", "no database number"),
    ("mmcache+redis://h/0/1", "no database number"),
    ("mmcache+redis://h:port", "is not HOST:PORT"),
    ("mmcache+redis://", "is not HOST:PORT"),
    ("mmcache+redis://h#x", "fragment"),
    ("mmcache+redis://h?cluster={x}", "is no name"),
    ("mmcache+redis://h?tls=maybe", "neither true nor false"),
    ("mmcache+redis://h?speed=1", "unknown option 'speed'"),
    ("mmcache://a,b?cluster=x", "unknown option 'cluster'"),
    ("mmcache+redis+sentinel://a,b", "which master"),
    ("mmcache+redis+cluster://a/1", "has only one"),
    ("mmcache+k8s://ns", "is not mmcache+k8s://NAMESPACE/SERVICE"),
    ("mmcache+k8s://ns/a/b", "is not mmcache+k8s://NAMESPACE/SERVICE"),
    ("mmcache+etcd://h", "names no cluster"),
    ("mmcache://a:1,a:1", "names one server twice"),
    ("mmcache://a:0,b:1", "port 0"),
    ("mmcache://me@a,b", "a user"),
    ("mmcache://a,b/x", "names no cluster"),
    ("mmcache+redis://" + ",".join(f"h{n}" for n in range(300)), "256 is the most"),
]


@pytest.mark.parametrize(("url", "says"), BAD_URLS)
def test_a_bad_url_says_what_is_wrong_and_no_secret(url: str, says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_members_url(url)
    assert says in str(refused.value)
    assert "hunter2" not in str(refused.value)


def test_a_list_is_one_view_for_ever() -> None:
    members = open_membership("mmcaches://a:1,[::1]:2")
    view = members.view()
    assert view is members.view()
    assert view.members == (Member("[::1]:2", "mmcaches://[::1]:2"), Member("a:1", "mmcaches://a:1"))
    members.close()
    assert members.view() is view


@pytest.mark.parametrize(
    ("url", "library", "module"),
    [
        ("mmcache+redis://127.0.0.1:1", "redis", "mmcache.cluster.redis_link"),
        ("mmcache+k8s://ns/cache", "kubernetes", "mmcache.cluster.kubernetes_members"),
    ],
)
def test_without_its_extra_the_error_says_which(
    url: str, library: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    for name in (module, "mmcache.cluster.redis_members"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ConfigError, match=r"pip install 'mmcache\[(cluster|kubernetes)\]'"):
        open_membership(url)


def test_urls_of_redis_become_ours() -> None:
    assert redis_url("redis://h:1/2", "") == "mmcache+redis://h:1/2"
    assert redis_url("rediss://h?password_file=p", "prod") == "mmcache+rediss://h?password_file=p&cluster=prod"
    assert redis_url("mmcache+redis+cluster://a,b", "x") == "mmcache+redis+cluster://a,b?cluster=x"
    with pytest.raises(ConfigError, match="is no Redis URL"):
        redis_url("http://h", "")


@given(st.text(max_size=40))
def test_any_text_is_an_id_address_or_an_error(text: str) -> None:
    for check in (check_id, check_address):
        try:
            assert check(text) == text
        except ConfigError:
            continue
    with pytest.raises(ConfigError):
        check_weight(text)


@given(st.text(max_size=60))
def test_any_url_parses_or_says_why_not(rest: str) -> None:
    for scheme in ("mmcache", "mmcache+redis", "mmcache+redis+sentinel", "mmcache+k8s"):
        try:
            parse_members_url(f"{scheme}://{rest}")
        except ConfigError:
            continue
