"""vineyard: blobs in shared memory. A put makes one, copies and seals; a get maps it and copies out.

Blobs are named by the server, so the writer's ids go to the reader, outside the timed part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.adapters.base import Bytes, Client, spawn
from benchmarks.peers.install import PeerError, python_of


def serve(run: Path, environments: Path, stack: ExitStack) -> dict[str, Any]:
    """Start vineyardd, with metadata of its own."""
    venv = python_of(environments, "vineyard").parents[1]
    daemon = next(venv.glob("lib/python*/site-packages/vineyard/bdist/vineyardd"), None)
    if daemon is None:
        raise PeerError("the wheel of vineyard-bdist has no vineyardd")
    daemon.chmod(0o755)
    path = run / "vineyard.sock"
    spawn(
        stack, run, [daemon, "--socket", path, "--rpc=false", "--meta", "local", "--size", "1200M"], path.exists
    )  # fmt: skip
    return {"socket": str(path)}


class Vineyard(Client):
    """A connection over the unix socket."""

    VIEWS = True

    def __init__(self, options: Mapping[str, Any], source: Bytes, target: Bytes) -> None:
        super().__init__(options, source, target)
        import vineyard

        self._client = vineyard.connect(options["socket"])
        self._ids: dict[str, Any] = {}
        self._learned: dict[str, Any] = {}

    def put(self, batch: Any) -> None:
        for name, buffer in zip(*batch, strict=True):
            blob = self._client.create_blob(buffer.nbytes)
            np.copyto(np.frombuffer(memoryview(blob), np.uint8)[: buffer.nbytes], buffer)
            self._ids[name] = blob.seal(self._client).id

    def get(self, batch: Any) -> None:
        for view, target in zip(self.view(batch), batch[1], strict=True):
            np.copyto(target, np.frombuffer(view, np.uint8)[: target.nbytes])

    def view(self, batch: Any) -> list[Any]:
        return [memoryview(blob) for blob in self._client.get_blobs([self._learned[name] for name in batch[0]])]

    def handles(self, names: Sequence[str]) -> list[str]:
        return [repr(self._ids[name]) for name in names]

    def learn(self, names: Sequence[str], handles: Sequence[str]) -> None:
        import vineyard

        self._learned = dict(zip(names, map(vineyard.ObjectID, handles), strict=True))

    def delete(self, names: Sequence[str]) -> None:
        self._client.delete([self._ids.pop(name) for name in names])
