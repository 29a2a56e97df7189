"""A server that shares sound memory and lies about where in it things are: no wrong byte is a hit, nothing crashes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import mmcache
from mmcache.client.blocking import Client
from mmcache.frame import header_checksum, header_nbytes_of
from mmcache.pb import cache_pb2 as pb
from mmcache.transport.base import PLACE, PRELUDE_NBYTES, PROTOCOL, Op, pack_prelude, parse_prelude
from mmcache.transport.tcp import close_fds
from tests.integration.support import MiB, blanks, frame_bytes, keys_of, values_of

NBYTES, COUNT = 3000, 12  # enough frames of one form for the client to read their headers in a run
KEYS = keys_of(COUNT, "places")
VALUES = values_of(KEYS, NBYTES)
FRAMES = [frame_bytes(KEYS, value, at) for at, value in enumerate(VALUES)]
FRAME_NBYTES = len(FRAMES[0])
HEADER_NBYTES = header_nbytes_of(FRAMES[0][:256], FRAME_NBYTES)
PLACES = [(at * 8192, FRAME_NBYTES, HEADER_NBYTES, header_checksum(f[:HEADER_NBYTES])) for at, f in enumerate(FRAMES)]


class Liar:
    """Listens at `path`, shares memory that holds FRAMES, and says `places` of whatever it is asked for."""

    def __init__(self, path: str) -> None:
        self.places = PLACES
        self._fd = os.memfd_create("arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self._fd, MiB)
        for at, frame in enumerate(FRAMES):
            os.pwrite(self._fd, frame, PLACES[at][0])
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                peer, _ = self._listener.accept()
                with peer, contextlib.suppress(OSError):
                    self._talk(peer)

    def _talk(self, peer: socket.socket) -> None:
        while True:
            head, fds, _, _ = socket.recv_fds(peer, PRELUDE_NBYTES, 2)
            close_fds(fds)
            if not head:
                return
            prelude = parse_prelude(head, MiB)
            peer.recv(prelude.body_nbytes, socket.MSG_WAITALL)
            body = self._answer(prelude.op)
            answer = pack_prelude(prelude.op, prelude.request_id, len(body)) + body
            if prelude.request_id:
                socket.send_fds(peer, [answer], [self._fd] if prelude.op is Op.JOIN else [])

    def _answer(self, op: Op) -> bytes:
        if op is Op.JOIN:
            limits = pb.Limits(batch_keys=100, inline_nbytes=MiB)
            join = pb.JoinReply(protocol=PROTOCOL, alignment=64, lease_s=60, limits=limits, arena_nbytes=MiB)
            return join.SerializeToString()
        if op is Op.ACQUIRE:
            places = b"".join(PLACE.pack(*place) for place in self.places)
            status = bytes([pb.FOUND] * len(self.places))
            return pb.AcquireReply(lease_id=7, status=status, places=places).SerializeToString()
        return pb.FinishReply(held=True).SerializeToString() if op is Op.FINISH else b""

    def close(self) -> None:
        """End it."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)
        os.close(self._fd)


@pytest.fixture
def liar(tmp_path: Path) -> Iterator[Liar]:
    server = Liar(str(tmp_path / "liar.sock"))
    yield server
    server.close()


@pytest.fixture(params=["native", "python"])
def cache(request: pytest.FixtureRequest, liar: Liar, tmp_path: Path) -> Iterator[Client]:
    options = "deadline_s=5" + ("&native=no" if request.param == "python" else "")
    with mmcache.connect(f"mmcache+unix://{tmp_path}/liar.sock?{options}", lazy=True) as client:
        yield client


def read(cache: Client) -> tuple[list[str], bool]:
    buffers = blanks(COUNT, NBYTES)
    results = cache.get_into(KEYS, buffers)
    rows = zip(results, buffers, VALUES, strict=True)
    return [str(result.outcome) for result in results], all(np.array_equal(b, v) for r, b, v in rows if r)


def test_what_is_where_it_is_said_to_be_is_read(cache: Client) -> None:
    assert read(cache) == (["hit"] * COUNT, True)


@pytest.mark.parametrize(
    "offset",
    [MiB, MiB - 64, MiB - HEADER_NBYTES, MiB - FRAME_NBYTES + 1, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1],
)
@pytest.mark.parametrize("every", [False, True], ids=["one", "all"])
def test_a_place_outside_the_memory_is_corrupt(liar: Liar, cache: Client, offset: int, every: bool) -> None:
    wrong = range(COUNT) if every else (3,)
    liar.places = [(offset, *place[1:]) if at in wrong else place for at, place in enumerate(PLACES)]
    outcomes, right = read(cache)
    assert right
    assert [at for at, outcome in enumerate(outcomes) if outcome != "hit"] == list(wrong)
    assert {outcomes[at] for at in wrong} == {"corrupt"}
    with cache.acquire(KEYS) as lease:
        assert [frame is None for frame in lease.frames] == [at in wrong for at in range(COUNT)]


@pytest.mark.parametrize("nbytes", [FRAME_NBYTES - 1, FRAME_NBYTES + 1, HEADER_NBYTES])
def test_a_frame_of_another_size_than_said_is_corrupt(liar: Liar, cache: Client, nbytes: int) -> None:
    start, _, header_nbytes, checksum = PLACES[5]
    liar.places = [*PLACES[:5], (start, nbytes, header_nbytes, checksum), *PLACES[6:]]
    outcomes, right = read(cache)
    assert right
    assert outcomes == ["hit"] * 5 + ["corrupt"] + ["hit"] * (COUNT - 6)


@pytest.mark.parametrize("nbytes", [MiB, 1 << 40, (1 << 40) + 1, (1 << 64) - 1])
def test_frames_of_more_bytes_than_were_asked_for_are_none(liar: Liar, cache: Client, nbytes: int) -> None:
    liar.places = [*PLACES[:5], (0, nbytes, *PLACES[5][2:]), *PLACES[6:]]
    assert read(cache) == (["unavailable"] * COUNT, True)


def test_another_keys_place_is_corrupt(liar: Liar, cache: Client) -> None:
    liar.places = [PLACES[1], PLACES[0], *PLACES[2:]]
    outcomes, right = read(cache)
    assert right
    assert outcomes == ["corrupt"] * 2 + ["hit"] * (COUNT - 2)


def test_more_places_than_keys_were_asked_for_are_none(liar: Liar, cache: Client) -> None:
    liar.places = PLACES * 50
    assert read(cache) == (["unavailable"] * COUNT, True)
