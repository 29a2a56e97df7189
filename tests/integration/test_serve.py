"""The server process as an operator meets it: ready line, exit codes, errors with a remedy, drain, unix sockets."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import mmcache
from mmcache.errors import TransportError
from mmcache.pb import cache_pb2 as pb
from mmcache.testing.process import ServerProcess
from mmcache.transport.base import Op, Outcome
from tests.integration.support import Raw, blanks, eventually, frame_bytes, keys_of, run_cli, value_of, values_of


def fails(*words: str, code: int, says: list[str], environment: dict[str, str] | None = None) -> None:
    """`mmcache serve WORDS` ends by itself with this code, saying all of this on stderr and nothing on stdout."""
    ended = run_cli("serve", "--memory", "1MiB", *words, environment=environment)
    assert ended.returncode == code, ended.stderr
    assert ended.stdout == ""
    assert "Traceback" not in ended.stderr
    for words_said in says:
        assert words_said in ended.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--memory", "lots"], ["'lots' is not a size", "512MiB"]),
        (["--memory", "1KiB"], ["1024 bytes", "64KiB"]),
        (["--memory", "9" * 400 + "GiB"], ["not a size"]),
        (["--listen", "127.0.0.1:99999"], ["HOST:PORT"]),
        (["--listen", "127.0.0.1:http"], ["HOST:PORT"]),
        (["--listen", "no.such.host.invalid:0"], ["no.such.host.invalid"]),
        (["--listen", "0.0.0.0:0"], ["--access", "--tls-cert", "--insecure-network", "127.0.0.1"]),
        (["--listen", "[::]:0"], ["--insecure-network"]),
        (["--listen", "", "--unix", ""], ["--listen", "--unix"]),
        (["--lease-s", "0"], ["lease_s", "greater than 0"]),
        (["--lease-s", "nan"], ["lease_s"]),
        (["--lease-s", "inf"], ["lease_s"]),
        (["--lease-s", "soon"], ["--lease-s"]),
        (["--max-connections", "-1"], ["max_connections"]),
        (["--max-entries", "-1"], ["max_entries"]),
        (["--alignment", "100"], ["alignment", "power of two"]),
        (["--no-such-option"], ["--no-such-option"]),
    ],
)
def test_a_setting_that_cannot_work_ends_with_2_and_says_why(words: list[str], says: list[str]) -> None:
    fails("--listen", "127.0.0.1:0", *words, code=2, says=says)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("MMCACHE_MEMROY", "1GiB", "MMCACHE_MEMROY is not a setting"),
        ("MMCACHE_IO_TIMEOUT_S", "quick", "MMCACHE_IO_TIMEOUT_S"),
        ("MMCACHE_IO_TIMEOUT_S", "inf", "io_timeout_s"),
        ("MMCACHE_PREFAULT", "perhaps", "MMCACHE_PREFAULT"),
        ("MMCACHE_PINNED_SHARE", "1.5", "pinned_share"),
        ("MMCACHE_DRAIN_S", "-1", "drain_s"),
    ],
)
def test_an_environment_that_cannot_work_ends_with_2_and_says_why(name: str, value: str, says: str) -> None:
    fails(code=2, says=[says], environment={name: value})


def test_more_memory_than_there_is_ends_with_1_and_names_the_limit() -> None:
    fails("--listen", "127.0.0.1:0", "--memory", "900TiB", code=1, says=["give it less (--memory", "MiB that"])


def test_a_port_in_use_ends_with_1_and_the_remedy() -> None:
    with ServerProcess("1MiB") as server:
        listen = server.url.removeprefix("mmcache://")
        fails("--listen", listen, code=1, says=[listen, "in use", "choose another --listen"])
        with mmcache.connect(server.url) as cache:
            assert cache.stat()["counters"]["entries"] == 0


def test_the_ready_line_is_json_and_true() -> None:
    command = [sys.executable, "-m", "mmcache", "serve", "--listen", "127.0.0.1:0", "--memory", "2MiB", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        assert ready["ready"] is True
        assert ready["memory_nbytes"] == 2 << 20
        with mmcache.connect(ready["url"]) as cache:
            assert cache.stat()["transport"] == "shm"
        mode = os.stat(ready["unix_path"]).st_mode
        assert stat.S_ISSOCK(mode)
        assert mode & 0o077 == 0
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert process.stdout.read() == ""
    assert not Path(ready["unix_path"]).parent.exists()


def test_a_running_put_ends_before_a_drained_server_does() -> None:
    keys = keys_of(1, "late")
    frame = frame_bytes(keys, value_of(keys.digests[0], 200_000))
    server = ServerProcess("16MiB", environment={"MMCACHE_DRAIN_S": "20", "MMCACHE_IO_TIMEOUT_S": "20"}).start()
    address = server.url.removeprefix("mmcache://")
    codes: list[int] = []
    with Raw(server) as writer, Raw(server) as idle, mmcache.connect(server.url) as cache:
        writer.join()
        idle.join()
        assert writer.reserve(keys, [len(frame)]) == bytes([pb.WANTED])
        writer.send(frame[:100_000])
        stopping = threading.Thread(target=lambda: codes.append(server.stop(timeout_s=30)))
        stopping.start()
        assert idle.closed_by_peer()
        eventually(lambda: not accepts(address), "new connections are refused")
        assert not codes
        writer.send(frame[100_000:])
        assert writer.put_done() == bytes([pb.STORED])
        assert writer.closed_by_peer()
        stopping.join()
        assert cache.match_prefix(keys) == 0
    assert codes == [0]
    assert server.said == ""


def test_a_put_that_never_ends_does_not_hold_a_drained_server_up() -> None:
    keys = keys_of(1, "never")
    server = ServerProcess("16MiB", environment={"MMCACHE_DRAIN_S": "0.3"}).start()
    with Raw(server) as writer:
        writer.join()
        assert writer.reserve(keys, [100_000]) == bytes([pb.WANTED])
        assert server.stop(timeout_s=9) == 0  # well before the 10 s a connection may stay silent
    assert server.said == ""


@pytest.mark.parametrize("shards", [[], ["--shards", "2"]], ids=["one", "two"])
def test_a_stop_signal_that_a_librarys_thread_takes_ends_a_server_as_any_other_does(shards: list[str]) -> None:
    """The kernel gives it to whichever thread has it not blocked: numpy's, while the main one does something else."""
    server = ServerProcess("16MiB", *shards).start()
    others = {int(name) for name in os.listdir(f"/proc/{server.pid}/task")} - {server.pid}
    open_to = [one for one in others if not blocks(server.pid, one, signal.SIGTERM)]
    kill = ctypes.CDLL(None).tgkill
    assert any(kill(server.pid, one, signal.SIGTERM) == 0 for one in [*open_to, server.pid])
    process = server.process
    assert process is not None
    process.wait(9)
    assert process.returncode == 0
    server.stop()
    assert server.said == ""


def blocks(pid: int, thread: int, number: int) -> bool:
    """Whether that thread does; one that has ended meanwhile can take no signal either."""
    try:
        status = Path(f"/proc/{pid}/task/{thread}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    (mask,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigBlk:"))
    return bool(int(mask, 16) >> (number - 1) & 1)


def accepts(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), 5).close()
    except OSError:
        return False
    return True


def test_a_unix_socket_left_by_a_killed_server_is_taken_over(tmp_path: Path) -> None:
    path = str(tmp_path / "shard.sock")
    first = ServerProcess("1MiB", "--unix", path).start()
    assert first.unix_path == path
    first.stop(signal.SIGKILL)
    assert os.path.exists(path)
    with ServerProcess("1MiB", "--unix", path), mmcache.connect(f"mmcache+unix://{path}") as cache:
        assert cache.stat()["transport"] == "shm"
    assert not os.path.exists(path)


def test_a_unix_socket_in_use_is_left_alone(tmp_path: Path) -> None:
    path = str(tmp_path / "shard.sock")
    with ServerProcess("1MiB", "--unix", path):
        fails("--listen", "127.0.0.1:0", "--unix", path, code=1, says=["another server listens", "another --unix"])
        with mmcache.connect(f"mmcache+unix://{path}") as cache:
            assert cache.stat()["transport"] == "shm"


def test_a_unix_socket_whose_server_is_too_busy_to_answer_is_left_alone(tmp_path: Path) -> None:
    path = str(tmp_path / "busy.sock")
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as waiting:
        busy.bind(path)
        busy.listen(0)
        waiting.connect(path)  # the queue of connections is full now
        fails("--listen", "127.0.0.1:0", "--unix", path, code=1, says=["another server listens"])
        busy.accept()[0].close()
        with socket.socket(socket.AF_UNIX) as other:
            other.connect(path)


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "precious.txt"
    path.write_text("data")
    fails("--listen", "127.0.0.1:0", "--unix", str(path), code=2, says=["not a socket", "another --unix"])
    assert path.read_text() == "data"


@pytest.mark.parametrize("name", ["no/such/folder/shard.sock", "n" * 200])
def test_a_unix_path_that_cannot_be_bound_ends_with_1_and_the_remedy(tmp_path: Path, name: str) -> None:
    fails("--listen", "127.0.0.1:0", "--unix", str(tmp_path / name), code=1, says=["unix socket", "another --unix"])


def test_a_server_can_do_without_tcp(tmp_path: Path) -> None:
    path = str(tmp_path / "only.sock")
    keys = keys_of(2, "unix only")
    values, buffers = values_of(keys, 300_000), blanks(2, 300_000)
    with ServerProcess("4MiB", "--unix", path, listen="") as server:
        assert server.url == f"mmcache+unix://{path}"
        with mmcache.connect(server.url) as cache:
            assert all(cache.put(keys, values))
            assert all(cache.get_into(keys, buffers))
            assert all(map(np.array_equal, buffers, values))


def test_a_server_without_a_unix_socket_serves_over_tcp_only() -> None:
    with ServerProcess("4MiB", "--unix", "") as server:
        with mmcache.connect(server.url) as cache:
            assert cache.stat()["transport"] == "tcp"
        keys = keys_of(1, "no shm")
        with mmcache.connect(f"{server.url}?transport=shm", lazy=True) as cache:
            (result,) = cache.put(keys, values_of(keys, 100))
            assert result.outcome is Outcome.UNAVAILABLE
            assert "use transport=tcp" in result.reason


def test_a_server_process_that_cannot_start_says_why() -> None:
    with pytest.raises(TransportError, match="not a size"):
        ServerProcess("plenty").start()


def test_settings_come_from_the_environment_and_the_command_line_wins() -> None:
    settings = {"MMCACHE_MEMORY": "1MiB", "MMCACHE_MAX_BATCH_KEYS": "7"}
    with ServerProcess("3MiB", environment=settings) as server, Raw(server) as raw:
        assert raw.join().limits.batch_keys == 7
        raw.ask(Op.STAT, pb.StatRequest())
        reply = pb.StatReply.FromString(raw.answer()[1])
        assert reply.counters["bytes_capacity"] == 3 << 20


def test_what_a_killed_server_left_behind_is_removed_by_the_next(tmp_path: Path) -> None:
    environment = {"TMPDIR": str(tmp_path)}
    killed, alive = ServerProcess("1MiB", environment=environment), ServerProcess("1MiB", environment=environment)
    with killed, alive:
        killed.stop(signal.SIGKILL)
        assert len(list(tmp_path.glob("mmcache-*"))) == 2
        with ServerProcess("1MiB", environment=environment) as third:
            sockets = {Path(alive.unix_path), Path(third.unix_path)}
            assert set(tmp_path.glob("mmcache-*/shard.sock")) == sockets
            assert not Path(killed.unix_path).parent.exists()
            with mmcache.connect(f"mmcache+unix://{alive.unix_path}") as cache:
                assert cache.stat()["transport"] == "shm"
    assert list(tmp_path.iterdir()) == []
