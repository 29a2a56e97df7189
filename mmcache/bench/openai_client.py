"""A client of OpenAI-compatible servers that trusts none: no redirects, no cookies, limits on all that is read.

It measures: each request's answer is read as it arrives (stream.py), and every failure is a value with its reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self
from urllib.parse import urlsplit

from mmcache.bench import extras
from mmcache.bench.stream import Events, Reading, first_model, words_of
from mmcache.errors import ConfigError, MMCacheError, ProtocolError, TransportError

if TYPE_CHECKING:
    import aiohttp

CONNECT_S: Final = 10.0
DRAIN_S: Final = 1.0  # after the last event, for the end of the body: then the connection can be used again
MAX_BODY_NBYTES: Final = 1 << 20  # of what is no answer: a list of models, an error


def base_url(url: str) -> str:
    """`http://HOST/v1` as it is used, without a slash at its end. Raises ConfigError."""
    example = "give such as http://127.0.0.1:8000/v1"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"--url {url!r} is no URL ({error}); {example}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise ConfigError(f"--url {url!r} is no http or https URL; {example}")
    if parts.username or parts.password:
        raise ConfigError("--url holds a user or password, which reports would show; give --api-key-file")
    if parts.query or parts.fragment:
        raise ConfigError(f"--url {url!r} has a query or a fragment; {example}")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or '/v1'}"


class OpenAIServer:
    """One server. Use as an asynchronous context manager; any number of requests may be under way."""

    def __init__(self, url: str, *, api_key: str = "", timeout_s: float = 120.0, proxy: bool = False) -> None:
        self.url = base_url(url)
        self._timeout_s, self._proxy, self._api_key = timeout_s, proxy, api_key
        self._headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        http: Any = extras.load("aiohttp", "serve")
        self._session = http.ClientSession(
            headers=self._headers,
            connector=http.TCPConnector(limit=0),
            cookie_jar=http.DummyCookieJar(),
            timeout=http.ClientTimeout(total=None, sock_connect=CONNECT_S),
            trust_env=self._proxy,
            auto_decompress=False,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def first_model(self) -> str:
        """The name of the first model it lists. Raises TransportError, with what to do."""
        assert self._session is not None
        url = f"{self.url}/models"
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                self._session.get(url, allow_redirects=False) as response,
            ):
                body = await _body(response)
                if response.status != 200:
                    raise ProtocolError(_refusal(response, body))
                return first_model(body)
        except Exception as error:
            reason = self._reason(error)
            remedy = "is an OpenAI-compatible server there? --model NAME skips this"
            if reason.startswith(("HTTP 401", "HTTP 403")):
                remedy = "give its key: --api-key-env NAME or --api-key-file FILE"
            raise TransportError(f"GET {url}: {reason}; {remedy}") from None

    async def ask(self, body: bytes) -> tuple[Reading, str]:
        """Send a chat completion that streams, and read all of it. What came, and why it is no answer, or "".

        The moments in what came are `time.perf_counter`'s.
        """
        reading = Reading()
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._read(body, reading)
        except Exception as error:
            return reading, self._reason(error)
        if not reading.finished:
            return reading, "the answer ended before its end" if reading.chunks else "no event came; does it stream?"
        return reading, ""

    def _reason(self, error: Exception) -> str:
        """Why there is no answer, without the key: a server's words may repeat it."""
        reason = reason_of(error, self._timeout_s)
        return reason.replace(self._api_key, "(the API key)") if self._api_key else reason

    async def _read(self, body: bytes, reading: Reading) -> None:
        assert self._session is not None
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        url = f"{self.url}/chat/completions"
        async with self._session.post(url, data=body, headers=headers, allow_redirects=False) as response:
            if response.status != 200:
                raise ProtocolError(_refusal(response, await _body(response)))
            events = Events()
            async for piece in response.content.iter_any():
                now_s = time.perf_counter()
                for data in events.feed(piece):
                    reading.take(data, now_s)
                if reading.done:
                    break
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DRAIN_S):
                    async for _ in response.content.iter_any():
                        pass


async def _body(response: aiohttp.ClientResponse) -> bytes:
    """A body that is no answer. Raises ProtocolError if it is too long."""
    body = b""
    async for piece in response.content.iter_any():
        body += piece
        if len(body) > MAX_BODY_NBYTES:
            raise ProtocolError(f"it sent more than {MAX_BODY_NBYTES >> 20} MiB")
    return body


def _refusal(response: aiohttp.ClientResponse, body: bytes) -> str:
    if 300 <= response.status < 400:
        return f"HTTP {response.status}, a redirect, which is not followed; give --url where the server really is"
    return f"HTTP {response.status}: {words_of(body.decode(errors='replace'))}"


def reason_of(error: Exception, timeout_s: float) -> str:
    """Why there is no answer, in words that are the same each time it happens."""
    if isinstance(error, TimeoutError) and not str(error):
        return f"no whole answer within {timeout_s:g} s (--timeout-s)"
    if isinstance(error, MMCacheError):
        return str(error)
    return f"{type(error).__name__}: {words_of(str(error))}"
