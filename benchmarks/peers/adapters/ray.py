"""Ray's object store: a put copies in, a get maps the object and copies it out.

Objects are named by references, so the writer's go to the reader, outside the timed part.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.adapters.base import Bytes, Client, free_port, listens, spawn
from benchmarks.peers.install import python_of

ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}
STORE_NBYTES = 1_200_000_000


def serve(run: Path, environments: Path, stack: ExitStack) -> dict[str, Any]:
    """Start a head node without workers."""
    port = free_port()
    folder = run / "ray"
    # Several of its processes have sessions of their own; the name of the folder, new for this run, is theirs alone.
    stack.callback(_end_all, str(folder))
    command = [python_of(environments, "ray").with_name("ray"), "start", "--head", "--block", "--num-cpus=0",
               "--node-ip-address=127.0.0.1", f"--port={port}", f"--object-store-memory={STORE_NBYTES}",
               "--include-dashboard=false", "--disable-usage-stats", f"--temp-dir={folder}"]  # fmt: skip
    spawn(stack, run, command, lambda: listens(port)() and bool(list(folder.glob("*/sockets/raylet"))), ENVIRONMENT)
    return {"address": f"127.0.0.1:{port}"}


def _end_all(mark: str) -> None:
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark in command.read_bytes().decode(errors="replace"):
                os.kill(int(command.parent.name), signal.SIGKILL)
        except OSError:
            continue  # it has ended


class Ray(Client):
    """A driver."""

    VIEWS = True

    def __init__(self, options: Mapping[str, Any], source: Bytes, target: Bytes) -> None:
        super().__init__(options, source, target)
        import ray

        self._ray = ray
        self._refs: dict[str, Any] = {}
        self._learned: dict[str, Any] = {}
        ray.init(address=options["address"], logging_level="ERROR", log_to_driver=False)
        # What carries references between processes within Ray; a task or an actor would carry them by pickle.
        self._core = ray._private.worker.global_worker.core_worker

    def put(self, batch: Any) -> None:
        for name, buffer in zip(*batch, strict=True):
            self._refs[name] = self._ray.put(buffer)

    def get(self, batch: Any) -> None:
        for value, target in zip(self.view(batch), batch[1], strict=True):
            np.copyto(target, value)

    def view(self, batch: Any) -> list[Any]:
        values: list[Any] = self._ray.get([self._learned[name] for name in batch[0]], timeout=30)
        return values

    def handles(self, names: Sequence[str]) -> list[str]:
        parts = [self._core.serialize_object_ref(self._refs[name])[0:3] for name in names]
        return [f"{ref.hex()} {owner.hex()} {status.hex()}" for ref, owner, status in parts]

    def learn(self, names: Sequence[str], handles: Sequence[str]) -> None:
        self._learned = {}
        for name, handle in zip(names, handles, strict=True):
            binary, owner, status = map(bytes.fromhex, handle.split(" "))
            self._learned[name] = self._ray.ObjectRef(binary, owner)
            self._core.deserialize_and_register_object_ref(binary, self._ray.ObjectRef.nil(), owner, status)

    def delete(self, names: Sequence[str]) -> None:
        for name in names:
            self._refs.pop(name, None)

    def close(self) -> None:
        self._ray.shutdown()
