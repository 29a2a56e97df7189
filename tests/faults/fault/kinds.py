"""Each fault: how it begins, and how it is healed. A context manager each, with the fault between the two."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

import mmcache
from mmcache.client.lease import LeasedFrames
from mmcache.cluster.redis_link import RedisLink
from mmcache.cluster.settings import parse_cluster_url
from mmcache.cluster.urls import parse_members_url
from mmcache.errors import MMCacheError
from mmcache.keys import Namespace, opaque_key
from mmcache.keyset import Keys
from mmcache.testing.process import suspend
from mmcache.testing.values import eventually
from tests.faults.fault.bed import LEASE_S, Bed
from tests.faults.fault.memory import limited

PAST_LEASES_S: Final = LEASE_S + 1.0
HOG_NBYTES: Final = 1 << 20
HOG_BATCH: Final = 8


class ClientProcesses(Protocol):
    """What the faults need of the clients."""

    def pid(self, name: str) -> int:
        """The process that has this lane now."""
        ...

    def kill(self, name: str) -> None:
        """SIGKILL it."""
        ...

    def start(self, name: str) -> None:
        """Another process takes its lane."""
        ...


@dataclass(frozen=True)
class Scene:
    """What the faults befall."""

    bed: Bed
    clients: ClientProcesses


@dataclass(frozen=True)
class Kind:
    """A fault: what it may befall, and for how long; `also` names what else must not be in trouble then."""

    befall: Callable[[Scene, str], AbstractContextManager[None]]
    targets: tuple[str, ...]
    least_s: float
    most_s: float
    also: tuple[str, ...] = ()


@contextlib.contextmanager
def kill(scene: Scene, name: str) -> Iterator[None]:
    """SIGKILL a server; it is started again, empty, at its address."""
    shard = scene.bed.shards[name]
    shard.end(signal.SIGKILL)
    yield
    shard.start()


@contextlib.contextmanager
def kill_held(scene: Scene, name: str) -> Iterator[None]:
    """SIGKILL a server under its holder, which starts it again with what it held."""
    shard = scene.bed.shards[name]
    before = shard.server_id()
    os.kill(shard.pid, signal.SIGKILL)
    yield
    shard.answers(before)


@contextlib.contextmanager
def replace(scene: Scene, name: str) -> Iterator[None]:
    """SIGHUP a holder: another server takes the place of the one that is there, as for an upgrade."""
    shard = scene.bed.shards[name]
    before = shard.server_id()
    os.kill(shard.server.pid, signal.SIGHUP)
    yield
    shard.answers(before)


@contextlib.contextmanager
def stop(scene: Scene, name: str) -> Iterator[None]:
    """SIGSTOP a server for longer than a lease lasts."""
    pid = scene.bed.shards[name].pid
    suspend(pid)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)
    scene.bed.shards[name].answers()


@contextlib.contextmanager
def stop_client(scene: Scene, name: str) -> Iterator[None]:
    """SIGSTOP a client for longer than a lease lasts."""
    pid = scene.clients.pid(name)
    suspend(pid)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def kill_client(scene: Scene, name: str) -> Iterator[None]:
    """SIGKILL a client, whatever it holds; another one begins."""
    scene.clients.kill(name)
    yield
    scene.clients.start(name)


@contextlib.contextmanager
def partition(scene: Scene, name: str) -> Iterator[None]:
    """A shard's link goes down: no client reaches it, and it reaches no Redis."""
    network = scene.bed.network
    assert network is not None
    network.cut()
    try:
        yield
    finally:
        network.mend()
    scene.bed.shards[name].answers()


def relayed(rule: str) -> Callable[[Scene, str], AbstractContextManager[None]]:
    """What the network between clients and a shard does."""

    @contextlib.contextmanager
    def befall(scene: Scene, name: str) -> Iterator[None]:
        relay = scene.bed.shards[name].relay
        assert relay is not None
        relay.obey(rule)
        try:
            yield
        finally:
            relay.obey("free")

    return befall


@contextlib.contextmanager
def full(scene: Scene, name: str) -> Iterator[None]:
    """Somebody fills a shard's memory with other values, and leases as many of them as it may."""
    done = threading.Event()
    thread = threading.Thread(target=_hog, args=(scene.bed.shards[name].direct, done))
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _hog(url: str, done: threading.Event) -> None:
    space = Namespace(kind="kv", model="faults/hog", dtype="uint8", layout="flat", block_size=16)
    values = [np.full(HOG_NBYTES, 7, np.uint8)] * HOG_BATCH
    with mmcache.connect(url, deadline_s=1.0, lazy=True) as cache:
        cache.announces = False
        held: list[LeasedFrames] = []
        number = 0
        while not done.wait(0.05):
            keys = Keys.of([opaque_key(space, f"{number}/{row}".encode()) for row in range(HOG_BATCH)])
            cache.put(keys, values)
            held.append(cache.acquire(keys))
            number += 1
        for leased in held:
            leased.release()


@contextlib.contextmanager
def out_of_memory(scene: Scene, name: str) -> Iterator[None]:
    """A server under its holder may take hardly any more memory: the kernel kills it wherever it needs some."""
    shard = scene.bed.shards[name]
    with limited(shard.pid, name):
        yield
    shard.answers()


@contextlib.contextmanager
def kill_redis(scene: Scene, name: str) -> Iterator[None]:
    """SIGKILL Redis; it comes back knowing nothing."""
    scene.bed.redis.kill()
    yield
    scene.bed.redis.start()


@contextlib.contextmanager
def stop_redis(scene: Scene, name: str) -> Iterator[None]:
    """SIGSTOP Redis: connections stand and nothing answers."""
    scene.bed.redis.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        scene.bed.redis.signal(signal.SIGCONT)


@contextlib.contextmanager
def join(scene: Scene, name: str) -> Iterator[None]:
    """A shard joins, with hardly any memory; then it is asked to end, and says that it leaves."""
    shard = scene.bed.shards[name]
    shard.start()
    try:
        yield
    finally:
        shard.end(signal.SIGTERM)


@contextlib.contextmanager
def drain(scene: Scene, name: str) -> Iterator[None]:
    """A shard is taken out of all views, as `mmcache cluster drain` does, and back in."""
    link = RedisLink(parse_members_url(parse_cluster_url(scene.bed.join).members))
    member = scene.bed.shards[name].id

    def said(undo: bool) -> bool:
        with contextlib.suppress(MMCacheError), link.open() as connection:
            link.drain(connection, member, undo=undo)
            return True
        return False

    eventually(lambda: said(undo=False), f"Redis takes {name} out")
    try:
        yield
    finally:
        eventually(lambda: said(undo=True), f"Redis takes {name} back in")


def kinds(clients: tuple[str, ...]) -> dict[str, Kind]:
    """All there are."""
    relays = ("s0", "s3")
    always = ("s0", "s1", "s2", "s3")
    return {
        "kill": Kind(kill, ("s0", "s2"), 0.5, 5.0),
        "kill held": Kind(kill_held, ("s1", "s3"), 0.5, 1.0),
        "replace": Kind(replace, ("s1", "s3"), 0.5, 1.0),
        "stop": Kind(stop, always, PAST_LEASES_S, PAST_LEASES_S + 2),
        "stop client": Kind(stop_client, clients, PAST_LEASES_S, PAST_LEASES_S + 2),
        "kill client": Kind(kill_client, clients, 0.5, 2.0),
        "partition": Kind(partition, ("s2",), 3.0, 10.0),
        "delay": Kind(relayed("delay 0.05"), relays, 3.0, 6.0),
        "stall": Kind(relayed("stall"), relays, 2.0, 5.0),
        "cut": Kind(relayed("cut"), relays, 3.0, 6.0),
        "lose": Kind(relayed("lose"), relays, 3.0, 6.0),
        "full": Kind(full, always, 3.0, 6.0),
        "out of memory": Kind(out_of_memory, ("s1", "s3"), 2.0, 5.0),
        "kill redis": Kind(kill_redis, ("redis",), 1.0, 9.0),
        "stop redis": Kind(stop_redis, ("redis",), 2.0, 8.0),
        "join": Kind(join, ("s4",), 5.0, 10.0),
        "drain": Kind(drain, always, 3.0, 6.0, also=("redis",)),
    }
