"""The workers of one peer, and one round with them: some write, others read, and memcpy goes before each."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.peers.install import PeerError, python_of
from benchmarks.peers.plan import VIEW, Case, Sample, name_of, readers_of
from benchmarks.peers.registry import Peer

ROOT = Path(__file__).resolve().parents[2]
ANSWER_S = 90.0
START_NS = 2_000_000  # from an order to when all begin

Orders = Sequence[Mapping[str, Any]]


class Source:
    """The bytes everybody moves: random, in a file that all workers map, so that they are the same for all peers."""

    def __init__(self, path: str, client_nbytes: int, clients: int, seed: int) -> None:
        self.path, self.client_nbytes = path, client_nbytes
        words = np.random.default_rng(seed).integers(0, 2**64, clients * client_nbytes // 8, dtype=np.uint64)
        words.tofile(path)
        self._words: npt.NDArray[np.uint64] = np.memmap(path, np.uint64, "r+")
        self._stamp = 0

    def stamp(self, case: Case, clients: int) -> None:
        """Begin and end every value of a round with a number that no value had before."""
        words = case.size_bytes // 8
        for client in range(clients):
            at = client * self.client_nbytes // 8
            values = self._words[at : at + case.count * words].reshape(case.count, words)
            numbers = np.arange(self._stamp, self._stamp + case.count, dtype=np.uint64)
            values[:, 0] = values[:, -1] = numbers
            self._stamp += case.count


class _Process:
    """A worker process. Ask, then take the answer: several asked before any answers work at the same time."""

    def __init__(self, python: Path, log: Path, settings: Mapping[str, str], source: Source) -> None:
        self._log = log
        words = [str(python), "-m", "benchmarks.peers.worker", source.path, str(source.client_nbytes)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **settings, "PYTHONPATH": str(ROOT)}
        with open(log, "wb") as err:
            self._process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=err, cwd=log.parent, env=environment
            )

    def ask(self, order: Mapping[str, Any]) -> None:
        """Send one order. Raises PeerError if the process has ended."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise PeerError(f"a worker ended: {self._last_words()}") from None

    def answer(self) -> Any:
        """Wait for its answer. Raises PeerError if it says an error, or nothing."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], ANSWER_S)[0]:
            raise PeerError(f"a worker did not answer in {ANSWER_S:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise PeerError(f"a worker ended: {self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer["value"]

    def _last_words(self) -> str:
        said = self._log.read_text(errors="replace").strip().splitlines()
        return said[-1] if said else "it said nothing"

    def end(self) -> None:
        """Close its stdin, on which it ends; kill it if it does not."""
        try:
            self._process.communicate(timeout=10)
        except (subprocess.TimeoutExpired, OSError):
            self._process.kill()
            self._process.communicate()


class Team:
    """A started peer with its workers; a context manager. Raises PeerError on entering if anything does not start."""

    def __init__(self, peer: Peer, environments: Path, source: Source, clients: int) -> None:
        self._peer, self._environments, self._source, self._clients = peer, environments, source, clients
        self._readers = readers_of(clients, peer.alone)
        self._stack = ExitStack()
        self._workers: list[_Process] = []

    def __enter__(self) -> Team:
        with ExitStack() as stack:
            run = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pb-", ignore_cleanup_errors=True)))
            peer = self._peer
            python = python_of(self._environments, peer.environment) if peer.environment else Path(sys.executable)
            count = max(self._clients, max(self._readers) + 1)
            options = peer.serve(run, self._environments, stack) if peer.serve else {}
            for place in range(count):
                worker = _Process(python, run / f"worker-{place}.log", peer.settings, self._source)
                stack.callback(worker.end)
                self._workers.append(worker)
            self._all(self._workers, [{"do": "open", "client": peer.client, "options": options}] * count)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        # If they cannot: what was measured stands, and the processes end now.
        with self._stack, contextlib.suppress(PeerError):
            self._all(self._workers, [{"do": "close"}] * len(self._workers))

    def round(self, case: Case, turn: int, pair: int) -> dict[str, Sample]:
        """One put and one get of the same values by all clients, and of batches a view, each after memcpy.

        Raises PeerError.
        """
        clients = self._clients
        self._source.stamp(case, clients)
        names = [[name_of(case, turn, pair, client, index) for index in range(case.count)] for client in range(clients)]
        writers = self._workers[:clients]
        readers = [self._workers[place] for place in self._readers]
        nbytes = case.nbytes * clients

        self._prepare(writers, "put", names, case)
        copies = self._copies(writers, poison=False)
        op_ns, each_ns = self._timed(writers, {"do": "put"})
        put = Sample(nbytes, *copies, op_ns, each_ns)

        handles = self._all(writers, [{"do": "handles"}] * clients)
        learn = [{"do": "learn", "names": own, "handles": got} for own, got in zip(names, handles, strict=True)]
        self._all(readers, learn)

        self._prepare(readers, "get", names, case)
        copies = self._copies(readers, poison=True)
        op_ns, each_ns = self._timed(readers, {"do": "get"})
        wrong = sum(self._all(readers, [{"do": "check"}] * clients))
        found = {"put": put, "get": Sample(nbytes, *copies, op_ns, each_ns, wrong, case.count * clients)}
        if case.batch > 1 and all(self._all(readers, [{"do": "can_view"}] * clients)):
            copies = self._copies(readers, poison=True)
            op_ns, each_ns = self._timed(readers, {"do": "view"})
            wrong = sum(self._all(readers, [{"do": "check"}] * clients))
            found[VIEW] = Sample(nbytes, *copies, op_ns, each_ns, wrong, case.count * clients)
        self._all(writers, [{"do": "delete", "names": own} for own in names])
        return found

    def _prepare(self, workers: Sequence[_Process], op: str, names: Sequence[Sequence[str]], case: Case) -> None:
        """Worker by worker, whose values: the part of the source that has the place of the names in `names`."""
        about = {"do": "prepare", "op": op, "size_bytes": case.size_bytes, "batch": case.batch}
        part = self._source.client_nbytes
        self._all(workers, [{**about, "names": own, "offset": at * part} for at, own in enumerate(names)])

    def _copies(self, workers: Sequence[_Process], poison: bool) -> tuple[int, int]:
        """Nanoseconds of memcpy, whole and in slices; what the peer does comes right after the latter."""
        found = []
        for whole in (True, False):
            if poison:
                self._all(workers, [{"do": "poison"}] * len(workers))
            found.append(self._timed(workers, {"do": "copy", "whole": whole})[0])
        if poison:
            self._all(workers, [{"do": "poison"}] * len(workers))
        return found[0], found[1]

    def _timed(self, workers: Sequence[_Process], order: Mapping[str, Any]) -> tuple[int, tuple[int, ...]]:
        """Nanoseconds from the first start to the last end, and of each call; all begin at the same moment."""
        at_ns = time.monotonic_ns() + START_NS
        parts = self._all(workers, [{**order, "at_ns": at_ns}] * len(workers))
        each_ns = tuple(ns for part in parts for ns in part.get("each_ns", ()))
        return max(part["end_ns"] for part in parts) - min(part["start_ns"] for part in parts), each_ns

    def _all(self, workers: Sequence[_Process], orders: Orders) -> list[Any]:
        for worker, order in zip(workers, orders, strict=True):
            worker.ask(order)
        return [worker.answer() for worker in workers]
