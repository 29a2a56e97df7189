"""The engine process of bench_vllm.py: the suite's worker, with clocks on the connector's calls and on decode steps.

`python -m benchmarks.vllm_worker SETTINGS`, spoken to as `tests.engines.vllm.worker`.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, Final

from tests.engines.vllm.worker import Worker, serve

SCHEDULER_CALLS: Final = (
    "on_new_request",
    "get_num_new_matched_tokens",
    "update_state_after_alloc",
    "build_connector_meta",
    "update_connector_output",
    "request_finished_all_groups",
)
STEP_CALLS: Final = ("get_kv_connector_stats",)  # of the scheduler's side: of its thread's CPU, no part of scheduling
WORKER_CALLS: Final = (
    "start_load_kv",
    "wait_for_layer_load",
    "save_kv_layer",
    "wait_for_save",
    "get_transfer_results",
    "build_connector_worker_meta",
    "get_block_ids_with_load_errors",
    "get_kv_connector_stats",
)


class BenchWorker(Worker):
    """One engine, whose connector's calls are timed from the start."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        self._wall_s: dict[str, list[float]] = defaultdict(list)
        self._cpu_s = 0.0  # of connector calls, on the engine's thread
        self._clocked: list[tuple[Any, str, Callable[..., Any]]] = []  # owner, name, the call with a clock
        self._connector = self.core.scheduler.connector
        if self._connector is not None:
            from vllm.distributed.kv_transfer import get_kv_transfer_group

            scheduler = self._connector, (*SCHEDULER_CALLS, *STEP_CALLS)
            for owner, names in (scheduler, (get_kv_transfer_group(), WORKER_CALLS)):
                for name in filter(functools.partial(hasattr, owner), names):
                    self._clocked.append((owner, name, self._timed(name, getattr(owner, name))))
        self._start_clocks()

    def _timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        times = self._wall_s[name]

        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            wall_s, cpu_s = time.perf_counter(), time.thread_time()
            try:
                return call(*args, **kwargs)
            finally:
                self._cpu_s += time.thread_time() - cpu_s
                times.append(time.perf_counter() - wall_s)

        return timed

    def scheduler_calls(self) -> list[float]:
        """Seconds of every call from vLLM's scheduler to its connector since this was asked last."""
        found = [seconds for name in SCHEDULER_CALLS for seconds in self._wall_s.get(name, ())]
        for times in self._wall_s.values():
            times.clear()
        return found

    def _start_clocks(self) -> None:
        for owner, name, timed in self._clocked:
            setattr(owner, name, timed)

    @contextlib.contextmanager
    def _without_clocks(self) -> Iterator[None]:
        """The connector as it is: clocks on some 60 calls a step cost about as much as the calls."""
        for owner, name, _ in self._clocked:
            delattr(owner, name)
        try:
            yield
        finally:
            self._start_clocks()

    @contextlib.contextmanager
    def _without_connector(self) -> Iterator[None]:
        """The same engine, with the same memory, as it runs without a connector: two processes differ by more than a
        connector's decode steps cost. For requests that begin and end in here."""
        from vllm.distributed.kv_transfer import kv_transfer_state as worker

        scheduler, agent = self.core.scheduler, worker._KV_CONNECTOR_AGENT
        scheduler.connector = worker._KV_CONNECTOR_AGENT = None
        try:
            yield
        finally:
            scheduler.connector, worker._KV_CONNECTOR_AGENT = self._connector, agent

    def decode(self, prompts: list[list[int]], steps: int, how: str) -> dict[str, float]:
        """Prefill the prompts, then run decode steps of all of them together, `how`: with the connector ("async"), as
        if there were none ("bypassed"), or with clocks on its calls ("clocked"). Seconds a step: `wall_s`; `cpu_s`, of
        all threads of this process; `own_s`, of those the connector's threads and, with clocks, its calls."""
        arms: dict[str, Callable[[], contextlib.AbstractContextManager[None]]]
        arms = {"async": self._without_clocks, "bypassed": self._without_connector, "clocked": contextlib.nullcontext}
        with arms[how]():
            return self._decode(prompts, steps)

    def _decode(self, prompts: list[list[int]], steps: int) -> dict[str, float]:
        for number, tokens in enumerate(prompts):
            params = self._params({"max_tokens": steps + len(prompts) + 8})
            self.engine.add_request(f"decode-{number}", {"prompt_token_ids": tokens}, params)
        begun: set[str] = set()
        while len(begun) < len(prompts):
            begun |= {output.request_id for output in self.engine.step() if output.outputs[0].token_ids}
        self.engine.step()
        wall_s, cpu_s, own_s = time.perf_counter(), time.process_time(), self._own_s()
        for _ in range(steps):
            self.engine.step()
        found = {
            "wall_s": (time.perf_counter() - wall_s) / steps,
            "cpu_s": (time.process_time() - cpu_s) / steps,
            "own_s": (self._own_s() - own_s) / steps,
        }
        self.engine.abort_request([f"decode-{number}" for number in range(len(prompts))])
        while self.engine.has_unfinished_requests():
            self.engine.step()
        return found

    def _own_s(self) -> float:
        """CPU seconds so far of the connector: its calls on the engine's thread, and its threads."""
        clocks = [
            time.pthread_getcpuclockid(thread.ident)
            for thread in threading.enumerate()
            if thread.name.startswith("mmcache") and thread.ident is not None
        ]
        return self._cpu_s + sum(time.clock_gettime(clock) for clock in clocks)


if __name__ == "__main__":
    serve(BenchWorker)
