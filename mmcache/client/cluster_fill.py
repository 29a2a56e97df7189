"""Copies to where they were looked for: to a shard that is new, or back, or one of many that are to hold a hot run.

A shard that lacks what another had for it is given that, a little with each read, until it lacks nothing that is asked
for. What is copied was verified after it had left the memory of others; what has a time to live is left where it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import numpy as np

from mmcache.client.calls import Put
from mmcache.client.cluster_shard import Shard
from mmcache.errors import FrameError
from mmcache.frame_view import Frame
from mmcache.keyset import Keys
from mmcache.tensors import HostTensor


def copy(rows: Keys, source: Shard, target: Shard, deadline: float) -> int:
    """Store what one shard has of these keys on another, too; how many that were."""
    taken = source.take(rows.digests, deadline)
    if taken is None:
        return 0
    frames, lease_ids = taken
    values: dict[int, Mapping[str, HostTensor]] = {}
    for row, frame in enumerate(frames):
        if frame is not None and not frame.header.meta.expires_ms:
            with contextlib.suppress(FrameError):
                values[row] = _tensors(frame)
    if lease_ids:
        source.give_back(lease_ids, deadline)
    if not values:
        return 0
    put = Put(rows.pick(list(values)), list(values.values()), None)
    target.store(put, deadline)
    return sum(map(bool, put.results))


def _tensors(frame: Frame) -> dict[str, HostTensor]:
    """The tensors of a frame, in memory of ours. Raises FrameError if those are not the bytes that were stored."""
    ours = Frame.parse(bytes(frame.data), checksum=frame.header.checksum)
    ours.verify()
    return {
        stored.spec.name: HostTensor(
            np.frombuffer(ours.payload(stored), np.uint8), stored.spec.dtype, stored.spec.shape
        )
        for stored in ours.header.tensors
    }
