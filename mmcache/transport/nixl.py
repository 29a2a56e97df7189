"""One-sided reads of a server's arena through NIXL, which moves bytes by UCX: RDMA where a card is, else TCP.

NIXL's Python package hides what is needed here (a progress thread that sleeps), so its private bindings are used, and
looked over first. UCX knows no passwords: docs/access.md says what follows from that.

A transfer cannot be called off: one that was given up at its deadline still writes its buffer when the peer goes on,
also after the peer was removed (tried with UCX over TCP, peer stopped and continued). So such a buffer is kept, and
used for nothing else, until NIXL says that its transfer has ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import mmap
import os
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmcache.errors import DeadlineExceeded, ProtocolError, TransportError
from mmcache.tensors import Bytes
from mmcache.transport.base import Found

PACKAGES: Final = ("nixl_cu12", "nixl_cu13")
DEVICES_VARIABLE: Final = "UCX_NET_DEVICES"
LOOPBACK: Final = "lo"
STAGED_NBYTES: Final = 64 << 20  # one Acquire brings so much at most, or a single frame
MAX_ABANDONED_NBYTES: Final = 256 << 20
MAX_IDLE_PEERS: Final = 64
PROGRESS_US: Final = 1000  # below 100 the progress thread spins
SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 20e-6, 500e-6
ALIGNMENT: Final = 64
_QUIET: Final = {"NIXL_LOG_LEVEL": "FATAL", "UCX_LOG_LEVEL": "fatal"}  # else they write to stdout and stderr
_NAMES: Final = (
    "nixlAgent", "nixlAgentConfig", "nixlRegDList", "nixlXferDList", "DRAM_SEG", "NIXL_READ", "NIXL_SUCCESS",
    "NIXL_IN_PROG",
)  # fmt: skip
_CALLS: Final = (
    "createBackend", "registerMem", "deregisterMem", "getLocalMD", "loadRemoteMD", "invalidateRemoteMD",
    "createXferReq", "postXferReq", "getXferStatus", "releaseXferReq",
)  # fmt: skip


def load_bindings() -> Any:
    """NIXL's bindings, with every name that is used here. Raises TransportError, which says what to install."""
    troubles = []
    for package in PACKAGES:
        try:
            with _environment():
                bindings = importlib.import_module(f"{package}._bindings")
        except ModuleNotFoundError as error:
            if error.name != package:
                troubles.append(f"{package}: {error}")
            continue
        except Exception as error:
            troubles.append(f"{package} does not load: {error}")
            continue
        lacking = lacks(bindings)
        if not lacking:
            return bindings
        troubles.append(f"{package} is another release than this one knows: it lacks {', '.join(lacking)}")
    if troubles:
        raise TransportError(f"NIXL cannot be used ({'; '.join(troubles)}); pip install 'mmcache[nixl]'")
    raise TransportError("NIXL is not installed; pip install 'mmcache[nixl]'")


def lacks(bindings: Any) -> list[str]:
    """What of the names used here these bindings do not have."""
    agent, config = getattr(bindings, "nixlAgent", None), getattr(bindings, "nixlAgentConfig", None)
    missing = [name for name in _NAMES if not hasattr(bindings, name)]
    missing += [f"nixlAgent.{name}" for name in _CALLS if agent is not None and not hasattr(agent, name)]
    wanted = ("useProgThread", "pthrDelay")
    return missing + [f"nixlAgentConfig.{name}" for name in wanted if config is not None and not hasattr(config, name)]


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """With these variables set, and logs off unless they are asked for; afterwards as before, since others in this
    process may use UCX too."""
    values = {name: os.environ.get(name, value) for name, value in _QUIET.items()} | values
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class Agent:
    """An agent of NIXL with UCX on `devices`, as UCX_NET_DEVICES names them. Raises TransportError without NIXL.

    It lives as long as the process: nothing that it might still write to may go before it.
    """

    def __init__(self, devices: str) -> None:
        self.bindings = load_bindings()
        config = self.bindings.nixlAgentConfig()
        config.useProgThread, config.pthrDelay = True, PROGRESS_US
        try:
            with _environment(**{DEVICES_VARIABLE: devices}):  # the plugin with UCX is loaded here
                self.agent = self.bindings.nixlAgent(f"mmcache-{uuid.uuid4()}", config)
                self._backends = [self.agent.createBackend("UCX", {})]
        except Exception as error:
            raise TransportError(f"NIXL has no UCX on {devices!r}: {error}; see {DEVICES_VARIABLE}") from error

    def register(self, memory: Bytes) -> Any:
        """Let peers that have the metadata reach this memory. Returns what `deregister` takes."""
        rows = self.bindings.nixlRegDList(self.bindings.DRAM_SEG, [(memory.ctypes.data, memory.nbytes, 0, b"")])
        try:
            self.agent.registerMem(rows, self._backends)
        except Exception as error:
            raise TransportError(f"NIXL cannot register {memory.nbytes} bytes: {error}") from error
        return rows

    def deregister(self, rows: Any) -> None:
        """Undo `register`."""
        self.agent.deregisterMem(rows, self._backends)

    def metadata(self) -> bytes:
        """What a peer needs to reach the registered memory."""
        return bytes(self.agent.getLocalMD())

    def post_read(self, peer: str, local: NDArray[np.uint64], remote: NDArray[np.uint64]) -> int:
        """Begin to read rows of (address, nbytes, 0) of the peer into as many of ours; the transfer's handle."""
        kinds, descriptors = self.bindings.DRAM_SEG, self.bindings.nixlXferDList
        into, source = descriptors(kinds, local), descriptors(kinds, remote)
        return int(self.agent.createXferReq(self.bindings.NIXL_READ, into, source, peer, b"", self._backends))


class RemoteArena(NamedTuple):
    """What a server says of its arena: its agent's metadata, and where the arena lies in the agent's memory."""

    metadata: bytes
    base: int
    nbytes: int


class _Peer:
    """A server's agent as ours knows it."""

    def __init__(self, metadata: bytes) -> None:
        self.metadata, self.name = metadata, ""
        self.users = self.reads = 0  # links; transfers under way
        self.broken = False


class _Staging:
    """Registered memory that reads land in. `lost`: a transfer that was given up may still write here."""

    def __init__(self, agent: Agent, nbytes: int) -> None:
        self.lost = False
        try:
            self.data: Bytes = np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)
        except (OSError, ValueError, OverflowError) as error:
            raise TransportError(f"no memory to read {nbytes} bytes into: {error}") from error
        self.rows = agent.register(self.data)


class ClientAgent:
    """This process's agent for reads, shared by all its links: every call into NIXL under one lock."""

    def __init__(self) -> None:
        self.agent = Agent(os.environ.get(DEVICES_VARIABLE) or LOOPBACK)
        self._lock = threading.Lock()
        self._peers: dict[bytes, _Peer] = {}
        self._abandoned: list[tuple[int, _Peer, _Staging]] = []

    @contextlib.contextmanager
    def _turn(self, deadline: float) -> Iterator[None]:
        if not self._lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise DeadlineExceeded("NIXL was busy with other reads until the deadline; raise deadline_s")
        try:
            yield
        finally:
            self._lock.release()

    @property
    def abandoned_nbytes(self) -> int:
        """The memory that transfers given up at their deadlines still hold."""
        return sum(staging.data.nbytes for _, _, staging in self._abandoned)

    def add(self, metadata: bytes, deadline: float) -> _Peer:
        """The peer of this metadata; one that broke is removed and added again, unless it may still write here."""
        with self._turn(deadline):
            self._sweep()
            peer = self._peers.setdefault(metadata, _Peer(metadata))
            try:
                if peer.broken and not peer.reads and not any(one is peer for _, one, _ in self._abandoned):
                    self._remove(peer)
                if not peer.name:
                    name = self.agent.agent.loadRemoteMD(metadata)
                    peer.name, peer.broken = name.decode() if isinstance(name, bytes) else str(name), False
            except Exception as error:
                if not peer.users:
                    del self._peers[metadata]
                raise TransportError(f"NIXL cannot use what the server says of its memory: {error}") from error
            peer.users += 1
            return peer

    def leave(self, peer: _Peer, staging: _Staging | None, deadline: float) -> None:
        """One user of the peer, with its staging, is done."""
        with self._turn(deadline):
            if staging is not None:
                self.agent.deregister(staging.rows)
            self._less(peer)

    def _less(self, peer: _Peer) -> None:
        """A peer that nobody uses is kept for the next user: each removal leaves a socket open in UCX."""
        peer.users -= 1
        if not peer.users and (peer.broken or len(self._peers) > MAX_IDLE_PEERS):
            self._remove(peer)
            self._peers.pop(peer.metadata, None)

    def _remove(self, peer: _Peer) -> None:
        if peer.name:
            with contextlib.suppress(Exception):  # it may not know it any more
                self.agent.agent.invalidateRemoteMD(peer.name)
        peer.name = ""

    def staging(self, nbytes: int, old: _Staging | None, deadline: float) -> _Staging:
        """New memory to read into, instead of the old."""
        with self._turn(deadline):
            self._sweep()
            if old is not None:
                self.agent.deregister(old.rows)
            if self.abandoned_nbytes > MAX_ABANDONED_NBYTES:
                raise TransportError("too much memory is held by NIXL reads that never ended; use transport=tcp")
            return _Staging(self.agent, nbytes)

    def _sweep(self) -> None:
        """Free what ended after all."""
        agent, still = self.agent.agent, []
        for handle, peer, staging in self._abandoned:
            with contextlib.suppress(Exception):  # an error ends it as well
                if agent.getXferStatus(handle) == self.agent.bindings.NIXL_IN_PROG:
                    still.append((handle, peer, staging))
                    continue
            with contextlib.suppress(Exception):
                agent.releaseXferReq(handle)
            with contextlib.suppress(Exception):
                self.agent.deregister(staging.rows)
            self._less(peer)
        self._abandoned = still

    def read(
        self, peer: _Peer, staging: _Staging, local: NDArray[np.uint64], remote: NDArray[np.uint64], deadline: float
    ) -> None:
        """Have these rows of the peer's memory in ours. Raises TransportError; if the staging may still be
        written, it is `lost` and no longer the caller's."""
        bindings, agent = self.agent.bindings, self.agent.agent
        handle, ended = 0, False
        try:
            with self._turn(deadline):
                if self._abandoned:
                    self._sweep()
                handle = self.agent.post_read(peer.name, local, remote)
                peer.reads += 1
                state = agent.postXferReq(handle, b"")
            pause_s = SHORTEST_PAUSE_S
            while state == bindings.NIXL_IN_PROG:
                if time.monotonic() > deadline:
                    raise DeadlineExceeded("the server's memory could not be read by NIXL before the deadline")
                time.sleep(pause_s)
                pause_s = min(1.5 * pause_s, LONGEST_PAUSE_S)
                with self._turn(deadline):
                    state = agent.getXferStatus(handle)
            ended = True
            if state != bindings.NIXL_SUCCESS:
                raise TransportError(f"NIXL ended the read with {state}")
        except TransportError:
            peer.broken |= ended
            raise
        except Exception as error:
            peer.broken = ended = True
            raise TransportError(f"the server's memory cannot be read by NIXL: {type(error).__name__}") from error
        finally:
            if handle:
                self._end(handle, peer, staging, ended)

    def _end(self, handle: int, peer: _Peer, staging: _Staging, ended: bool) -> None:
        with self._lock:
            peer.reads -= 1
            if ended:
                with contextlib.suppress(Exception):
                    self.agent.agent.releaseXferReq(handle)
            else:
                peer.users += 1
                staging.lost = True
                self._abandoned.append((handle, peer, staging))


class Reader:
    """One link's way into a server's arena, with memory of its own that grows as it must. One call at a time.

    Raises TransportError if NIXL, or what the server says of its memory, cannot be used.
    """

    def __init__(self, arena: RemoteArena, deadline: float) -> None:
        self._arena, self._pid = arena, os.getpid()
        self._agent = client_agent()
        self._staging: _Staging | None = None
        self._peer = self._agent.add(arena.metadata, deadline)

    def read(self, places: Sequence[Found], deadline: float) -> tuple[Bytes, list[Found]]:
        """Bring frames here, in one transfer: the memory they lie in until the next call, and where in it.

        Raises TransportError when that fails or is not done by the deadline, and ProtocolError for a place outside the
        arena.
        """
        arena, total, staged = self._arena, 0, []
        for place in places:
            if place.offset + place.nbytes > arena.nbytes:
                raise ProtocolError(f"{place.nbytes} bytes at {place.offset} are outside the server's arena")
            staged.append(place._replace(offset=total))
            total += -(-place.nbytes // ALIGNMENT) * ALIGNMENT
        if not places:
            return np.empty(0, np.uint8), staged
        staging = self._room(total, deadline)
        remote = _rows(places, arena.base)
        local = _rows(staged, staging.data.ctypes.data)
        try:
            self._agent.read(self._peer, staging, local, remote, deadline)
        finally:
            if staging.lost:
                self._staging = None
        return staging.data, staged

    def _room(self, nbytes: int, deadline: float) -> _Staging:
        old = self._staging
        if old is not None and old.data.nbytes >= nbytes:
            return old
        self._staging = None
        self._staging = self._agent.staging(max(1 << 20, 1 << (nbytes - 1).bit_length()), old, deadline)
        return self._staging

    def close(self) -> None:
        """Give the memory back. In a forked child it is the parent's."""
        staging, self._staging = self._staging, None
        if os.getpid() == self._pid:
            with contextlib.suppress(Exception):
                self._agent.leave(self._peer, staging, time.monotonic() + 1)


def _rows(places: Sequence[Found], base: int) -> NDArray[np.uint64]:
    return np.array([(base + place.offset, place.nbytes, 0) for place in places], np.uint64)


_CREATING = threading.Lock()
_AGENT: ClientAgent | None = None


def client_agent() -> ClientAgent:
    """The one agent of this process, begun when it is first needed, which takes about half a second."""
    global _AGENT
    with _CREATING:
        if _AGENT is None:
            _AGENT = ClientAgent()
        return _AGENT


def _forget_in_child() -> None:
    """The parent's agent stays, unused: to end it would wait for threads that this process does not have."""
    global _AGENT, _CREATING
    if _AGENT is not None:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(_AGENT.agent.agent))
    _AGENT, _CREATING = None, threading.Lock()


os.register_at_fork(after_in_child=_forget_in_child)
