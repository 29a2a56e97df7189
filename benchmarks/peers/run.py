"""The whole run: every peer in turns, and what was found."""

from __future__ import annotations

import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.peers.install import PeerError, install, need
from benchmarks.peers.plan import CONTROL_PAIRS, OPS, VIEW, Case, Plan, Row, Sample, row_of
from benchmarks.peers.registry import PEERS
from benchmarks.peers.report import Report
from benchmarks.peers.team import Source, Team
from mmcache.errors import MMCacheError

Key = tuple[str, int, str, Case]
MEMORY_FOLDER = "/dev/shm"


def install_all(names: Sequence[str], environments: Path) -> dict[str, str]:
    """Install what the peers need; those that cannot be installed, with the reason."""
    failed = {}
    for name in names:
        peer = PEERS[name]
        try:
            if peer.system:
                need(*peer.system)
            if peer.environment:
                install(environments, peer.environment)
        except PeerError as error:
            failed[name] = f"not installed: {error}"
    return failed


def measure(
    names: Sequence[str],
    failed: dict[str, str],
    plan: Plan,
    environments: Path,
    seed: int,
    told: Callable[[str], None],
) -> Report:
    """Measure all that are not in `failed`, where those that cannot be started or used are added."""
    samples: dict[Key, list[Sample]] = defaultdict(list)
    started = time.monotonic()
    folder = MEMORY_FOLDER if os.path.isdir(MEMORY_FOLDER) else None
    with tempfile.NamedTemporaryFile(prefix="peers-source-", dir=folder) as file:
        source = Source(file.name, plan.client_nbytes, max(plan.clients), seed)
        for turn in range(plan.turns):
            shift = turn * len(names) // plan.turns
            for name in [*names[shift:], *names[:shift]]:
                if name in failed or (turn and PEERS[name].control):
                    continue
                told(f"turn {turn + 1} of {plan.turns}: {name}")
                try:
                    for clients in plan.clients:
                        _turn(name, clients, plan, turn, source, environments, samples)
                except (PeerError, MMCacheError, OSError) as error:
                    failed[name] = str(error)
                    told(f"{name}: {error}")
    return Report(
        rows=_rows(samples, failed, plan, names),
        failed=dict(failed),
        plan=plan,
        seed=seed,
        wall_s=time.monotonic() - started,
    )


def _turn(
    name: str,
    clients: int,
    plan: Plan,
    turn: int,
    source: Source,
    environments: Path,
    samples: dict[Key, list[Sample]],
) -> None:
    peer = PEERS[name]
    pairs = CONTROL_PAIRS if peer.control else plan.pairs
    with Team(peer, environments, source, clients) as team:
        for case in plan.cases:
            team.round(case, turn, 0)  # warms up
            for pair in range(pairs):
                for op, sample in team.round(case, turn, 1 + pair).items():
                    samples[name, clients, op, case].append(sample)


def _rows(samples: dict[Key, list[Sample]], failed: dict[str, str], plan: Plan, names: Sequence[str]) -> list[Row]:
    """Those of peers that were there to the end, or delivered wrong bytes before."""
    rows = []
    for clients in plan.clients:
        for name in names:
            for op in (*OPS, VIEW):
                for case in plan.cases:
                    found = samples.get((name, clients, op, case), [])
                    if found and (name not in failed or any(sample.wrong for sample in found)):
                        verified = PEERS[name].verified and op != VIEW  # what is only seen nobody has checked
                        rows.append(row_of(name, verified, op, case, clients, found))
    return rows
