"""SGLang's encoder in a process of its own: reads a JSON request a line from stdin, answers one a line.

`python -m tests.engines.cross.sglang_driver DESCRIPTOR ARGUMENTS`: answers go to the descriptor, as SGLang writes to
stdout; the arguments are those of an encoder server, as a JSON list. It is that server's own encoder, without its HTTP.
Without a GPU its global cache needs the twins that the SGLang suite's encoder servers have.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

import tests.engines.sglang.encoder_driver  # noqa: F401
from mmcache_connectors.sglang.plugin import activate
from tests.engines.cross.kept import Kept, keep


class Encoder:
    """SGLang's MMEncoder, watched."""

    def __init__(self, arguments: list[str]) -> None:
        from sglang.srt.disaggregation.encoder.server import MMEncoder
        from sglang.srt.runtime_context import publish
        from sglang.srt.server_args import prepare_server_args
        from sglang.srt.utils.network import get_free_port

        activate()  # as SGLang's plugin loader does
        parsed = prepare_server_args(arguments)
        publish(parsed, role="encoder")
        self.encoder = MMEncoder(parsed, dist_init_method=f"tcp://127.0.0.1:{get_free_port()}")
        self.passes = 0
        self._given: list[Any] = []
        self._original = self.encoder.model.get_image_feature
        self.encoder.model.get_image_feature = self._watched
        self._requests = 0

    def _watched(self, items: list[Any]) -> Any:
        self.passes += 1
        self._given = items
        return self._original(items)

    async def encode(self, pictures: list[str], out: str) -> int:
        """Encode each picture, and keep what its encoder was given and gave in the file `out`; encoder passes."""
        from sglang.srt.managers.schedule_batch import Modality

        before = self.passes
        kept = {}
        for path in pictures:
            self._given = []
            self._requests += 1
            name = f"request-{self._requests}"
            result = await self.encoder.encode([path], Modality.IMAGE, name, 1, 0)
            assert result[3] is None, result
            embedding = self.encoder.req_states[name].embedding_data.embedding
            given = [(item.feature, item.image_grid_thw) for item in self._given] or [(None, None)]
            kept[path] = Kept(*given[0], embedding)
            await self.encoder.release_request(name)
        while tasks := list(self.encoder.background_tasks):  # what goes to the cache
            await asyncio.gather(*tasks)
        keep(out, kept)
        return self.passes - before


async def main() -> None:
    """Start, say so, answer until the input ends."""
    out = os.fdopen(int(sys.argv[1]), "w", buffering=1)
    encoder = Encoder(json.loads(sys.argv[2]))
    print(json.dumps("ready"), file=out)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        print(json.dumps(await encoder.encode(**json.loads(line))), file=out)


if __name__ == "__main__":
    asyncio.run(main())
