"""Why a request's blocks were not there: what this engine knows itself, or what the server says of the first of them.

The reason goes into `kv_transfer_params` of the response. Nobody waits for it: a question to the server is asked in the
background after the lookup, and a request that ends before the answer says so. With `record_misses` requests that
missed are also written down, for `mmcache explain --request`.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from mmcache.client.blocking import Client
from mmcache.client.operations import Operations, Reason
from mmcache.errors import ConfigError, MMCacheError
from mmcache.explain import Recorded
from mmcache.keyset import Keys
from mmcache.private_file import write_private
from mmcache.why import Why
from mmcache_connectors.vllm.background import Background, Ticket
from mmcache_connectors.vllm.groups import Parts
from mmcache_connectors.vllm.settings import Settings

log = logging.getLogger("mmcache.vllm")

AUDIT: Final = "audit: found, and computed anew all the same, to compare"
ONLY_STORES: Final = "this engine only stores (kv_producer)"
NOT_WANTED: Final = "the request asked not to read the cache"
UNIDENTIFIED: Final = "not cacheable: its adapter, or the engine's weights, are not identified"
NOT_TAKEN: Final = "stored, but the engine did not take it: another connector's tokens, say"
UNKNOWN_ITEM: Final = "a media item of unknown identity ends what can be cached"
TOO_SLOW: Final = "the lookup took too long"
NO_ANSWER: Final = "the cache does not answer"
LOAD_FAILED: Final = "its load failed, or one it waited for"
STORED_SINCE: Final = "stored since it was looked up, by the request itself, say"
RESET: Final = "the cache was reset before it ran"
NOT_ASKED: Final = "not asked"
NOT_KNOWN_YET: Final = "not known yet"

MAX_WAITING: Final = 8  # of further requests the server is not asked, and nothing is written down
MAX_RECORDS: Final = 256  # files
MAX_RECORD_TOKENS: Final = 1 << 18  # a longer request, some 2 MB of JSON, is not written down
_RECORD: Final = re.compile(r"miss-\d{19}-[\w.-]*\.json")

Missed = str | Reason
T = TypeVar("T")


class Few(Generic[T]):
    """A thread of its own for work of which not more than MAX_WAITING pieces wait; others are not done."""

    def __init__(self, name: str) -> None:
        self._background = Background(name, 1)
        self._room = threading.Semaphore(MAX_WAITING)
        self.flush = self._background.flush

    def submit(self, work: Callable[[], T]) -> Ticket[T] | None:
        """None: it is not done. Never raises."""
        if not self._room.acquire(blocking=False):
            return None

        def run() -> T:
            self._room.release()
            return work()

        try:
            return self._background.submit(run)
        except RuntimeError:  # no thread can be started
            self._room.release()
            return None


class Misses:
    """Finds out about misses, a few at a time, in the background. `explain` may be called by any thread."""

    def __init__(
        self, settings: Settings, client: Client, parts: Parts, recorded: Callable[[Any], Recorded | None]
    ) -> None:
        """`recorded` gives what to write down of a request. Raises ConfigError for a folder that cannot be used."""
        self._client, self._parts, self._recorded = client, parts, recorded
        self._recorder = Recorder(settings.record_misses) if settings.record_misses else None
        self._asks = settings.explain_misses
        self._asking: Few[Missed] = Few("mmcache-explain")
        self._recording: Few[None] = Few("mmcache-record")  # apart, as disks are slow

    def explain(self, request: Any, keys: Keys, hit: int, local: int, *, whole: bool) -> Missed | Ticket[Missed] | None:
        """Why the first block is not there that is neither among the leading `hit` that are stored nor among the
        `local` that the engine has, or a ticket that will say so; None if there is no such block.

        `keys` are those of all blocks that could be loaded: all of the `whole` request, or those before an item of
        unknown identity. Never raises.
        """
        first = max(hit, local)
        if first >= len(keys):
            return None if whole else UNKNOWN_ITEM
        if not self._client.answering:
            return NO_ANSWER
        if self._recorder is not None:
            self._recording.submit(lambda: self._record(request))
        # The one at `hit`, too: what is stored behind it is of no use without it.
        two = keys[first : first + 1], keys[hit : hit + 1]
        asked = self._asking.submit(lambda: self._ask(two)) if self._asks else None
        return NOT_ASKED if asked is None else asked

    def _record(self, request: Any) -> None:
        assert self._recorder is not None
        recorded = self._recorded(request)
        if recorded is not None:
            self._recorder.write(request.request_id, recorded)

    def _ask(self, blocks: Sequence[Keys]) -> Missed:
        parts = [part for of_group in self._parts.of_group for part in of_group]
        digests = [block.for_part(part).digests[0] for block in blocks for part in parts]
        try:
            reasons = Operations(self._client).explain(digests)
        except (MMCacheError, OSError):
            return NO_ANSWER
        return next((reason for reason in reasons if reason.why is not Why.HERE), STORED_SINCE)

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything asked is answered, and written down; False if one of the two took longer."""
        return self._asking.flush(timeout_s) and self._recording.flush(timeout_s)


class Recorder:
    """A folder of the last MAX_RECORDS requests that missed, files that nobody else can read. For one thread.

    Prompts are in them. The folder is made, with mode 0700, if it is not there; raises ConfigError if it cannot be.
    """

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._said = False
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = sorted(one.name for one in os.scandir(folder) if _RECORD.fullmatch(one.name))
        except OSError as error:
            raise ConfigError(f"record_misses: {folder} is no folder to write to: {error.strerror}") from None
        self._names = deque(found)

    def write(self, request_id: str, record: Recorded) -> None:
        """Write one request down, and remove the oldest. What cannot be written is left out; the log says so once."""
        if len(record.token_ids) > MAX_RECORD_TOKENS:
            return
        name = f"miss-{time.time_ns():019d}-{re.sub(r'[^A-Za-z0-9_.-]', '_', request_id)[:64]}.json"
        try:
            write_private(self._folder / name, record.to_json().encode(), replace=False, what="recorded request")
            self._names.append(name)
            while len(self._names) > MAX_RECORDS:
                (self._folder / self._names.popleft()).unlink(missing_ok=True)
        except (ConfigError, OSError) as error:
            if not self._said:
                self._said = True
                log.warning("mmcache: requests that missed are not written down any more: %s", error)


def transfer_params(cached_tokens: int, missed_tokens: int, missed: Missed | Ticket[Missed] | None) -> dict[str, Any]:
    """What a response says under `kv_transfer_params`: tokens loaded from the cache, and, if whole blocks of the prompt
    were in neither cache, how many tokens that were and why the first block was missing."""
    told: dict[str, Any] = {"cached_tokens": cached_tokens}
    if missed_tokens > 0:
        if isinstance(missed, Ticket):
            missed = (missed.result or NO_ANSWER) if missed.done() else NOT_KNOWN_YET
        told["missed"] = {"tokens": missed_tokens, **_in_words(missed or NOT_TAKEN)}
    return {"mmcache": told}


def _in_words(missed: Missed) -> dict[str, Any]:
    if isinstance(missed, str):
        return {"reason": missed}
    ago = {} if missed.ago_s is None else {"ago_s": round(missed.ago_s, 3)}
    return {"reason": missed.text, **ago}
