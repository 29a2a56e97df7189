"""A process with one vLLM engine, which answers lines of JSON: `python -m tests.engines.vllm.worker SETTINGS`.

A request is one line on stdin, `{"op": ..., ...}`; the answer is one line on what was stdout when the process began
(everything else that is printed goes to stderr). The engine runs in this process, so its connectors' counters can be
read. Asks are the JSON objects of `harness.ask`.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
import time
from functools import cached_property
from typing import Any

from tests.engines.vllm.images import media, sound
from tests.engines.vllm.models import MODELS, model_path
from tests.engines.vllm.stepping import Stepping

TRUNCATED_PNG = bytes.fromhex("89504e470d0a1a0a0000000d49484452000000380000003808020000") + bytes(7)
TOWERS = ("visual", "vision_tower", "audio_tower")
IDLE_S = 60.0  # how long the engine may take to finish what nobody waits for any more


class Worker:
    """One engine and the operations on it, a method each; all take and give what JSON can carry."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from vllm import LLM

        name = settings["model"]
        self.hidden_size = 128
        self.llm = LLM(model=str(model_path(name)) if name in MODELS else name, **settings["llm"])
        self.engine = self.llm.llm_engine
        self.core = self.engine.engine_core.engine_core
        self._passes = 0
        self._count_passes()

    # ---------------------------------------------------------------------------------------------- operations
    def generate(self, asks: list[dict[str, Any]], together: bool = False) -> list[dict[str, Any]]:
        """Answer each ask, one after another, or all at once as one batch; then what this process keeps is stored."""
        answers = self._batch(asks) if together else [self._conversation(ask) for ask in asks]
        self.flush()
        return answers

    def flush(self) -> bool:
        """Wait until the workers in this process have stored what is on its way; False if it takes too long."""
        from vllm.distributed.ec_transfer import get_ec_transfer, has_ec_transfer
        from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

        found = [get_kv_transfer_group()] if has_kv_transfer_group() else []
        found += [get_ec_transfer()] if has_ec_transfer() else []
        connectors = [one for each in found for one in getattr(each, "_connectors", [each])]  # of vLLM's MultiConnector
        return all(one._worker is None or one._worker.flush(IDLE_S) for one in connectors)

    def abort(self, ask: dict[str, Any], status: str, patience_s: float) -> bool:
        """Begin an ask and abort it when the scheduler has it in `status`; False if it never was."""
        identity = self.engine.add_request("aborted", self._prompt(ask), self._params(ask))
        deadline = time.monotonic() + patience_s
        reached = False
        while not reached and time.monotonic() < deadline and self.engine.has_unfinished_requests():
            self.engine.step()
            reached = any(request.status.name == status for request in self.core.scheduler.requests.values())
        self.engine.abort_request([identity], internal=True)
        return reached

    def reset(self) -> bool:
        """Let finished requests end, then forget vLLM's own prefix cache; False if blocks were never given back."""
        deadline = time.monotonic() + IDLE_S
        while self.core.scheduler.has_requests() and time.monotonic() < deadline:
            self.engine.step()
        return bool(self.llm.reset_prefix_cache())

    def reset_encoder_cache(self) -> None:
        """Forget vLLM's own encoder outputs."""
        self.engine.reset_encoder_cache()

    def encoder_passes(self) -> int:
        """How often the model's vision or audio tower has run since the start."""
        return self._passes

    def counters(self) -> dict[str, dict[str, int]]:
        """Of the connectors' halves; the worker's only where it runs in this process."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

        found = {}
        if self.core.scheduler.connector is not None:
            found["scheduler"] = dict(self.core.scheduler.connector.counters())
        if self.core.scheduler.ec_connector is not None:
            found["encoder"] = dict(self.core.scheduler.ec_connector.counters())
        if has_kv_transfer_group():
            found["worker"] = dict(get_kv_transfer_group().counters())
        return found

    @cached_property
    def stepping(self) -> Stepping:
        """Requests that come and go while the engine steps."""
        return Stepping(self.llm, self)

    def step(self, what: str, **arguments: Any) -> Any:
        """One of the operations of `Stepping`."""
        return getattr(self.stepping, what)(**arguments)

    def metric(self, name: str) -> float:
        """One of vLLM's own counters, of those the settings have it keep."""
        return float(sum(one.value for one in self.llm.get_metrics() if one.name == name))

    def metrics(self, prefix: str) -> dict[str, float]:
        """The metrics of this prefix as a server would show them, of a histogram its count and its sum."""
        shown: dict[str, float] = {}
        for one in self.llm.get_metrics():
            labels = ",".join(f"{k}={v}" for k, v in sorted(one.labels.items()) if k not in ("engine", "model_name"))
            name = one.name + (f"{{{labels}}}" if labels else "")
            if one.name.startswith(prefix) and hasattr(one, "buckets"):
                shown |= {f"{name}.count": one.count, f"{name}.sum": one.sum}
            elif one.name.startswith(prefix):
                shown[name] = one.value
        return shown

    def transfer_params(self, asks: list[dict[str, Any]]) -> list[Any]:
        """What the connector says of each ask, after vLLM's own prefix cache was emptied."""
        self.reset()
        prompts, params = [self._prompt(ask) for ask in asks], [self._params(ask) for ask in asks]
        return [output.kv_transfer_params for output in self.llm.generate(prompts, params, use_tqdm=False)]

    # --------------------------------------------------------------------------------------------------- parts
    def _count_passes(self) -> None:
        """Have the model's towers, where they run in this process, count their calls."""
        runner = getattr(getattr(self.core.model_executor, "driver_worker", None), "worker", None)
        if runner is None:
            return

        def count(*_: Any) -> None:
            self._passes += 1

        for name, module in runner.model_runner.model.named_children():
            if name in TOWERS:
                module.register_forward_pre_hook(count)

    def _conversation(self, ask: dict[str, Any]) -> dict[str, Any]:
        """One ask; its `then` texts follow, each after the whole conversation so far. The last answer, all tokens."""
        answer = self._batch([ask])[0]
        tokens = answer["tokens"]
        for text in ask.get("then", ()):
            said = [*answer["prompt"], *answer["tokens"], *self.llm.get_tokenizer().encode(text)]
            answer = self._batch([{**ask, "tokens": said}])[0]
            tokens = tokens + answer["tokens"]
        return answer | {"tokens": tokens}

    def _batch(self, asks: list[dict[str, Any]]) -> list[dict[str, Any]]:
        began = time.perf_counter()
        try:
            outputs = self.llm.generate(
                [self._prompt(ask) for ask in asks],
                [self._params(ask) for ask in asks],
                use_tqdm=False,
                lora_request=[self._lora(ask) for ask in asks],
            )
        except Exception as error:  # what the engine says to a request it cannot serve
            return [self.refusal(error)] * len(asks)
        seconds = time.perf_counter() - began
        return [self.answer(output, ask) | {"seconds": seconds} for output, ask in zip(outputs, asks, strict=True)]

    def arguments(self, ask: dict[str, Any]) -> tuple[Any, Any, Any]:
        """The prompt, the sampling parameters and the adapter of a request to vLLM."""
        return self._prompt(ask), self._params(ask), self._lora(ask)

    def refusal(self, error: Exception) -> dict[str, Any]:
        """The answer to an ask that the engine would not take."""
        said = re.sub(r" at 0x[0-9a-f]+", "", f"{type(error).__name__}: {error}")
        return {"error": said, "tokens": [], "prompt": [], "cached": 0}

    def answer(self, output: Any, ask: dict[str, Any]) -> dict[str, Any]:
        """What a request has said so far."""
        chosen = list(_chosen(output.outputs[0]))
        return {
            "tokens": list(output.outputs[0].token_ids),
            "finish": output.outputs[0].finish_reason,
            "prompt": list(output.prompt_token_ids or [0] * ask["embeds"][1]),
            "cached": output.num_cached_tokens or 0,
            "logprobs": [likely[token].logprob for token, likely in chosen],
            "margins": [likely[token].logprob - _second(likely, token) for token, likely in chosen],
        }

    def _prompt(self, ask: dict[str, Any]) -> Any:
        if "embeds" in ask:
            return {"prompt_embeds": self._embeds(*ask["embeds"])}
        prompt: dict[str, Any] = {}
        if "tokens" in ask:
            prompt["prompt_token_ids"] = self._collapsed(ask["tokens"])
        else:
            prompt["prompt"] = ask["text"]
        data: dict[str, Any] = {}
        if "images" in ask:
            from PIL import Image

            data["image"] = [
                Image.open(io.BytesIO(TRUNCATED_PNG)) if spec["kind"] == "broken" else Image.fromarray(media(spec))
                for spec in ask["images"]
            ]
        if "image_embeds" in ask:
            data["image"] = self._image_embeds(**ask["image_embeds"])
        if "sounds" in ask:
            data["audio"] = [(sound(**spec), 16000) for spec in ask["sounds"]]
        if "videos" in ask:
            data["video"] = [media(spec) for spec in ask["videos"]]
        if data:
            prompt["multi_modal_data"] = data
        for field, name in (("multi_modal_uuids", "uuids"), ("cache_salt", "salt"), ("mm_processor_kwargs", "kwargs")):
            if name in ask:
                prompt[field] = ask[name]
        return prompt

    def _collapsed(self, tokens: list[int]) -> list[int]:
        """One placeholder for each item instead of one for each of its positions: what a prompt is made of."""
        pads = {self.llm.get_tokenizer().convert_tokens_to_ids(word) for word in ("<|image_pad|>", "<|video_pad|>")}
        return [token for i, token in enumerate(tokens) if token not in pads or not i or tokens[i - 1] != token]

    def _embeds(self, seed: int, count: int) -> Any:
        """`count` rows that follow from the seed; more rows of one seed begin with the same ones."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        return torch.stack([torch.randn(self.hidden_size, generator=generator) for _ in range(count)])

    def _image_embeds(self, seed: int, grid: list[int], bare: bool) -> Any:
        """An image as its embedding, for a grid (t, h, w) of patches that are merged 2 by 2; `bare`: the grid alone."""
        import torch

        rows = {} if bare else {"image_embeds": self._embeds(seed, grid[0] * grid[1] * grid[2] // 4)}
        return {**rows, "image_grid_thw": torch.tensor([grid])}

    def _params(self, ask: dict[str, Any]) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            temperature=0.0,
            max_tokens=ask.get("max_tokens", 8),
            ignore_eos=True,
            detokenize=False,
            logprobs=2,
            skip_reading_prefix_cache=ask.get("skip_reading"),
        )

    def _lora(self, ask: dict[str, Any]) -> Any:
        from vllm.lora.request import LoRARequest

        if "lora" not in ask:
            return None
        name, number, path = ask["lora"]
        return LoRARequest(name, number, str(model_path(path)) if path in MODELS else path)


def _chosen(completion: Any) -> Any:
    return zip(completion.token_ids, completion.logprobs or [], strict=True)


def _second(likely: dict[int, Any], token: int) -> float:
    """The logprob of the token that would have been chosen instead."""
    return max((float(other.logprob) for one, other in likely.items() if one != token), default=float("-inf"))


def serve(make: type[Worker]) -> None:
    """Build the engine, say so, and serve until stdin ends."""
    with os.fdopen(os.dup(1), "w", buffering=1) as answers:
        os.dup2(2, 1)
        worker = make(json.loads(sys.argv[1]))
        answers.write(json.dumps("ready") + "\n")
        for line in sys.stdin:
            call = json.loads(line)
            answers.write(json.dumps(getattr(worker, call.pop("op"))(**call)) + "\n")


if __name__ == "__main__":
    serve(Worker)
