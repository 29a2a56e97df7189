"""Ask an OpenAI server about a picture, or without one, and say how much of the prompt came from a cache.

    python examples/ask.py http://127.0.0.1:8000 "What is in this picture?" --image picture.png

Needs nothing but Python. The server tells cached tokens if it was started with --enable-prompt-tokens-details (vLLM) or
--enable-cache-report (SGLang).
"""

from __future__ import annotations

import argparse
import base64
import json
import mimetypes
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any


def main() -> int:
    """Print the answer and, on a second line, tokens and seconds; 1 if the server refuses or is not there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("server", metavar="URL", help="of the server, without /v1")
    parser.add_argument("question")
    parser.add_argument("--image", type=Path, action="append", default=[], metavar="FILE", help="may be given again")
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N")
    asked = parser.parse_args()
    if missing := [path for path in asked.image if not path.is_file()]:
        parser.error(f"there is no picture {missing[0]}")
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": _data_url(path)}} for path in asked.image]
    parts.append({"type": "text", "text": asked.question})
    try:
        model = _json(f"{asked.server}/v1/models")["data"][0]["id"]
        began = time.perf_counter()
        body = {"model": model, "messages": [{"role": "user", "content": parts}], "max_tokens": asked.max_tokens}
        answer = _json(f"{asked.server}/v1/chat/completions", {**body, "temperature": 0})
    except OSError as error:
        detail = error.read().decode(errors="replace") if isinstance(error, urllib.error.HTTPError) else ""
        print(f"{asked.server}: {error} {detail}", file=sys.stderr)
        return 1
    usage = answer["usage"]
    seconds = time.perf_counter() - began
    details = usage.get("prompt_tokens_details")
    cached = f"{details.get('cached_tokens')} cached" if details else "the server does not say how many were cached"
    print(answer["choices"][0]["message"]["content"])
    print(f"{usage['prompt_tokens']} prompt tokens, {cached}; {seconds:.2f} s")
    return 0


def _data_url(path: Path) -> str:
    kind = mimetypes.guess_type(path.name)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _json(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as response:
        return json.load(response)


if __name__ == "__main__":
    sys.exit(main())
