"""The vLLM suite's worker with one operation more: encode pictures, and keep what the tower was given and what it gave.

`python -m tests.engines.cross.vllm_driver SETTINGS`, spoken to as `tests.engines.vllm.worker`.
"""

from __future__ import annotations

from typing import Any

from tests.engines.cross.kept import Kept, keep
from tests.engines.vllm.models import IMAGE
from tests.engines.vllm.worker import Worker, serve


class CrossWorker(Worker):
    """One vLLM engine."""

    def encode(self, pictures: list[str], out: str) -> int:
        """Ask about each picture, and keep what its encoder was given and gave in the file `out`; encoder passes."""
        from PIL import Image
        from vllm import SamplingParams

        runner = self.core.model_executor.driver_worker.worker.model_runner
        given: list[dict[str, Any]] = []
        original = runner.model.embed_multimodal

        def watched(**inputs: Any) -> Any:
            given.append(inputs)
            return original(**inputs)

        before = self._passes
        kept: dict[str, Kept] = {}
        runner.model.embed_multimodal = watched
        try:
            for path in pictures:
                given.clear()
                self.engine.reset_encoder_cache()
                prompt = {"prompt": IMAGE, "multi_modal_data": {"image": Image.open(path).convert("RGB")}}
                self.llm.generate([prompt], SamplingParams(max_tokens=1), use_tqdm=False)
                (embedding,) = runner.encoder_cache.values()
                inputs = given[0] if given else {}
                kept[path] = Kept(inputs.get("pixel_values"), inputs.get("image_grid_thw"), embedding)
        finally:
            runner.model.embed_multimodal = original
        self.flush()
        keep(out, kept)
        return self._passes - before


if __name__ == "__main__":
    serve(CrossWorker)
