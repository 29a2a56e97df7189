"""`mmcache serve --shards N`: real processes that are found by their addresses, killed, and back again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import mmcache
from mmcache.errors import TransportError
from mmcache.server.supervisor import TICK_S
from mmcache.testing.process import ServerProcess, children_of, suspend
from tests.integration.support import MiB, blanks, eventually, keys_of, run_cli, values_of

NBYTES = 64 << 10
LOSES_ITS_PYTHON = """
import logging, os, signal, sys, threading, time
from pathlib import Path
from mmcache.config import ServerConfig
from mmcache.server.shard_plan import shard_configs
from mmcache.server.stops import STOP_SIGNALS
from mmcache.server.supervisor import Supervisor

said, python = [], sys.executable
def hear(record):
    said.append(record.getMessage())
    print(said[-1], file=sys.stderr)
    if "could not be started" in said[-1]:  # here, where nothing can come before it: once only
        sys.executable = python
    return False
logging.getLogger("mmcache.supervisor").addFilter(hear)
signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
supervisor = Supervisor(shard_configs(ServerConfig(listen="127.0.0.1:0", memory_nbytes=2 << 20, shards=2)))
supervisor.start()
sys.executable = "/no/such/python"
os.kill(int(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()[0]), signal.SIGKILL)
def act():
    while not any("is back" in line for line in said):
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=act, daemon=True).start()
supervisor.watch()
print(supervisor.stop())
"""


def started_again(server: ServerProcess, before: list[int], url: str) -> int:
    """The process id of the shard that was not there before, once it answers; 0 until then."""
    (new,) = set(children_of(server.pid)).difference(before) or (0,)
    return new if new and answers(url) else 0


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def answers(url: str) -> bool:
    try:
        with mmcache.connect(url) as cache:
            return bool(cache.stat()["server_id"])
    except TransportError:
        return False


def shards(*words: str) -> ServerProcess:
    return ServerProcess("48MiB", "--shards", "3", *words)


def test_each_shard_is_a_server_of_its_own() -> None:
    keys, buffers = keys_of(4, "shards"), blanks(4, NBYTES)
    with shards("--metrics", "127.0.0.1:0") as server:
        assert len(server.shards) == len(children_of(server.pid)) == 3
        for name in ("url", "unix_path", "metrics_url"):
            assert len({shard[name] for shard in server.shards}) == 3
        first, second, _ = (shard["url"] for shard in server.shards)
        with mmcache.connect(first) as cache, mmcache.connect(second) as other:
            assert cache.stat()["transport"] == "shm"
            assert cache.stat()["server_id"] != other.stat()["server_id"]
            assert all(cache.put(keys, values_of(keys, NBYTES)))
            assert all(cache.get_into(keys, buffers))
            assert all(map(np.array_equal, buffers, values_of(keys, NBYTES)))
            assert other.match_prefix(keys) == 0  # a client uses the shard it was given, and no other
        for place, shard in enumerate(server.shards):
            told = json.loads(run_cli("stat", "-c", shard["url"], "--json").stdout)["counters"]
            assert told["bytes_capacity"] == 16 * MiB == shard["memory_nbytes"]
            looked = json.loads(
                run_cli("top", "-c", shard["url"], "--count", "1", "--interval", "0.1", "--json").stdout
            )
            assert looked["gauges"]["entries"] == (4 if place == 0 else 0)
        processes = children_of(server.pid)
        assert server.stop() == 0
        assert all(map(gone, processes))
        assert not any(Path(shard["unix_path"]).exists() for shard in server.shards)
        assert server.said == ""


def test_a_shard_that_is_killed_comes_back_at_its_address_after_a_pause_that_grows(tmp_path: Path) -> None:
    keys, path = keys_of(2, "killed"), str(tmp_path / "s")
    with shards("--unix", path) as server:
        assert [shard["unix_path"] for shard in server.shards] == [f"{path}.{number}" for number in range(3)]
        urls = [shard["url"] for shard in server.shards]
        with mmcache.connect(urls[0]) as cache:
            assert all(cache.put(keys, values_of(keys, NBYTES)))
            victim = children_of(server.pid)[1]
            for _ in range(2):
                before = children_of(server.pid)
                with mmcache.connect(urls[1]) as other:
                    os.kill(victim, signal.SIGKILL)
                    eventually(partial(gone, victim), "the shard ended")
                    assert not any(other.get_into(keys, blanks(2, NBYTES)))  # a miss, not an exception
                victim = eventually(partial(started_again, server, before, urls[1]), "it is back")
            assert cache.match_prefix(keys) == 2  # the others went on
        assert server.stop() == 0
    assert server.said.count("shard 1 died (exit -9)") == 2
    assert "it is started again in 0.5 s" in server.said
    assert "it is started again in 1 s" in server.said
    assert f"shard 1 is back at {urls[1]}, empty" in server.said


def test_a_shard_that_cannot_be_started_again_is_tried_later() -> None:
    ended = subprocess.run([sys.executable, "-c", LOSES_ITS_PYTHON], capture_output=True, text=True, timeout=60)
    assert ended.stdout == "[]\n"
    died, failed, back = ended.stderr.splitlines()[:3]
    assert died == "shard 0 died (exit -9); it is started again in 0.5 s"
    assert failed.startswith("shard 0 could not be started (")
    assert failed.endswith("it is started again in 1 s")
    assert back.startswith("shard 0 is back at mmcache://127.0.0.1:")


def test_a_stop_that_comes_before_all_are_ready_is_heeded() -> None:
    words = ["--shards", "3", "--memory", "48MiB", "--listen", "127.0.0.1:0"]
    with subprocess.Popen([sys.executable, "-m", "mmcache", "serve", *words], stdout=subprocess.PIPE) as process:
        eventually(lambda: len(children_of(process.pid)) == 3, "all are started")
        processes = children_of(process.pid)
        process.terminate()
        assert process.wait(20) == 0
        assert all(map(gone, processes))


def test_ctrl_c_stops_all() -> None:
    with shards() as server:
        processes = children_of(server.pid)
        assert server.stop(signal.SIGINT) == 0
        assert all(map(gone, processes))


def test_a_shard_that_does_not_drain_is_killed_and_reported() -> None:
    with ServerProcess("48MiB", "--shards", "2", environment={"MMCACHE_DRAIN_S": "0.1"}) as server:
        stuck = children_of(server.pid)[0]
        os.kill(stuck, signal.SIGSTOP)
        assert server.stop() == 1
        assert gone(stuck)
    assert "shard 0 (exit -9)" in server.said


def test_a_supervisor_that_is_stopped_and_continued_goes_on() -> None:
    with shards() as server:
        processes = children_of(server.pid)
        suspend(server.pid)
        time.sleep(2 * TICK_S)
        os.kill(server.pid, signal.SIGCONT)
        time.sleep(3 * TICK_S)
        assert children_of(server.pid) == processes
        assert all(answers(one["url"]) for one in server.shards)
        assert server.stop() == 0


def test_shards_do_not_outlive_a_supervisor_that_was_killed() -> None:
    with shards() as server:
        processes = children_of(server.pid)
        server.stop(signal.SIGKILL)
        eventually(lambda: all(map(gone, processes)), "the shards ended")


def test_if_one_cannot_start_none_stays() -> None:
    for _ in range(5):  # the port before that of another server may be somebody's, too
        with ServerProcess("1MiB") as server:
            port = int(server.url.rpartition(":")[2])
            words = ["--shards", "2", "--memory", "2MiB", "--listen", f"127.0.0.1:{port - 1}", "--json"]
            command = [sys.executable, "-m", "mmcache", "serve", *words]
            ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if f"cannot listen on 127.0.0.1:{port - 1}" not in ended.stderr:
            break
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert f"cannot listen on 127.0.0.1:{port}" in ended.stderr
    assert "shard 1 did not start (exit 1); what it said stands above" in ended.stderr


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--shards", "0"], 2, "it must be 1 to 256"),
        (["--shards", "4", "--metrics", "127.0.0.1:7602"], 2, "would want the same port"),
        (["--shards", "4", "--memory", "900TiB"], 1, "give it less (--memory"),
    ],
)
def test_shards_that_cannot_be_are_refused_before_any_is_started(words: list[str], code: int, says: str) -> None:
    ended = run_cli("serve", "--memory", "64MiB", *words)
    assert (ended.returncode, ended.stdout) == (code, "")
    assert says in ended.stderr
