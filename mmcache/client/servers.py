"""Every server behind a client, asked at the same time: what each said, and who could not be asked, and why.

One server's failure is raised as it is; of a cluster's shards some may fail, and the others' answers count.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Final, TypeVar

from mmcache.client.blocking import Client
from mmcache.client.cluster_answers import answered
from mmcache.errors import MMCacheError, ProtocolError, RequestRefused

AT_ONCE: Final = 32
R = TypeVar("R")
T = TypeVar("T")
Servers = Mapping[str, Client | MMCacheError]  # by name; an error instead of one that cannot be used at all
Errors = dict[str, MMCacheError | OSError]
Progress = Callable[[int, int], None]


def ask_each(
    servers: Servers, ask: Callable[[str, Client], T], ended: threading.Event | None = None
) -> tuple[dict[str, T], Errors]:
    """What each answers, and the errors of the others. What a lone server raises is raised.

    `ended` is set once nothing more is wanted: by whatever else is raised, as by Ctrl-C. Ends after all that was begun.
    """
    ended = ended or threading.Event()

    def one(name: str, server: Client | MMCacheError) -> T | MMCacheError | OSError:
        if isinstance(server, MMCacheError):
            return server
        try:
            return ask(name, server)
        except (MMCacheError, OSError) as error:  # UsageError: the shard has left the cluster meanwhile
            if len(servers) == 1:
                raise
            return error
        except BaseException:
            ended.set()
            raise

    if len(servers) <= 1:
        answers = {name: one(name, server) for name, server in servers.items()}
    else:
        with ThreadPoolExecutor(AT_ONCE, "mmcache-ask") as pool:
            try:
                asked = {name: _begin(pool, partial(one, name, server)) for name, server in servers.items()}
                answers = {name: outcome() for name, outcome in asked.items()}
            except BaseException:
                ended.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    errors = {name: answer for name, answer in answers.items() if isinstance(answer, (MMCacheError, OSError))}
    return {name: one for name, one in answers.items() if not isinstance(one, (MMCacheError, OSError))}, errors


def _begin(pool: ThreadPoolExecutor, call: Callable[[], T]) -> Callable[[], T]:
    """Begin a call; what waits for its outcome. Where no thread can be had it is made here, or by one of those there
    are: once."""
    future, turn = Future[T](), threading.Lock()

    def once() -> None:
        if turn.acquire(blocking=False):
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)

    try:
        pool.submit(once)
    except RuntimeError:  # it may wait in line nevertheless
        once()
    return future.result


def raise_all(errors: Errors) -> None:
    """Raise what stands for all of them: the refusal, if every server refused; TransportError."""
    if errors and all(isinstance(error, RequestRefused) for error in errors.values()):
        raise next(iter(errors.values()))
    answered(errors)


def walk(
    servers: Servers, ask: Callable[[Client, int], R], add: Callable[[str, R], None], progress: Progress | None
) -> Errors:
    """Walk over every server: `ask` takes the step that starts there and replies with where the `next` one does, and
    how many `rows` there are; `add` takes a reply, one at a time. Who could not be asked, or not to the end.

    Raises, once nothing at all was done, what stands for all.
    """
    far, turn, ended = dict[str, tuple[int, int]](), threading.Lock(), threading.Event()

    def steps(name: str, server: Client) -> None:
        start = 0
        while not ended.is_set():
            reply: Any = ask(server, start)
            start = following(start, reply.next)
            with turn:
                add(name, reply)
                far[name] = start or reply.rows, reply.rows
                if progress is not None:
                    done, total = (sum(column) for column in zip(*far.values(), strict=True))
                    progress(done, total * len(servers) // len(far))  # the others have about as many
            if not start:
                return

    _, errors = ask_each(servers, steps, ended)
    if not far:
        raise_all(errors)
    return errors


def following(start: int, then: int) -> int:
    """Where the next step starts, 0 for none; a server that does not get on is not asked for ever."""
    if then and then <= start:
        raise ProtocolError(f"the server's walk does not get on: after {start} comes {then}")
    return then
