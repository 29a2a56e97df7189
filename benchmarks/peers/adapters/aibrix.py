"""AIBrix's KV cache offloading framework: its file system connector (SHFS) on tmpfs."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.peers.adapters.base import Bytes, Client
from benchmarks.peers.install import PeerError

TMPFS = "/dev/shm"


def serve(run: Path, environments: Path, stack: ExitStack) -> dict[str, Any]:
    """Make the folder all clients share; there is no server."""
    if not os.path.ismount(TMPFS):
        raise PeerError(f"{TMPFS} is no tmpfs here")
    return {"root": stack.enter_context(tempfile.TemporaryDirectory(prefix="peers-aibrix-", dir=TMPFS))}


class Shfs(Client):
    """A connector; the values of a call are under way at the same time, on two threads."""

    def __init__(self, options: Mapping[str, Any], source: Bytes, target: Bytes) -> None:
        super().__init__(options, source, target)
        os.environ["AIBRIX_KV_CACHE_OL_SHFS_ROOT"] = options["root"]
        import torch
        from aibrix_kvcache.l2.connectors.connector import Connector, ConnectorConfig
        from aibrix_kvcache.memory import MemoryRegion

        class Region(MemoryRegion):  # type: ignore[misc]
            """A part of memory that is not the framework's to free."""

            def destroy_unsafe(self) -> None:
                pass

        self._region, self._torch = Region, torch
        self._connector = Connector.create(
            ConnectorConfig(backend_name="SHFS", namespace="bench", partition_id="0", executor=ThreadPoolExecutor(2))
        )
        self._demand([self._connector.open()])
        self._loop = asyncio.new_event_loop()

    def prepare(self, names: Sequence[str], buffers: Sequence[Bytes]) -> Any:
        regions = [self._region(self._torch.from_numpy(buffer), 0, buffer.nbytes) for buffer in buffers]
        return [name.encode() for name in names], regions

    def put(self, batch: Any) -> None:
        self._all(self._connector.put, *batch)

    def get(self, batch: Any) -> None:
        self._all(self._connector.get, *batch)

    def delete(self, names: Sequence[str]) -> None:
        self._all(self._connector.delete, [name.encode() for name in names])

    def _all(self, call: Any, *columns: Sequence[Any]) -> None:
        async def together() -> list[Any]:
            return await asyncio.gather(*(call(*row) for row in zip(*columns, strict=True)))

        self._demand(self._loop.run_until_complete(together()))

    def _demand(self, statuses: Sequence[Any]) -> None:
        failed = next((status for status in statuses if not status.is_ok()), None)
        if failed is not None:
            raise RuntimeError(f"the connector answered {failed}")
