"""One run: the cluster, its clients, quiet, trouble from a seed, healing, quiet again, and what is left at the end."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from tests.faults.check.found import STEP_S, Happened, Run, may_yet_be_back
from tests.faults.check.held import open_of, what_is_held
from tests.faults.fault.bed import DEADLINE_S, LEASE_S, Bed, until
from tests.faults.fault.kinds import Kind, Scene, kinds
from tests.faults.fault.schedule import Planned, plan
from tests.faults.traffic.processes import Clients
from tests.faults.traffic.records import read_calls, read_troubles
from tests.faults.traffic.sleeper import read_naps

WARM_S: Final = 6.0  # until everything that is asked for is stored
QUIET_S: Final = 6.0  # before the trouble, and at the end: what hit rates are compared between
SETTLE_S: Final = 12.0  # after the last fault is healed: breakers, views, values to be stored again
BACK_S: Final = 60.0  # after it, by which hit rates must be back however often the machine stood still
SWEEP_S: Final = LEASE_S + 4.0  # until what nobody released must be free
CLIENTS: Final = {"c0": (1, "auto"), "c1": (1, "tcp"), "c2": (2, "auto"), "c3": (2, "tcp")}  # replicas, transport
Say = Callable[[str], None]


@dataclass
class _Trouble:
    """The faults of a run, each on a thread of its own. One whose target is not well again yet waits for that."""

    scene: Scene
    known: dict[str, Kind]
    began_s: float
    happened: list[Happened] = field(default_factory=list)
    befallen: defaultdict[str, threading.Lock] = field(default_factory=lambda: defaultdict(threading.Lock))

    def run(self, planned: list[Planned], say: Say) -> None:
        """Until the last one is healed."""
        threads = [threading.Thread(target=self._one, args=(one, say), name=one.kind) for one in planned]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _one(self, planned: Planned, say: Say) -> None:
        over = self.scene.bed.over
        if not until(self.began_s + planned.begin_s, over):
            return
        kind = self.known[planned.kind]
        with contextlib.ExitStack() as stack:
            for one in sorted({planned.target, *kind.also}):
                stack.enter_context(self.befallen[one])
            happened = Happened(planned.kind, planned.target, time.monotonic())
            self.happened.append(happened)
            say(f"{planned.kind} {planned.target}")
            try:
                with kind.befall(self.scene, planned.target):
                    over.wait(planned.length_s)
                    happened.heal_s = time.monotonic()
            except Exception as error:  # whatever it was, the fault is not healed
                happened.error = repr(error)
            happened.end_s = time.monotonic()


def run(seed: int, seconds: float, say: Say = lambda what: None) -> Run:
    """Everything, in about so many seconds; what was seen."""
    with tempfile.TemporaryDirectory(prefix="mmcache-faults-") as name, Bed() as bed:
        folder = Path(name)
        before = {shard.name: open_of(shard.pid) for shard in bed.shards.values() if shard.name != "s4"}
        urls = {lane: (bed.url(*how), f"r{how[0]}") for lane, how in CLIENTS.items()}
        with _sleeper(folder), Clients(urls, seed, folder) as clients:
            began_s = time.monotonic()
            scene = Scene(bed, clients)
            known = {kind: one for kind, one in kinds(tuple(CLIENTS)).items() if kind not in bed.left_out}
            say("quiet")
            bed.wait(WARM_S + QUIET_S)
            trouble_s = time.monotonic()
            # Of a short run the trouble is still the greater part.
            around_s = WARM_S + 2 * QUIET_S + SETTLE_S + SWEEP_S
            trouble = _Trouble(scene, known, trouble_s)
            trouble.run(plan(seed, max(seconds - around_s, seconds / 4), known), say)
            healed_s = time.monotonic()
            say("healed")

            def seen(ended_s: float) -> Run:
                """What was, until then."""
                return Run(
                    seed=seed,
                    deadline_s=DEADLINE_S,
                    began_s=began_s,
                    trouble_s=trouble_s,
                    healed_s=healed_s,
                    quiet_s=ended_s - QUIET_S,
                    ended_s=ended_s,
                    happened=sorted(trouble.happened, key=lambda one: one.begin_s),
                    lanes=[*bed.shards, "redis", *CLIENTS],
                    populations={lane: population for lane, (_, population) in urls.items()},
                    calls={life.stem: read_calls(folder / f"{life.stem}.calls") for life in clients.lives},
                    troubles={life.stem: read_troubles(folder / f"{life.stem}.troubles") for life in clients.lives},
                    lives=[
                        {
                            "stem": life.stem,
                            "code": life.code,
                            "killed": life.killed,
                            "told": life.told,
                            "said": life.said,
                        }
                        for life in clients.lives
                    ],
                    naps=read_naps(folder / "naps"),
                    left_out=bed.left_out,
                )

            bed.wait(SETTLE_S + QUIET_S)
            while may_yet_be_back(seen(ended_s := time.monotonic()), SETTLE_S) and ended_s < healed_s + BACK_S:
                bed.wait(STEP_S)
            say("what is left")
            clients.end()
        held = {
            name: what_is_held(shard, before[name], SWEEP_S) for name, shard in bed.shards.items() if name in before
        }
        for shard in bed.shards.values():
            if shard.server.process is not None:
                shard.end(signal.SIGTERM)
        servers = {shard.name: {"codes": shard.codes, "said": shard.said} for shard in bed.shards.values()}
        return replace(seen(ended_s), held=held, servers=servers)


@contextlib.contextmanager
def _sleeper(folder: Path) -> Iterator[None]:
    words = [sys.executable, "-m", "tests.faults.traffic.sleeper", str(folder / "naps")]
    process = subprocess.Popen(words)
    try:
        yield
    finally:
        process.kill()
        process.wait()
