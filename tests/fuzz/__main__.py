"""Fuzzes what reads bytes from outside: frames, the server's side of the protocol, the client's, and gRPC bodies.

    python -m tests.fuzz [--bytes 10000000] [--seconds 900] [TARGET ...]
    python -m tests.fuzz TARGET --reproduce FILE

Prints one line a target: how many inputs and bytes it was given, how long that took, its peak resident memory, and how
many inputs broke it. Such an input is kept under .fuzz/crashes, and the command that reproduces it is printed. What is
interesting for coverage is kept under .fuzz/corpus for the next run. Exits 1 if there was a crash, or if a target did
not get its bytes in time.
"""

from __future__ import annotations

import argparse
import importlib.util
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final, NamedTuple

from tests.fuzz.bed import regressions
from tests.fuzz.targets import REAL, TARGETS, start, unavailable

ROOT: Final = Path(__file__).resolve().parents[2]
HANG_S: Final = 30  # for libFuzzer, behind the targets' own limits
RSS_LIMIT_MIB: Final = 1024


class Outcome(NamedTuple):
    """What became of one target: see `line`."""

    name: str
    inputs: int
    nbytes: int
    seconds: float
    peak_rss: int
    crashes: tuple[Path, ...]
    code: int

    def line(self) -> str:
        """For people and for scripts."""
        return (
            f"{self.name}: inputs={self.inputs} bytes={self.nbytes} seconds={self.seconds:.1f} "
            f"peak_rss={self.peak_rss >> 20}MiB crashes={len(self.crashes)}"
        )


def fuzz(name: str, nbytes: int, seconds: int, folder: Path, seed: int = 0) -> Outcome:
    """Run one target in a process of its own; its output goes to FOLDER/TARGET.log."""
    corpus, crashes = folder / "corpus" / name, folder / "crashes"
    corpus.mkdir(parents=True, exist_ok=True)
    crashes.mkdir(parents=True, exist_ok=True)
    for path in regressions(name):
        (corpus / path.name).write_bytes(path.read_bytes())
    target = start(name)
    for number, data in enumerate(target.seeds()):
        (corpus / f"seed-{number:02}").write_bytes(data)
    target.close()
    before = set(crashes.iterdir())
    options = [
        f"-artifact_prefix={crashes}/{name}-",
        f"-max_total_time={seconds}",
        f"-timeout={HANG_S}",
        f"-rss_limit_mb={RSS_LIMIT_MIB}",
        f"-seed={seed}",
        str(corpus),
    ]
    with tempfile.NamedTemporaryFile() as counts, (folder / f"{name}.log").open("wb") as log:
        counts.write(bytes(24))
        counts.flush()
        command = [sys.executable, "-m", "tests.fuzz.drive", name, counts.name, str(nbytes), *options]
        begin = time.monotonic()
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        process.wait()
        took_s = time.monotonic() - begin
        inputs, fed_nbytes, peak_rss = struct.unpack("<QQQ", Path(counts.name).read_bytes())
    found = tuple(sorted(set(crashes.iterdir()) - before))
    return Outcome(name, inputs, fed_nbytes, took_s, peak_rss, found, process.returncode)


def report(outcome: Outcome, nbytes: int, folder: Path) -> bool:
    """Print what became of a target; whether all is well."""
    print(outcome.line(), flush=True)
    log = folder / f"{outcome.name}.log"
    if outcome.crashes or outcome.code:
        print("".join(f"    {line}\n" for line in log.read_text(errors="replace").splitlines()[-30:]))
        for path in outcome.crashes:
            print(f"  reproduce: {sys.executable} -m tests.fuzz {outcome.name} --reproduce {path}")
        if not outcome.crashes:
            print(f"  it ended with {outcome.code} and no input to blame: see {log}")
        return False
    if outcome.nbytes < nbytes:
        print(f"  its time was up after {outcome.nbytes} of {nbytes} bytes; give it more with --seconds")
        return False
    return True


def reproduce(name: str, file: Path) -> int:
    """Feed one input to a target, without a fuzzer; what it raises is shown."""
    target = start(name)
    try:
        target.check(file.read_bytes())
    finally:
        target.close()
    print(f"{name}: {file} breaks nothing")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"{', '.join(REAL)} (default: all)")
    parser.add_argument("--bytes", type=int, default=10_000_000, help="how many each is given (default: 10000000)")
    parser.add_argument("--seconds", type=int, default=900, help="the most time each may take (default: 900)")
    parser.add_argument("--seed", type=int, default=0, help="of the fuzzer; 0: another one each time")
    parser.add_argument("--folder", type=Path, default=ROOT / ".fuzz", help="for corpora, crashes and logs")
    parser.add_argument("--reproduce", type=Path, metavar="FILE", help="feed this one input to TARGET")
    options = parser.parse_args(arguments)
    names = options.targets or REAL
    if unknown := set(names) - TARGETS:
        parser.error(f"no target {', '.join(sorted(unknown))}; there are {', '.join(REAL)}")
    if options.reproduce:
        if len(options.targets) != 1:
            parser.error("--reproduce needs one TARGET")
        return reproduce(names[0], options.reproduce)
    if importlib.util.find_spec("atheris") is None:
        parser.error("atheris is not installed; it comes with the test extra on x86_64 (python -m pip install atheris)")
    good = True
    for name in names:
        if reason := unavailable(name):
            print(f"{name}: skipped, {reason}")
            continue
        good &= report(
            fuzz(name, options.bytes, options.seconds, options.folder, options.seed), options.bytes, options.folder
        )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
