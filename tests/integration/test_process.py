"""Looks at other processes, whose threads begin and end meanwhile."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from mmcache.testing.process import children_of, suspend

# A child of the first thread, then one of another thread, whose pids are said; then threads that come and go.
RESTLESS = """
import subprocess, sys, threading
sleep = [sys.executable, "-c", "import sys; sys.stdin.read()"]
def start():
    print(subprocess.Popen(sleep, stdin=subprocess.PIPE).pid, flush=True)
start()
threading.Thread(target=lambda: (start(), threading.Event().wait())).start()
while True:
    threads = [threading.Thread(target=str) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
"""


@pytest.fixture(name="restless")
def fixture_restless() -> Iterator[tuple[int, set[int]]]:
    """A process, and its children."""
    with subprocess.Popen([sys.executable, "-c", RESTLESS], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield process.pid, {int(process.stdout.readline()) for _ in range(2)}
        process.kill()


def test_children_are_those_of_all_threads_whichever_end_meanwhile(restless: tuple[int, set[int]]) -> None:
    pid, children = restless
    for _ in range(1000):
        assert set(children_of(pid)) == children


def test_threads_that_end_meanwhile_do_not_keep_a_process_from_being_stopped(restless: tuple[int, set[int]]) -> None:
    pid, children = restless
    suspend(pid)
    assert set(children_of(pid)) == children


def test_who_has_ended_has_no_children_and_who_is_not_there_is_said() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    assert process.pid not in children_of(threading.main_thread().native_id or 0)
    with pytest.raises(FileNotFoundError):
        children_of(process.pid)
