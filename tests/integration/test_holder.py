"""The process that holds a server's memory: who can reach that memory, and how both processes end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import mmcache
from mmcache.server.holder import LONGEST_PAUSE_S, how, pause_s
from mmcache.testing.process import ServerProcess, children_of
from tests.integration.held import COUNT, WITHOUT_CAPABILITIES, counters_of, kill, stores
from tests.integration.support import eventually, reserved_address


@pytest.mark.parametrize(("deaths", "seconds"), [(1, 0.0), (2, 0.5), (3, 1.0), (7, 16.0), (8, 30.0), (5000, 30.0)])
def test_pauses_grow_from_the_second_death_on(deaths: int, seconds: float) -> None:
    assert pause_s(deaths) == seconds <= LONGEST_PAUSE_S


def test_an_end_is_told_in_words() -> None:
    assert how(9) == "was killed by signal 9"
    assert how(3 << 8) == "ended with exit 3"


def test_when_the_holder_is_killed_the_server_ends_and_the_next_begins_empty() -> None:
    with (
        reserved_address() as address,
        ServerProcess("16MiB", "--hold", listen=address) as server,
        mmcache.connect(server.url) as cache,
    ):
        assert stores(cache)
        (pid,) = children_of(server.pid)
        assert server.stop(signal.SIGKILL) == -signal.SIGKILL
        eventually(lambda: not Path(f"/proc/{pid}").exists() or "Z" in state_of(pid), "the server ended too")
        with ServerProcess("16MiB", "--hold", listen=address) as again:
            assert eventually(lambda: counters_of(again.url), "it answers")["entries"] == 0
            eventually(lambda: stores(cache), "it stores")


IGNORING = (
    sys.executable,
    "-c",
    "import os, signal, sys\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\nos.execvp(sys.argv[1], sys.argv[1:])",
)


def test_a_holder_whose_starter_ignored_the_ends_of_children_notices_them_all_the_same() -> None:
    with ServerProcess("16MiB", "--hold", under=IGNORING) as server, mmcache.connect(server.url) as cache:
        assert stores(cache)
        assert kill(server)["restored_entries"] == COUNT
        assert server.stop() == 0


def state_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_a_server_that_cannot_start_at_all_ends_its_holder_with_its_words() -> None:
    with ServerProcess("1MiB") as first:
        words = ["serve", "--hold", "--memory", "1MiB", "--listen", first.url.removeprefix("mmcache://")]
        command = [sys.executable, "-m", "mmcache", *words]  # it becomes another program
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "choose another --listen" in ended.stderr
    assert "Traceback" not in ended.stderr


TRESPASSER = """
import errno, json, mmap, os, sys
found = []
def tried(attempt):
    try:
        attempt()
    except OSError as error:
        return errno.errorcode[error.errno]
    return "done"
for pid in sys.argv[1:]:
    for folder in ("fd", "map_files"):
        for name in os.listdir(f"/proc/{pid}/{folder}"):
            path = f"/proc/{pid}/{folder}/{name}"
            try:
                what = os.readlink(path) if folder == "fd" or os.access(path, os.F_OK, follow_symlinks=False) else ""
            except FileNotFoundError:  # it is gone since it was listed
                continue
            if "memfd:mmcache" not in what:
                continue
            opened, which = [], "arena" if "mmcache-arena" in what else "index"
            how = tried(lambda: opened.append(os.open(path, os.O_RDWR)))
            if not opened:
                found.append((folder, which, "open", how))
                continue
            size = os.fstat(opened[0]).st_size
            for way, prot in (("writable", mmap.PROT_READ | mmap.PROT_WRITE), ("readable", mmap.PROT_READ)):
                found.append((folder, which, way, tried(lambda: mmap.mmap(opened[0], size, prot=prot))))
            found.append((folder, which, "pwrite", tried(lambda: os.pwrite(opened[0], b"x", 0))))
print(json.dumps(sorted(set(found))))
"""


def test_another_process_of_the_same_user_can_write_neither_and_cannot_open_the_index() -> None:
    with ServerProcess("16MiB", "--hold", under=WITHOUT_CAPABILITIES) as server:
        pids = [str(server.pid), *map(str, children_of(server.pid))]
        command = [*WITHOUT_CAPABILITIES, sys.executable, "-c", TRESPASSER, *pids]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.stderr == ""
    found = {tuple(one) for one in json.loads(ended.stdout)}
    on_arena = {one[2:] for one in found if one[:2] == ("fd", "arena")}
    assert on_arena == {("readable", "done"), ("writable", "EPERM"), ("pwrite", "EPERM")}
    assert not [one for one in found if one[:2] == ("fd", "index")]  # nobody has a descriptor of it
    assert {one for one in found if one[0] == "map_files"} == {
        ("map_files", "arena", "open", "EPERM"),
        ("map_files", "index", "open", "EPERM"),
    }


def test_the_holder_is_small() -> None:
    with ServerProcess("16MiB", "--hold") as server:
        text = Path(f"/proc/{server.pid}/status").read_text()
        maps = Path(f"/proc/{server.pid}/maps").read_text()
    private_kib = sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("RssAnon:"))
    assert private_kib < 16 << 10
    assert "numpy" not in maps  # it knows nothing of what it starts, so that another release can be started
