"""The cluster that is tried: real servers, one behind a bad network and one in a namespace, joined through real Redis.

s0  plain, reached through a relay          s2  in a network namespace of its own (plain where there is none)
s1  held: its memory outlives its process   s3  held, and reached through a relay
s4  joins and leaves, with hardly any memory
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from typing import Any, Final

import mmcache
from mmcache.errors import MMCacheError
from mmcache.testing.ports import own_ports
from mmcache.testing.process import ServerProcess, children_of
from mmcache.testing.values import eventually
from tests.faults.fault.memory import NoLimit, check
from tests.faults.fault.network import HERE, THERE, Network, NoNetwork
from tests.faults.fault.relay import Relay
from tests.integration.redis_bed import Redis

DEADLINE_S: Final = 1.0
LEASE_S: Final = 4 * DEADLINE_S
IO_TIMEOUT_S: Final = 2.0
BACK_S: Final = 30.0  # until a healed shard must answer
MEMORY: Final = "64MiB"
TINY: Final = "4MiB"
CLUSTER: Final = "faults"


class Shard:
    """One server, started and killed as often as need be, always at the same address, which is its id, too.

    `said`: what each of its processes wrote; `codes`: with what those ended that were asked to.
    """

    def __init__(
        self,
        name: str,
        join: str,
        *words: str,
        memory: str = MEMORY,
        host: str = "127.0.0.1",
        under: Sequence[str] = (),
        relayed: bool = False,
        hold: bool = False,
    ) -> None:
        self.name, self.hold = name, hold
        (self.port,) = own_ports()
        self.direct = f"mmcache://{host}:{self.port}"
        self.relay = Relay(own_ports()[0], self.port) if relayed else None
        self.id = f"127.0.0.1:{self.relay.port}" if self.relay else self.direct.partition("://")[2]
        # Without a unix socket there is no shared memory, and so no way around the relay.
        arguments = ["--join", join, "--weight", "1", *words, *(["--unix", ""] if relayed else [])]
        arguments += ["--advertise", f"mmcache://{self.id}"] + ["--hold"] * hold
        self.server = ServerProcess(
            memory,
            *arguments,
            listen=self.direct.partition("://")[2],
            environment={
                "MMCACHE_LEASE_S": str(LEASE_S),
                "MMCACHE_IO_TIMEOUT_S": str(IO_TIMEOUT_S),
                "MMCACHE_DRAIN_S": "1",
            },
            under=under,
        )
        self.said: list[str] = []
        self.codes: list[int] = []

    @property
    def pid(self) -> int:
        """Of the process that serves, under its holder or alone."""
        return children_of(self.server.pid)[0] if self.hold else self.server.pid

    def start(self) -> None:
        """Start it, and wait until it accepts."""
        self.server.start()

    def end(self, number: int) -> None:
        """Send the signal and wait for the end, of the holder too where there is one."""
        code = self.server.stop(number)
        if code != -number:
            self.codes.append(code)
        self.said.append(self.server.said)

    def stat(self) -> dict[str, Any]:
        """What it says of itself, past any relay; nothing if it does not answer."""
        with contextlib.suppress(MMCacheError, OSError), mmcache.connect(self.direct, deadline_s=DEADLINE_S) as cache:
            return cache.stat()
        return {}

    def server_id(self) -> str:
        """Of who serves now; waited for."""
        return str(eventually(lambda: self.stat().get("server_id"), f"{self.name} answers", BACK_S))

    def answers(self, before: str = "") -> None:
        """Wait until it does; until another than `before` does, a server id."""
        eventually(lambda: self.stat().get("server_id", before) != before, f"{self.name} answers again", BACK_S)


class Bed:
    """Redis, the servers, the relays and the namespace. Use as a context manager.

    `left_out` says which faults cannot be tried here, and why; `over` is set once the run is over, or given up.
    """

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self.left_out: dict[str, str] = {}
        self.network: Network | None = None
        self.shards: dict[str, Shard] = {}
        self.over = threading.Event()

    def __enter__(self) -> Bed:
        with contextlib.ExitStack() as stack:
            try:
                self.network = stack.enter_context(Network())
            except NoNetwork as error:
                self.left_out["partition"] = str(error)
            try:
                check()
            except NoLimit as error:
                self.left_out["out of memory"] = str(error)
            words = ("--bind", "127.0.0.1", HERE, "--protected-mode", "no") if self.network else ()
            self.redis = stack.enter_context(Redis(*words, port=own_ports()[0]))
            self._make()
            for shard in self.shards.values():
                if shard.relay is not None:
                    stack.enter_context(shard.relay)
                if shard.name != "s4":
                    shard.start()
                stack.callback(shard.server.stop)
            self._stack = stack.pop_all()
        return self

    def _make(self) -> None:
        here = f"mmcache+redis://127.0.0.1:{self.redis.port}/0?cluster={CLUSTER}"
        apart = f"mmcache+redis://{HERE}:{self.redis.port}/0?cluster={CLUSTER}"
        inside: dict[str, Any] = {"host": THERE, "under": Network.under} if self.network else {}
        self.join = here
        made: Sequence[Shard] = (
            Shard("s0", here, relayed=True),
            Shard("s1", here, hold=True),
            Shard("s2", apart if self.network else here, *["--insecure-network"] * bool(self.network), **inside),
            Shard("s3", here, relayed=True, hold=True),
            Shard("s4", here, memory=TINY),
        )
        self.shards = {shard.name: shard for shard in made}

    def url(self, replicas: int, transport: str) -> str:
        """Of the cluster. A client that starts while Redis is away goes on with those who are always there."""
        fallback = ",".join(shard.id for shard in self.shards.values() if shard.name != "s4")
        return f"{self.join}&fallback={fallback}&replicas={replicas}&deadline_s={DEADLINE_S}&transport={transport}"

    def wait(self, seconds: float) -> None:
        """That long, or until the run is given up."""
        self.over.wait(seconds)

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self._stack.close()


def until(moment_s: float, over: threading.Event) -> bool:
    """Wait for a moment of the monotonic clock; False if the run was given up before."""
    return not over.wait(max(0.0, moment_s - time.monotonic()))
