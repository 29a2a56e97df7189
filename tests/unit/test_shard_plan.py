"""What each of several shards is given: ports that count up, an even share, all other settings as they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mmcache.config import GiB, ServerConfig, server_config
from mmcache.errors import ConfigError
from mmcache.server.shard_plan import LONGEST_PAUSE_S, environment_of, pause_s, shard_configs, where_it_is

CONFIG = ServerConfig(
    listen="127.0.0.1:7600", metrics="[::1]:9600", grpc="localhost:7700", unix_path="/run/mmcache.sock", shards=3,
    memory_nbytes=3 * GiB, max_entries=300, prefault=True, lease_s=12.5, log="json", mode="read",
)  # fmt: skip


def test_ports_and_paths_count_up_and_memory_is_split_evenly() -> None:
    found = shard_configs(CONFIG)
    assert [one.listen for one in found] == ["127.0.0.1:7600", "127.0.0.1:7601", "127.0.0.1:7602"]
    assert [one.metrics for one in found] == ["[::1]:9600", "[::1]:9601", "[::1]:9602"]
    assert [one.grpc for one in found] == ["localhost:7700", "localhost:7701", "localhost:7702"]
    assert [one.unix_path for one in found] == [f"/run/mmcache.sock.{number}" for number in range(3)]
    for one in found:
        assert (one.shards, one.memory_nbytes, one.max_entries) == (1, GiB, 100)
        assert (one.prefault, one.lease_s, one.log, one.mode) == (True, 12.5, "json", "read")


def test_what_a_cluster_is_told_counts_up_and_is_split_too() -> None:
    joined = replace(CONFIG, join="mmcache+redis://r", advertise="mmcache://h:7000", weight=6.0)
    found = shard_configs(joined)
    assert [one.advertise for one in found] == [f"mmcache://h:{port}" for port in (7000, 7001, 7002)]
    assert [(one.join, one.weight) for one in found] == [("mmcache+redis://r", 2.0)] * 3
    assert {one.advertise for one in shard_configs(replace(joined, advertise="mmcache://h"))} == {"mmcache://h"}


def test_ports_that_are_picked_and_places_that_are_none_stay() -> None:
    for one in shard_configs(replace(CONFIG, listen="127.0.0.1:0", metrics="", grpc="127.0.0.1:0", unix_path="auto")):
        assert (one.listen, one.metrics, one.grpc, one.unix_path) == ("127.0.0.1:0", "", "127.0.0.1:0", "auto")


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"metrics": "127.0.0.1:7602"}, "listen 127.0.0.1:7600 and metrics 127.0.0.1:7602 would want the same port"),
        ({"listen": "localhost:7702"}, "listen localhost:7702 and grpc localhost:7700 would want the same port"),
        ({"listen": "127.0.0.1:65534"}, "no port for shard 2 from 127.0.0.1:65534 on"),
        ({"memory_nbytes": 100 << 10}, "the least is 64KiB"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(changed: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        shard_configs(replace(CONFIG, **changed))


@pytest.mark.parametrize("shards", [0, -1, 257])
def test_so_many_shards_are_refused(shards: int) -> None:
    with pytest.raises(ConfigError, match="it must be 1 to 256"):
        ServerConfig(shards=shards)


def test_the_environment_says_every_setting_and_nothing_else() -> None:
    for config in (ServerConfig(), CONFIG, *shard_configs(CONFIG)):
        assert server_config(environment_of(config)) == config


def test_a_shard_comes_back_to_the_ports_it_had() -> None:
    picked = replace(CONFIG, listen="127.0.0.1:0", metrics="127.0.0.1:0", grpc="[::1]:0")
    ready = {
        "url": "mmcaches://127.0.0.1:4001",
        "metrics_url": "http://127.0.0.1:4002/metrics",
        "grpc_address": "[::1]:3",
    }
    found = where_it_is(picked, ready)
    assert (found.listen, found.metrics, found.grpc) == ("127.0.0.1:4001", "127.0.0.1:4002", "[::1]:3")
    assert replace(found, listen=picked.listen, metrics=picked.metrics, grpc=picked.grpc) == picked
    silent = replace(CONFIG, listen="", metrics="", grpc="")
    assert where_it_is(silent, {"url": "mmcache+unix:///run/x"}) == silent


def test_pauses_grow_and_end() -> None:
    pauses = [pause_s(deaths) for deaths in range(1, 100)]
    assert pauses[:4] == [0.5, 1.0, 2.0, 4.0]
    assert pauses == sorted(pauses)
    assert pauses[-1] == LONGEST_PAUSE_S
