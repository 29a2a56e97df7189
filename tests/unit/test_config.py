"""Settings: sizes, addresses, URLs and the environment; and that a bad one is an error that says what to write."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmcache.config import (
    DEFAULT_PORT,
    ClientConfig,
    GiB,
    KiB,
    MiB,
    ServerConfig,
    parse_host_port,
    parse_nbytes,
    parse_url,
    server_config,
)
from mmcache.errors import ConfigError


# ------------------------------------------------------------------------------------------ sizes
@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("0", 0),
        ("512", 512),
        (512, 512),
        ("64kb", 64_000),
        ("64KiB", 64 * KiB),
        ("1.5 MiB", 3 * MiB // 2),
        (" 2 gib ", 2 * GiB),
        ("1TB", 10**12),
        ("1tib", 1 << 40),
        ("7b", 7),
    ],
)
def test_sizes(text: str | int, nbytes: int) -> None:
    assert parse_nbytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "1 GB 2", "-1", "1e9", "1PiB", "0x10", "1,5GiB", "nan", "inf", "1_000"])
def test_what_is_no_size_says_how_to_write_one(text: str) -> None:
    with pytest.raises(ConfigError, match="for example 512MiB"):
        parse_nbytes(text)


@given(st.text(max_size=20))
def test_any_text_is_a_size_or_a_config_error(text: str) -> None:
    with contextlib.suppress(ConfigError):
        assert parse_nbytes(text) >= 0


# ------------------------------------------------------------------------------------------ HOST:PORT
@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("127.0.0.1:7601", ("127.0.0.1", 7601)),
        ("localhost", ("localhost", DEFAULT_PORT)),
        ("[::1]:9", ("::1", 9)),
        ("0.0.0.0:0", ("0.0.0.0", 0)),
    ],
)
def test_host_and_port(text: str, found: tuple[str, int]) -> None:
    assert parse_host_port(text) == found


@pytest.mark.parametrize("text", ["", ":7600", "host:port", "host:70000", "host:-1", "a/b", "u@h:1", "h:1?x", "[::1"])
def test_what_is_no_host_and_port(text: str) -> None:
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1:7600"):
        parse_host_port(text)


# ------------------------------------------------------------------------------------------ URLs
@pytest.mark.parametrize(
    ("url", "settings"),
    [
        ("mmcache://10.0.0.1:7601", {"host": "10.0.0.1", "port": 7601}),
        ("mmcache://box", {"host": "box"}),
        ("mmcache://[::1]:1/", {"host": "::1", "port": 1}),
        ("mmcache+unix:///run/mmcache.sock", {"scheme": "mmcache+unix", "path": "/run/mmcache.sock"}),
        ("embedded://?memory=64MiB", {"scheme": "embedded", "memory_nbytes": 64 * MiB}),
        ("embedded://", {"scheme": "embedded"}),
        ("mmcache://h?transport=tcp&deadline_s=0.5", {"host": "h", "transport": "tcp", "deadline_s": 0.5}),
        ("mmcache://127.0.0.1?transport=shm", {"transport": "shm"}),
        ("mmcache://h?verify=false&max_connections=2", {"host": "h", "verify": False, "max_connections": 2}),
        ("mmcache://h?verify=YES&connect_s=3", {"host": "h", "verify": True, "connect_s": 3.0}),
    ],
)
def test_urls(url: str, settings: dict[str, Any]) -> None:
    assert parse_url(url) == ClientConfig(**settings)


def test_a_keyword_is_stronger_than_the_url_and_none_says_nothing() -> None:
    config = parse_url("mmcache://h?deadline_s=3&verify=1", deadline_s=1.0, verify=None)
    assert (config.deadline_s, config.verify) == (1.0, True)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "scheme"),
        ("h:7600", "scheme"),
        ("http://h:7600", "scheme 'http'; use mmcache://HOST:PORT"),
        ("mmcache://", "is not mmcache://HOST:PORT"),
        ("mmcache:///path", "is not mmcache://HOST:PORT"),
        ("mmcache://h/path", "is not mmcache://HOST:PORT"),
        ("mmcache://h:port", "is not a URL"),
        ("mmcache://h:99999", "is not a URL"),
        ("mmcache://[::1", "is not a URL"),
        ("mmcache://user:secret@h", "user, password or fragment"),
        ("mmcache://h#x", "user, password or fragment"),
        ("mmcache+unix://host/path", "a host where none belongs"),
        ("mmcache+unix:", "no absolute path"),
        ("mmcache+unix:path", "no absolute path"),
        ("embedded://host", "a host where none belongs"),
        ("embedded:///path", "a host where none belongs"),
        ("mmcache://h?deadline=1", "unknown option 'deadline'"),
        ("mmcache://h?host=x", "unknown option 'host'"),
        ("mmcache://h?deadline_s=soon", "deadline_s is 'soon', which is not a valid float"),
        ("mmcache://h?deadline_s=", "deadline_s is ''"),
        ("mmcache://h?verify=maybe", "verify is 'maybe', which is not a valid bool"),
        ("mmcache://h?max_connections=2.5", "not a valid int"),
        ("embedded://?memory=lots", "for example 512MiB"),
        ("mmcache://h?transport=rdma", "use auto, shm, tcp, nixl or grpc"),
        ("mmcache://h?transport=grpc", "names no port"),
        ("mmcache+unix:///a.sock?transport=grpc", "the port of serve --grpc"),
        ("embedded://?transport=grpc", "the port of serve --grpc"),
        ("mmcache://h?transport=shm", "on this host, not h"),
        ("mmcache://h?deadline_s=0", "must be greater than 0"),
        ("mmcache://h?deadline_s=-1", "must be greater than 0"),
        ("mmcache://h?deadline_s=nan", "must be greater than 0"),
        ("mmcache://h?connect_s=0", "must be greater than 0"),
        ("mmcache://h?max_connections=0", "must be greater than 0"),
    ],
)
def test_bad_urls_say_what_is_wrong(url: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_url(url)
    assert message in str(caught.value)


# ------------------------------------------------------------------------------------------ the environment
def test_the_environment_and_then_the_command_line() -> None:
    environ = {
        "MMCACHE_MEMORY": "2GiB",
        "MMCACHE_LISTEN": "127.0.0.1:0",
        "MMCACHE_LEASE_S": "2.5",
        "MMCACHE_PREFAULT": "yes",
        "MMCACHE_MAX_BATCH_KEYS": "64",
        "MMCACHE_MAX_BODY_NBYTES": "1MiB",
        "HOME": "ignored",
    }
    config = server_config(environ, lease_s=9.0, listen=None)
    assert config == ServerConfig(
        memory_nbytes=2 * GiB,
        listen="127.0.0.1:0",
        lease_s=9.0,
        prefault=True,
        max_batch_keys=64,
        max_body_nbytes=MiB,
    )
    assert server_config({}) == ServerConfig()


def test_every_server_setting_has_a_variable() -> None:
    texts = {"bool": "1", "str": "127.0.0.1:1", "int": "65536", "float": "0.5"}
    for field in dataclasses.fields(ServerConfig):
        room = {"MMCACHE_MAX_BODY_NBYTES": "16MiB", "MMCACHE_MAX_BATCH_KEYS": "64"}
        if field.name.startswith("tls_"):
            room |= {"MMCACHE_TLS_CERT": "c", "MMCACHE_TLS_KEY": "k"}
        if field.name in ("advertise", "weight"):
            room |= {"MMCACHE_JOIN": "mmcache+redis://127.0.0.1"}
        text = {"policy": "lru", "mode": "off", "log": "json", "shards": "4"}.get(field.name, texts[str(field.type)])
        found = getattr(server_config(room | {f"MMCACHE_{field.name.upper()}": text}), field.name)
        assert str(found) in ("True", "127.0.0.1:1", "65536", "0.5", "lru", "off", "json", "4")


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("MMCACHE_MEMROY", "1GiB", "MMCACHE_MEMROY is not a setting; MMCACHE_ goes before ACCESS_FILE"),
        ("MMCACHE_", "1", "is not a setting"),
        ("MMCACHE_MEMORY", "lots", "MMCACHE_MEMORY"),
        ("MMCACHE_LEASE_S", "long", "MMCACHE_LEASE_S is 'long', which is not a valid float"),
        ("MMCACHE_PREFAULT", "2", "not a valid bool"),
        ("MMCACHE_MAX_ENTRIES", "1.5", "not a valid int"),
        ("MMCACHE_LEASE_S", "0", "lease_s is 0.0; it must be greater than 0"),
        ("MMCACHE_LEASE_S", "nan", "greater than 0"),
        ("MMCACHE_POLICY", "LRU", "policy is 'LRU'; it must be one of value, lru, s3-fifo"),
    ],
)
def test_a_bad_variable_is_named(variable: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        server_config({variable: value})
    assert message in str(caught.value)


# ------------------------------------------------------------------------------------------ limits
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory_nbytes": 0}, "memory_nbytes is 0"),
        ({"memory_nbytes": -1}, "memory_nbytes is -1"),
        ({"memory_nbytes": 65535}, "the least is 64KiB"),
        ({"max_connections": 0}, "max_connections is 0"),
        ({"max_batch_keys": 0}, "max_batch_keys is 0"),
        ({"max_body_nbytes": -5}, "max_body_nbytes is -5"),
        ({"max_inline_nbytes": 0}, "max_inline_nbytes"),
        ({"max_inflight_nbytes": 0}, "max_inflight_nbytes"),
        ({"max_grpc_nbytes": 0}, "max_grpc_nbytes"),
        ({"max_grpc_nbytes": GiB + 1}, "at most 1GiB"),
        ({"io_timeout_s": 0}, "io_timeout_s"),
        ({"max_entries": -1}, "cannot be negative"),
        ({"drain_s": -0.1}, "cannot be negative"),
        ({"pinned_share": 0}, "above 0 and at most 1"),
        ({"pinned_share": 1.01}, "above 0 and at most 1"),
        ({"pinned_share": float("nan")}, "above 0 and at most 1"),
        ({"alignment": 0}, "power of two from 64 to 65536"),
        ({"alignment": 32}, "power of two"),
        ({"alignment": 96}, "power of two"),
        ({"alignment": 131072}, "power of two"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ServerConfig(**settings)
    assert message in str(caught.value)


def test_one_batch_may_not_fill_the_memory() -> None:
    assert ServerConfig(memory_nbytes=GiB, max_inline_nbytes=MiB).max_batch_nbytes == MiB
    assert ServerConfig(memory_nbytes=GiB, max_inline_nbytes=8 * GiB).max_batch_nbytes <= GiB // 2


def test_entries_follow_from_the_memory_unless_given() -> None:
    assert ServerConfig(memory_nbytes=GiB).entries == 65536
    assert ServerConfig(memory_nbytes=MiB).entries == 1024
    assert ServerConfig(max_entries=5).entries == 5
