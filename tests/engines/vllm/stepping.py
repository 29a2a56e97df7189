"""The worker's requests that come, run and are aborted while the engine steps, and what became of each."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from vllm import LLM

PATIENCE_S = 60.0


class Stepping:
    """Drives one engine step by step; the worker makes vLLM's arguments of an ask, and its answer."""

    def __init__(self, llm: LLM, worker: Any) -> None:
        self._llm, self._worker = llm, worker
        self._engine: Any = llm.llm_engine
        self._scheduler: Any = self._engine.engine_core.engine_core.scheduler
        self._open: dict[str, tuple[str, dict[str, Any]]] = {}  # by name: vLLM's name, the ask
        self._last: dict[str, Any] = {}  # the newest output of each
        self._external: Counter[str] = Counter()  # tokens that came from the connector, by vLLM's name
        self._aborts: list[str] = []  # states in each of which one request is to be aborted
        self._preempted: Counter[str] = Counter()  # times, by vLLM's name
        self._forced = 0  # times that it was a reset
        self._ended: dict[str, dict[str, Any]] = {}
        if self._scheduler.connector is not None:
            self._count_external(self._scheduler.connector)

    def _count_external(self, connector: Any) -> None:
        allocated = connector.update_state_after_alloc

        def counting(request: Any, blocks: Any, external_tokens: int) -> None:
            self._external[request.request_id] += external_tokens
            allocated(request, blocks, external_tokens)

        connector.update_state_after_alloc = counting

    def advance(self, asks: dict[str, dict[str, Any]], steps: int, aborts: list[str]) -> dict[str, dict[str, Any]]:
        """Add these asks by name, run so many steps, fewer if nothing is left to run; what ended since the last call.

        `aborts` are added to the states in each of which one request is aborted once one is in it. An aborted request's
        answer is what it had said, with `finish` "abort STATE"; a refused one's says `error`.
        """
        self._aborts += aborts
        for name, ask in asks.items():
            self._add(name, ask)
        for _ in range(steps):
            if not self._open:
                break
            self._step()
        ended, self._ended = self._ended, {}
        return ended

    def drain(self) -> dict[str, dict[str, Any]]:
        """Run until every request has ended, and no load is under way. Those that do not in time are missing."""
        until = time.monotonic() + PATIENCE_S
        while self._scheduler.has_requests() and time.monotonic() < until:
            self._step()
        ended, self._ended = self._ended, {}
        return ended

    def forget(self) -> int:
        """Empty vLLM's own prefix cache; what runs is preempted. How many requests were.

        vLLM refuses while requests that do not run hold blocks, loading or loaded, so first step until none does.
        """
        until = time.monotonic() + PATIENCE_S
        while self._holding() and time.monotonic() < until:
            self._step()
        running = len(self._scheduler.running)
        self._engine.reset_prefix_cache(reset_running_requests=True)
        self._forced += running
        return running

    def reborn(self) -> bool:
        """Empty every cache of vLLM's own, of blocks, encoder outputs and processed media. Only while nothing runs."""
        self._engine.reset_mm_cache()
        self._engine.reset_encoder_cache()
        return bool(self._llm.reset_prefix_cache())

    def preempted(self) -> int:
        """Times that vLLM itself preempted a request, for want of memory."""
        return self._preempted.total() - self._forced

    def _add(self, name: str, ask: dict[str, Any]) -> None:
        try:
            prompt, params, lora = self._worker.arguments(ask)
            internal = self._engine.add_request(name, prompt, params, lora_request=lora)
        except Exception as error:  # what the engine says to a request it cannot serve
            self._ended[name] = self._worker.refusal(error)
            return
        self._open[name] = (internal, ask)

    def _step(self) -> None:
        for output in self._engine.step():
            self._last[output.request_id] = output
            if output.finished:
                self._end(output.request_id, output.outputs[0].finish_reason)
        for request in self._scheduler.requests.values():
            self._preempted[request.request_id] = request.num_preemptions
        for state in list(self._aborts):
            found = next((one for one in self._scheduler.requests.values() if state == _state(one)), None)
            if found is not None:
                self._aborts.remove(state)
                self._engine.abort_request([found.request_id], internal=True)
                name = next(name for name, (internal, _) in self._open.items() if internal == found.request_id)
                self._end(name, f"abort {state}")

    def _end(self, name: str, finish: str) -> None:
        (internal, ask), output = self._open.pop(name), self._last.pop(name, None)
        answer = {"tokens": [], "prompt": [], "cached": 0} if output is None else self._worker.answer(output, ask)
        self._ended[name] = answer | {"finish": finish, "external": self._external.pop(internal, 0)}

    def _holding(self) -> bool:
        block_ids_of = self._scheduler.kv_cache_manager.get_block_ids
        return any(
            request.status.name != "RUNNING" and any(block_ids_of(request.request_id))
            for request in self._scheduler.requests.values()
        )


def _state(request: Any) -> str:
    """What a request is doing, of those in which one can be aborted; '' for any other."""
    status = request.status.name
    if status == "RUNNING":
        if request.num_output_tokens:
            return "decode"
        return "prefill" if 0 < request.num_computed_tokens < request.num_prompt_tokens else ""
    return {"WAITING_FOR_REMOTE_KVS": "loading", "WAITING": "waiting", "PREEMPTED": "preempted"}.get(status, "")
