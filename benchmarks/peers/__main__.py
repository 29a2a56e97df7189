"""Real caches beside mmcache, on the same keys and bytes: `make bench-peers`, or

    python -m benchmarks.peers [--peers NAME,NAME] [--quick] [--json FILE] [--html FILE]

Installs what is missing, starts each peer in turn, prints one table. Exits with 1 if a peer delivered wrong bytes, or a
control, which does so on purpose, was not caught; a peer that cannot be installed or started is in the table with its
reason. docs/bench.md says how to read it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.isolate import isolate
from benchmarks.peers.page import peers_page
from benchmarks.peers.plan import FULL, QUICK
from benchmarks.peers.registry import CONTROLS, PEERS
from benchmarks.peers.report import markdown
from benchmarks.peers.run import install_all, measure
from mmcache.bench.report import host


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The command line; exits with 2 and a reason if it is not one. The controls are always among the peers."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peers", default=",".join(PEERS), help="which, with commas (default: all)")
    parser.add_argument("--quick", action="store_true", help="two pairs a case: to see that it works, not to compare")
    parser.add_argument("--json", metavar="FILE", help="write the figures; -: to stdout, instead of the table")
    parser.add_argument("--html", metavar="FILE", help="write a report for a browser")
    parser.add_argument(
        "--environments", metavar="FOLDER", type=Path, default=Path(".peers"), help="where they are installed"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bytes")
    options = parser.parse_args(words)
    names = [name.strip() for name in options.peers.split(",") if name.strip()]
    unknown = [name for name in names if name not in PEERS]
    if unknown or not names:
        parser.error(f"no peer {', '.join(unknown) or 'named'}: choose from {', '.join(PEERS)}")
    options.peers = list(dict.fromkeys([*names, *CONTROLS]))
    if options.seed < 0:
        parser.error("the seed is negative: choose 0 or more")
    return options


def main(words: Sequence[str]) -> int:
    """Install, measure, report; the exit code."""
    options = parse(words)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, on which all servers are stopped
    environments = options.environments.absolute()
    failed = install_all(options.peers, environments)
    refused = isolate()
    network = f"shared with this machine: no namespace of its own, {refused}" if refused else ""
    plan = QUICK if options.quick else FULL
    report = measure(options.peers, failed, plan, environments, options.seed, _tell)
    found = report.to_dict(network, host())
    if options.json and options.json != "-":
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
    if options.html:
        command = shlex.join(["python", "-m", "benchmarks.peers", *words])
        Path(options.html).write_text(peers_page(found, command))
    print(json.dumps(found) if options.json == "-" else markdown(report, network))
    return 0 if report.ok else 1


def _tell(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
