"""Runs commands at the same time, and says which one each line of their output comes from.

    python tests/engines/side_by_side.py NAME 'COMMAND' [NAME 'COMMAND' ...]

A command is a line for bash. Exits with 0 if all did, else says who failed and exits with 1.
SIGINT and SIGTERM end all.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading


def run(commands: dict[str, str]) -> dict[str, int]:
    """The exit status of each, by name."""
    processes: dict[str, subprocess.Popen[str]] = {}
    signals: list[int] = []

    def end(number: int, _frame: object) -> None:
        signals.append(number)
        for process in processes.values():
            if process.returncode is None:
                os.killpg(process.pid, number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    for name, command in commands.items():
        line = ["bash", "-c", command]  # while dash starts a process, a SIGINT may be lost
        process = processes[name] = subprocess.Popen(  # in a group of its own, with what it starts, to be ended whole
            line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        if signals:  # perhaps before `end` knew of it
            os.killpg(process.pid, signals[-1])
    width = max(map(len, processes))
    readers = [threading.Thread(target=_say, args=(name.ljust(width), processes[name])) for name in processes]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    return {name: process.wait() for name, process in processes.items()}


def _say(name: str, process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        print(f"{name} | {line}", end="", flush=True)


def main(words: list[str]) -> int:
    """What the process exits with."""
    codes = run(dict(zip(words[::2], words[1::2], strict=True)))
    failed = [f"{name} (exit status {code})" for name, code in codes.items() if code]
    if failed:
        print(f"failed: {', '.join(failed)}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
