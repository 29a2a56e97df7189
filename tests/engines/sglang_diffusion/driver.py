"""One SGLang-diffusion in a process of its own: reads prompts, a JSON string a line, from stdin.

Answers go to the descriptor named by the first argument: the SHA-256 of the picture's bytes. The second argument is the
model's folder. It ends with its input.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys

from sglang.multimodal_gen.runtime.entrypoints.diffusion_generator import DiffGenerator

ASKED = {"width": 64, "height": 64, "num_inference_steps": 2, "seed": 1, "guidance_scale": 5.0, "save_output": False}


def main() -> None:
    """Start, say so, answer until the input ends."""
    out = os.fdopen(int(sys.argv[1]), "w", buffering=1)
    generator = DiffGenerator.from_pretrained(
        model_path=sys.argv[2],
        model_id="stable-diffusion-3-medium-diffusers",  # else SGLang runs diffusers' pipeline, not its own
        num_gpus=1,
        local_mode=True,
        host="127.0.0.1",
        attention_backend="torch_sdpa",
        warmup_mode="off",
    )
    print(json.dumps({"ready": True}), file=out)
    for line in sys.stdin:
        asked = ASKED | {"prompt": json.loads(line), "return_frames": True}
        made = generator.generate(sampling_params_kwargs=asked)
        print(json.dumps({"picture": hashlib.sha256(made.frames[0].tobytes()).hexdigest()}), file=out)
    generator.shutdown()


if __name__ == "__main__":
    main()
