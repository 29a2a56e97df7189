"""A cluster's URL taken apart, and several shards' answers put together."""

from __future__ import annotations

import pytest

from mmcache.client.cluster_answers import answered, explained, mode_of, recent_of, stat_of
from mmcache.client.cluster_shard import shard_config
from mmcache.client.cluster_steps import RESTING, together
from mmcache.cluster.settings import ABSENT_S, ClusterConfig, is_cluster, parse_any_url, parse_cluster_url
from mmcache.cluster.urls import open_membership
from mmcache.errors import ConfigError, ProtocolError, TransportError
from mmcache.pb import cache_pb2 as pb
from mmcache.transport.base import Outcome, Result
from mmcache.why import Why

TWO = "mmcache://a:7600,b:7601"


# ------------------------------------------------------------------------------------------ URLs
@pytest.mark.parametrize(
    ("url", "cluster"),
    [
        (TWO, True),
        ("mmcaches://a,b?ca=/x", True),
        ("mmcache://[::1]:1,[::1]:2", True),
        ("mmcache+redis://127.0.0.1:6379/0?cluster=x", True),
        ("mmcache+rediss+sentinel://h1,h2/master/0", True),
        ("mmcache+k8s://ns/service?port=mmcache", True),
        ("mmcache://a:7600", False),
        ("mmcache://a:7600?token_file=/x,y", False),
        ("mmcache+unix:///a,b.sock", False),
        ("embedded://?memory=1GiB", False),
        ("a,b", False),
    ],
)
def test_what_names_a_cluster(url: str, cluster: bool) -> None:
    assert is_cluster(url) == cluster


def test_each_option_goes_to_whom_it_is_for() -> None:
    config = parse_cluster_url(
        "mmcache+redis://h:6379/0?cluster=x&replicas=2&transport=tcp&absent_s=0&ramp_s=7&port=p", deadline_s=0.5
    )
    assert (config.members, config.scheme) == ("mmcache+redis://h:6379/0?cluster=x&port=p", "mmcache+redis")
    assert config.settings == {"deadline_s": 0.5, "transport": "tcp"}
    assert (config.client.deadline_s, config.client.transport) == (0.5, "tcp")
    assert (config.replicas.default, config.absent_s, config.ramp_s) == (2, 0.0, 7.0)
    plain = parse_any_url(TWO)
    assert isinstance(plain, ClusterConfig)
    assert (plain.members, plain.settings, plain.absent_s) == (TWO, {}, ABSENT_S)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        (f"{TWO}?replicas=none", "has no count"),
        (f"{TWO}?absent_s=soon", "give seconds"),
        (f"{TWO}?absent_s=61", "must be 0 to 60"),
        (f"{TWO}?ramp_s=nan", "must be 0 to 86400"),
        (f"{TWO}?deadline_s=0", "greater than 0"),
        (f"{TWO}?transport=pigeon", "unknown"),
        (f"{TWO}?token=secret", "does not belong in a URL"),
        (f"{TWO}?ca=/x", "are for TLS"),
        ("mmcache://[::1,b:7600", "in brackets"),
        ("mmcache+redis://[bad/0?cluster=x", "in brackets"),
    ],
)
def test_a_cluster_url_of_nonsense_says_what_to_do(url: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_cluster_url(url)


@pytest.mark.parametrize("url", [f"{TWO}?colour=red", "mmcache://a:7600,", "mmcache://a:7600,a:7600", "mmcache://,"])
def test_members_of_nonsense_are_an_error(url: str) -> None:
    with pytest.raises(ConfigError):
        open_membership(parse_cluster_url(url).members)


def test_a_shard_is_reached_as_the_cluster_says_unless_its_address_says_otherwise() -> None:
    settings = {"deadline_s": 0.5, "transport": "tcp"}
    config = shard_config("mmcache://h:1?deadline_s=2", settings)
    assert (config.host, config.port, config.deadline_s, config.transport) == ("h", 1, 2.0, "tcp")
    assert shard_config("h:7", {}).port == 7
    with pytest.raises(ConfigError, match="cannot be reached"):
        shard_config("embedded://", {})
    with pytest.raises(ConfigError, match="are for TLS"):
        shard_config("mmcache://h:1", {"ca": "/x"})


# ------------------------------------------------------------------------------------------ answers
STORED, PRESENT = Result(Outcome.STORED), Result(Outcome.PRESENT)
FULL, GONE = Result(Outcome.REFUSED, "no room"), Result(Outcome.UNAVAILABLE, "silence")


@pytest.mark.parametrize(
    ("answers", "result"),
    [
        ({"a": STORED, "b": STORED}, STORED),
        ({"a": PRESENT, "b": STORED}, STORED),
        ({"a": PRESENT, "b": PRESENT}, PRESENT),
        ({"a": GONE, "b": STORED}, Result(Outcome.STORED, "not on a: silence")),
        ({"a": FULL, "b": PRESENT}, Result(Outcome.PRESENT, "not on a: no room")),
        ({"a": GONE, "b": FULL}, FULL),
        ({"a": GONE}, GONE),
        ({}, RESTING),
    ],
)
def test_a_put_is_what_its_best_owner_says(answers: dict[str, Result], result: Result) -> None:
    assert together(("a", "b"), answers) == result


def told(*rows: tuple[Why, float, int, int]) -> pb.ExplainReply:
    why, ago_s, put_status, children = zip(*rows, strict=True)
    return pb.ExplainReply(why=bytes(why), ago_s=ago_s, put_status=bytes(put_status), children=children)


def test_of_several_reasons_the_one_that_knows_most_is_told() -> None:
    never, here = (Why.NEVER_STORED, -1.0, 0, 0), (Why.HERE, 3.0, 0, 5)
    old, recent = (Why.EVICTED, 90.0, 0, 0), (Why.REFUSED, 2.0, 4, 0)
    replies = [told(never, old, never), told(here, never, never), told(recent, recent, never)]
    assert explained(replies) == told(here, recent, never)
    with pytest.raises(ProtocolError, match="different numbers"):
        explained([told(here), told(here, here)])


def test_other_answers_of_operators() -> None:
    recent = [pb.RecentReply(misses=[pb.Miss(ago_s=ago_s) for ago_s in times]) for times in ((1, 5), (2, 3))]
    assert [miss.ago_s for miss in recent_of(recent, 3)] == [1, 2, 3]
    modes = [pb.ModeReply(mode=mode) for mode in (pb.BOTH, pb.OFF, pb.READ)]
    assert mode_of(modes).mode == pb.OFF


def test_statistics_are_added_up_and_an_error_stands_for_its_shard() -> None:
    one = {"server": "mmcache/1", "server_id": "x", "uptime_s": 5.0, "transport": "tcp", "counters": {"hits": 2}}
    other = one | {"uptime_s": 3.0, "transport": "shm", "counters": {"hits": 1, "misses": 4}}
    stat = stat_of({"a": one, "b": other, "c": TransportError("silence")})
    assert stat["counters"] == {"hits": 3, "misses": 4}
    assert (stat["uptime_s"], stat["transport"], stat["shards"]["c"]) == (3.0, "shm, tcp", "silence")
    with pytest.raises(TransportError, match=r"none of 1 shards answers \(c: silence\)"):
        answered({"c": TransportError("silence")})
