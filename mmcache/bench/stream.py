"""What an OpenAI-compatible server streams back: server-sent events, and what their chunks say. PURE: bytes in.

The format is OpenAI's "chat completion chunk object" in `text/event-stream` (WHATWG HTML, "Server-sent events"), as
vLLM and SGLang speak it. What a server sends is not trusted: lines and answers have limits, and a chunk that is not
what it must be is a ProtocolError.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from mmcache.errors import ProtocolError

MAX_LINE_NBYTES: Final = 1 << 20
MAX_ANSWER_NBYTES: Final = 64 << 20
MAX_WORDS: Final = 300  # of what a server says about an error
DONE: Final = "[DONE]"


@dataclass(frozen=True)
class Usage:
    """Tokens as the server counted them. `cached` is None where it does not say."""

    prompt: int
    completion: int
    cached: int | None


class Events:
    """Cuts a stream of bytes into the data of its events, wherever the pieces of the stream end."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[str] = []
        self._nbytes = 0

    def feed(self, piece: bytes) -> Iterator[str]:
        """The data of every event that is complete now. Raises ProtocolError if it is too long or not UTF-8."""
        self._nbytes += len(piece)
        if self._nbytes > MAX_ANSWER_NBYTES:
            raise ProtocolError(f"the answer is longer than {MAX_ANSWER_NBYTES >> 20} MiB")
        *lines, self._rest = (self._rest + piece).split(b"\n")
        if max(map(len, (self._rest, *lines))) > MAX_LINE_NBYTES:
            raise ProtocolError(f"a line of the answer is longer than {MAX_LINE_NBYTES >> 20} MiB")
        for line in lines:
            try:
                text = line.removesuffix(b"\r").decode()
            except UnicodeDecodeError as error:
                raise ProtocolError(f"the answer is not UTF-8: {error}") from None
            if not text and self._data:
                yield "\n".join(self._data)
                self._data = []
            elif text.startswith("data:"):
                self._data.append(text[5:].removeprefix(" "))


class Reading:
    """One answer as its chunks arrive: its text, the moments of its tokens (seconds of any clock), its usage.

    A moment counts where a chunk has text, or an empty text after the first chunk, which only names the role: the
    server has a token then and holds back half a character. What ends without either, such as an empty answer, has its
    first and last token when the reason of its end comes.
    """

    def __init__(self) -> None:
        self.first_s: float | None = None
        self.last_s = self.ended_s = 0.0
        self.longest_gap_s = 0.0
        self.chunks = 0
        self.usage: Usage | None = None
        self.finished = self.done = False
        self._texts: list[str] = []

    @property
    def text(self) -> str:
        """All that was said, reasoning included."""
        return "".join(self._texts)

    def take(self, data: str, now_s: float) -> None:
        """Read one event. Raises ProtocolError if it is no chunk, or the server's own words where it is an error."""
        self.ended_s = now_s
        if data == DONE:
            self.done = True
            return
        chunk = _object(data)
        if chunk.get("error"):
            raise ProtocolError(f"the server broke off: {words_of(data)}")
        if chunk.get("usage") is not None:
            self.usage = usage_of(chunk["usage"])
        choices = chunk.get("choices") or []
        if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
            raise ProtocolError(f"a chunk whose choices are no objects: {_short(data)}")
        if choices:
            self._choice(choices[0], now_s)

    def itl_s(self) -> float | None:
        """Mean seconds from one token to the next, None where fewer than two were counted or all came at one moment."""
        tokens = self.usage.completion if self.usage is not None else self.chunks
        if self.first_s is None or tokens < 2 or self.last_s == self.first_s:
            return None
        return (self.last_s - self.first_s) / (tokens - 1)

    def _choice(self, choice: Mapping[str, Any], now_s: float) -> None:
        delta = choice.get("delta") or {}
        if not isinstance(delta, dict):
            raise ProtocolError("a chunk whose delta is no object")
        said = [delta.get(name) for name in ("reasoning_content", "reasoning", "content")]
        texts = [text for text in said if isinstance(text, str)]
        self._texts += texts
        ends = choice.get("finish_reason") is not None
        self.finished = self.finished or ends
        held_back = bool(texts) and not delta.get("role") and not ends
        if any(texts) or delta.get("tool_calls") or held_back or (ends and self.first_s is None):
            if self.first_s is None:
                self.first_s = now_s
            else:
                self.longest_gap_s = max(self.longest_gap_s, now_s - self.last_s)
            self.last_s = now_s
            self.chunks += 1


def usage_of(found: object) -> Usage:
    """Raises ProtocolError if it is not what OpenAI's `usage` is."""
    if not isinstance(found, dict):
        raise ProtocolError("usage is no object")
    details = found.get("prompt_tokens_details") or {}
    if not isinstance(details, dict):
        raise ProtocolError("prompt_tokens_details is no object")
    cached = details.get("cached_tokens")
    numbers = [found.get("prompt_tokens"), found.get("completion_tokens", 0), 0 if cached is None else cached]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ProtocolError(f"usage counts no tokens: {_short(json.dumps(found))}")
    prompt, completion, _ = numbers
    return Usage(prompt, completion, cached)


def first_model(body: bytes) -> str:
    """The first model that an answer to GET /models lists. Raises ProtocolError if it lists none."""
    listed = _object(body.decode(errors="replace")).get("data")
    if not isinstance(listed, list) or not listed or not isinstance(listed[0], dict):
        raise ProtocolError("it lists no model")
    name = listed[0].get("id")
    if not isinstance(name, str) or not name:
        raise ProtocolError("its first model has no id")
    return name


def words_of(body: str) -> str:
    """What a server says about an error, for a line: the message of OpenAI's error object, or the text itself."""
    try:
        found = _object(body)
    except ProtocolError:
        return _short(body)
    error = found.get("error", found)
    message = error.get("message", error) if isinstance(error, dict) else error
    return _short(message if isinstance(message, str) else json.dumps(message))


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ProtocolError(f"no JSON object: {_short(text)}")
    return found


def _short(text: str) -> str:
    """Without what could move a terminal's cursor, and not too long."""
    line = "".join(char if char.isprintable() else " " for char in text[: 2 * MAX_WORDS])
    return line if len(line) <= MAX_WORDS else line[:MAX_WORDS] + "..."
