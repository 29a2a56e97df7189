"""A cluster of real processes in trouble: servers, clients and Redis killed, stopped, cut off, filled, and healed.

    python -m tests.faults [--minutes 10] [--seed N] [--html FILE] [--json FILE]

Four shards of `mmcache serve`, joined through a real redis-server, and four client processes that compare every byte.
Exits 1 if a byte was wrong, an exception reached a caller, a call ended later than 0.1 s after its deadline, something
was left behind, a process died of itself, or the hit rate did not return. docs/faults.md has what is tried.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from pathlib import Path

from rich.console import Console

MINUTES = 10.0


def main(arguments: list[str] | None = None) -> int:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"in all (default: {MINUTES:g})")
    parser.add_argument("--seed", type=int, help="of the faults and the traffic (default: another one each time)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with the timeline")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found; -: to stdout, not the table")
    options = parser.parse_args(arguments)
    if not shutil.which("redis-server"):
        parser.error("no redis-server on PATH: bash tests/install-redis.sh installs it where apt-get may be used")
    from tests.faults.report.page import page
    from tests.faults.report.summary import summary
    from tests.faults.report.text import show
    from tests.faults.suite import run

    seed = random.randrange(10**6) if options.seed is None else options.seed
    command = f"python -m tests.faults --minutes {options.minutes:g} --seed {seed}"
    began_s = time.monotonic()
    error = Console(stderr=True)

    def say(what: str) -> None:
        error.print(f"[dim]{time.monotonic() - began_s:6.1f} s[/dim]  {what}", highlight=False)

    error.print(command)
    found = summary(run(seed, options.minutes * 60, say), command)
    if options.json == Path("-"):
        print(json.dumps(found))
    else:
        show(found, Console())
        if options.json:
            options.json.write_text(json.dumps(found, indent=1))
    if options.html:
        options.html.write_text(page(found))
    return 1 if found["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
