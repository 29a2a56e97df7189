"""The command line against a real server: stat, inspect, version, and how each fails."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime

import numpy as np
import pytest

import mmcache
from mmcache import __version__
from mmcache.config import ServerConfig, parse_nbytes, server_config
from mmcache.errors import ConfigError
from mmcache.keyset import Keys
from mmcache.testing.process import ServerProcess
from tests.integration.support import NAMESPACE, ROOT, run_cli


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess("16MiB") as process:
        yield process


@pytest.fixture(scope="module")
def stored(server: ServerProcess) -> Keys:
    keys = NAMESPACE.block_keys(range(48))
    with mmcache.connect(server.url) as cache:
        assert all(cache.put(keys, [{"k": np.ones((2, 3), np.float32), "v": np.empty(0, np.int8)}] * 3, ttl_s=3600))
        assert cache.match_prefix(keys) == 3
    return keys


def test_stat_as_json_and_as_a_table(server: ServerProcess, stored: Keys) -> None:
    ended = run_cli("stat", "--connect", server.url, "--json")
    assert ended.returncode == 0
    report = json.loads(ended.stdout)
    assert report["counters"]["entries"] == report["counters"]["stored"] == 3
    assert report["transport"] == "shm"
    assert len(report["server_id"]) == 32
    assert report["uptime_s"] > 0
    table = run_cli("stat", "-c", server.url)
    assert table.returncode == 0
    assert "bytes_capacity" in table.stdout
    assert "16.0 MiB" in table.stdout
    assert f"mmcache/{__version__}, up " in table.stdout
    narrow = run_cli("stat", "-c", server.url, environment={"COLUMNS": "40"})
    assert "expired_reservations" in narrow.stdout


def test_inspect_explains_an_entry(server: ServerProcess, stored: Keys) -> None:
    ended = run_cli("inspect", stored[1].hex(), "-c", server.url, "--json")
    assert ended.returncode == 0
    found = json.loads(ended.stdout)
    assert found["key"] == stored[1].hex()
    assert found["parent"] == stored[0].hex()
    assert found["kind"] == "kv"
    assert found["index"] == 1
    assert found["expires_ms"] == found["created_ms"] + 3_600_000
    assert found["writer"] == f"mmcache/{__version__}"
    assert found["namespace_facts"] == dict(NAMESPACE.facts)
    assert [(t["name"], t["dtype"], t["shape"], t["nbytes"]) for t in found["tensors"]] == [
        ("k", "float32", [2, 3], 24),
        ("v", "int8", [0], 0),
    ]
    text = run_cli("inspect", stored[1].hex(), "-c", server.url)
    assert text.returncode == 0
    assert "k: float32[2, 3] 24 bytes" in text.stdout
    facts = [line.strip() for line in text.stdout.partition("namespace_facts:")[2].splitlines() if line]
    assert facts == sorted(f"{name} = {value}" for name, value in NAMESPACE.facts.items())
    assert list(found["namespace_facts"]) == sorted(found["namespace_facts"])
    created = datetime.fromtimestamp(found["created_ms"] / 1000, UTC).isoformat(timespec="milliseconds")
    assert f"created_ms: {found['created_ms']} ({created})" in text.stdout


def test_inspecting_what_is_not_stored_ends_with_1(server: ServerProcess) -> None:
    ended = run_cli("inspect", "ab" * 32, "-c", server.url)
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert "is not stored" in ended.stderr
    assert "been evicted or belong to another namespace: make the key again" in ended.stderr


@pytest.mark.parametrize("key", ["xyz", "ab" * 31, "ab" * 33, ""])
def test_what_is_no_key_ends_with_2(server: ServerProcess, key: str) -> None:
    ended = run_cli("inspect", key, "-c", server.url)
    assert ended.returncode == 2
    assert "64 hexadecimal digits" in ended.stderr


def test_version_as_json_and_as_text() -> None:
    ended = run_cli("version", "--json")
    assert ended.returncode == 0
    parts = json.loads(ended.stdout)
    assert parts["mmcache"] == __version__
    assert parts.keys() >= {"python", "platform", "numpy", "protobuf", "blake3", "xxhash"}
    assert f"mmcache {__version__}" in run_cli("version").stdout
    assert run_cli("--version").stdout == f"mmcache {__version__}\n"


BAD_URLS = [
    ("http://127.0.0.1:7600", "mmcache://HOST:PORT"),
    ("127.0.0.1:7600", "mmcache://HOST:PORT"),
    ("mmcache://", "mmcache://HOST:PORT"),
    ("mmcache://127.0.0.1:port", "is not a URL"),
    ("mmcache://127.0.0.1:70000", "is not a URL"),
    ("mmcache://[::1", "is not a URL"),
    ("mmcache://127.0.0.1/path", "mmcache://HOST:PORT"),
    ("mmcache://me:secret@127.0.0.1", "user, password"),
    ("mmcache://127.0.0.1?speed=fast", "unknown option 'speed'"),
    ("mmcache://127.0.0.1?transport=pigeon", "auto, shm, tcp, nixl or grpc"),
    ("embedded://?transport=nixl", "a process of its own"),
    ("mmcache://10.0.0.1?transport=shm", "use auto or tcp"),
    ("mmcache://127.0.0.1?deadline_s=soon", "deadline_s"),
    ("mmcache://127.0.0.1?deadline_s=-1", "greater than 0"),
    ("mmcache://127.0.0.1?deadline_s=nan", "greater than 0"),
    ("mmcache://127.0.0.1?deadline_s=inf", "deadline_s"),
    ("mmcache://127.0.0.1?connect_s=1e300", "connect_s"),
    ("mmcache://127.0.0.1?verify=maybe", "verify"),
    ("mmcache+unix://host/path", "no"),
    ("mmcache+unix:relative", "absolute path"),
    ("embedded://?memory=much", "not a size"),
    ("embedded://?memory=1", "64KiB"),
    ("embedded://somewhere", "names a host"),
]


@pytest.mark.parametrize(("url", "says"), BAD_URLS)
def test_a_bad_url_names_what_is_wrong_and_what_to_write(url: str, says: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        mmcache.connect(url)
    assert says in str(refusal.value)


@pytest.mark.parametrize("command", [["stat"], ["inspect", "ab" * 32]])
@pytest.mark.parametrize(("url", "says"), [BAD_URLS[0], BAD_URLS[8], BAD_URLS[11]])
def test_a_bad_url_on_the_command_line_ends_with_2(command: list[str], url: str, says: str) -> None:
    ended = run_cli(*command, "-c", url)
    assert ended.returncode == 2
    assert says in ended.stderr
    assert "Traceback" not in ended.stderr


def test_no_server_ends_with_1_and_the_remedy() -> None:
    ended = run_cli("stat", "-c", "mmcache://127.0.0.1:1")
    assert ended.returncode == 1
    assert "mmcache serve" in ended.stderr
    assert "Traceback" not in ended.stderr
    ended = run_cli("stat", "-c", "mmcache+unix:///no/such.sock")
    assert ended.returncode == 1
    assert "mmcache serve" in ended.stderr


COMMANDS: list[list[str]] = [[], ["serve"], ["stat"], ["inspect"], ["version"], ["bench"], ["bench", "media"]]
COMMANDS += [["bench", "serve"], ["size"], ["token"], ["token", "new"], ["token", "list"], ["token", "revoke"]]
COMMANDS += [["up"], ["cluster"], ["cluster", "status"], ["cluster", "where"], ["cluster", "drain"]]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command: list[str]) -> None:
    ended = run_cli(*command, "--help")
    assert ended.returncode == 0
    assert "Examples: mmcache" in ended.stdout


def test_the_help_of_serve_tells_every_default_and_environment_variable() -> None:
    text = " ".join(run_cli("serve", "--help", environment={"COLUMNS": "400"}).stdout.split())
    told = {variable: default for default, variable in re.findall(r"\(default: ([^;]+); MMCACHE_(\w+)\)", text)}
    assert told == {
        "LISTEN": ServerConfig().listen,
        "UNIX_PATH": ServerConfig().unix_path,
        "MEMORY": "1.0 GiB",
        "SHARDS": "1",
        "MAX_ENTRIES": "0",
        "ALIGNMENT": "64",
        "PREFAULT": "off",
        "HUGE_PAGES": "off",
        "HOLD": "off",
        "LEASE_S": "30.0",
        "POLICY": "value",
        "MAX_CONNECTIONS": "256",
        "INSECURE_NETWORK": "off",
        "METRICS": "none",
        "MODE": "both",
        "LOG": "text",
        "GRPC": "none",
        "ACCESS_FILE": "none",
        "TLS_CERT": "none",
        "TLS_KEY": "none",
        "TLS_CLIENT_CA": "none",
        "NIXL": "none",
        "JOIN": "none",
        "ADVERTISE": "none",
        "WEIGHT": "0.0",
    }
    assert parse_nbytes(told["MEMORY"]) == ServerConfig().memory_nbytes
    server_config({f"MMCACHE_{name}": {"off": "no", "none": ""}.get(value, value) for name, value in told.items()})


def test_a_counter_of_a_fresh_server_is_a_number() -> None:
    with ServerProcess("1MiB") as fresh:
        counters = json.loads(run_cli("stat", "-c", fresh.url, "--json").stdout)["counters"]
    assert counters["hits"] == counters["misses"] == counters["evictions"] == 0


def test_without_a_suitable_python_make_says_what_to_do() -> None:
    make = ["make", "VENV=no-such-venv", "PYTHON=/bin/false", "demo"]
    ended = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert "error: /bin/false is no working Python" in ended.stdout
    assert "make PYTHON=/path/to/python" in ended.stdout
