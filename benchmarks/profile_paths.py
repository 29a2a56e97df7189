"""Where the time goes in each hot path: py-spy looks at a client and its server that do one thing again and again.

    pip install py-spy
    python benchmarks/profile_paths.py --op put --seconds 5

Prints a table for each process: the functions that were running, and their share of the samples in which something ran.
With --native also those of C. Needs the right to look into one's own processes (kernel.yama.ptrace_scope, or root).
"""

from __future__ import annotations

import argparse
import select
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

import mmcache
from mmcache.testing.process import ServerProcess

MiB = 1 << 20
TOP = 12
OPS = {  # name: (bytes a value, values a call, options)
    "get": (MiB, 64, ""),
    "put": (MiB, 64, ""),
    "acquire": (MiB, 64, ""),
    "small-get": (MiB >> 4, 1, ""),
    "small-put": (MiB >> 4, 1, ""),
    "tcp-get": (MiB, 64, "?transport=tcp"),
    "tcp-put": (MiB, 64, "?transport=tcp"),
}


def client(url: str, op: str) -> None:
    """Do `op` until stdin ends. Says "ready" once it is under way."""
    nbytes, count, options = OPS[op]
    source = np.random.default_rng(0).integers(0, 255, nbytes * count, dtype=np.uint8)
    target = np.zeros_like(source)
    values = [source[at : at + nbytes] for at in range(0, len(source), nbytes)]
    into = [target[at : at + nbytes] for at in range(0, len(target), nbytes)]
    namespace = mmcache.Namespace(kind="kv", model="benchmark/none", dtype="uint8", layout="flat", block_size=16)
    with mmcache.connect(url + options) as cache:
        keys = namespace.hasher().extend(list(range(16 * count)))
        if not all(cache.put(keys, values)):
            raise SystemExit("the values could not be stored")

        def put() -> None:
            cache.delete(keys)
            cache.put(keys, values)

        calls: dict[str, Callable[[], object]] = {
            "get": lambda: cache.get_into(keys, into),
            "put": put,
            "acquire": lambda: cache.acquire(keys).release(),
        }
        call = calls[op.rpartition("-")[2]]
        call()
        print("ready", flush=True)
        while not _ended():
            for _ in range(20):
                call()


def _ended() -> bool:
    return bool(select.select([sys.stdin], [], [], 0)[0])


def profile(pid: int, seconds: float, native: bool) -> Counter[str]:
    """Samples by the function that was running, of one process, its idle threads left out."""
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw"
        command = ["py-spy", "record", "--pid", str(pid), "--duration", f"{seconds:g}", "--rate", "500"]
        command += ["--format", "raw", "--nonblocking", "--output", str(raw)]
        if native:
            command[-3:-2] = ["--native"]
        ended = subprocess.run(command, capture_output=True, text=True)
        if ended.returncode or not raw.exists():
            raise SystemExit(f"py-spy did not work: {ended.stderr.strip() or ended.stdout.strip()}")
        found: Counter[str] = Counter()
        for line in raw.read_text().splitlines():
            stack, _, count = line.rpartition(" ")
            found[stack.rpartition(";")[2]] += int(count)
    return found


def table(title: str, found: Counter[str]) -> str:
    """The functions most often seen running, in Markdown."""
    total = sum(found.values())
    rows = [f"| {title} | share |", "|---|---|"]
    rows += [f"| `{name}` | {count / total:.1%} |" for name, count in found.most_common(TOP)]
    return "\n".join(rows)


def main() -> None:
    """Profile the ops that were asked for, one process at a time: a sampler needs a core too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=sorted(OPS), action="append", help="may repeat; default: all")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each process (default: 5)")
    parser.add_argument("--native", action="store_true", help="show functions of C too")
    parser.add_argument("--client", nargs=2, metavar=("URL", "OP"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.client:
        client(*chosen.client)
        return
    if shutil.which("py-spy") is None:
        raise SystemExit("py-spy is not installed; pip install py-spy")
    for op in chosen.op or OPS:
        with ServerProcess("1GiB", "--prefault") as server:
            command = [sys.executable, __file__, "--client", server.url, op]
            with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as worker:
                assert worker.stdout is not None
                if worker.stdout.readline().strip() != "ready":
                    raise SystemExit(f"the client of {op} did not begin")
                for title, pid in ((f"{op}: client", worker.pid), (f"{op}: server", server.pid)):
                    print(table(title, profile(pid, chosen.seconds, chosen.native)), end="\n\n", flush=True)
                worker.communicate("end\n")


if __name__ == "__main__":
    main()
