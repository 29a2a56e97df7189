"""This client and a server that does not offer checksums last, as servers before it did not: they come first then."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import mmcache
from mmcache.config import ServerConfig
from mmcache.pb import cache_pb2 as pb
from mmcache.server.serve import Server
from tests.integration.support import blanks, keys_of, values_of


@pytest.fixture
def older(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[bool]]]:
    """A server's URL, and what each of its Reserves said of checksums last."""
    server = Server(ServerConfig(listen="127.0.0.1:0", memory_nbytes=64 << 20))
    offer, reserve, asked = server.service.join_reply, server.service.reserve, []

    def join_reply(*words: Any, **named: Any) -> pb.JoinReply:
        reply = offer(*words, **named)
        reply.sums_last = False
        return reply

    def noted(caller: Any, request: pb.ReserveRequest) -> Any:
        asked.append(request.sums_last)
        return reserve(caller, request)

    monkeypatch.setattr(server.service, "join_reply", join_reply)
    monkeypatch.setattr(server.service, "reserve", noted)
    server.start()
    assert server.address is not None
    yield "mmcache://{}:{}".format(*server.address), asked
    server.stop()


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("native", ["yes", "no"])
def test_what_is_stored_with_checksums_first_is_read(
    older: tuple[str, list[bool]], transport: str, native: str
) -> None:
    url, asked = older
    with mmcache.connect(f"{url}?transport={transport}&native={native}") as cache:
        for nbytes, count in ((0, 2), (1, 3), (70_001, 5), (1 << 20, 9), (6 << 20, 2)):
            keys = keys_of(count, f"{transport} {nbytes}")
            values, into = values_of(keys, nbytes), blanks(count, nbytes)
            assert [one.outcome for one in cache.put(keys, values)] == ["stored"] * count
            assert all(cache.get_into(keys, into))
            assert all(map(np.array_equal, values, into))
    assert asked
    assert not any(asked)
