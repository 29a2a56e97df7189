"""What the client processes of these tests do: `python -m tests.integration.child FUNCTION URL WORDS...`.

They stop themselves with SIGSTOP exactly where a test wants them stopped, so that no test depends on timing.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

import mmcache
from mmcache.client.link import Dialer, SocketLink
from mmcache.client.protocol import Acquired, Conversation, Flow, put_result
from mmcache.client.sending import Outgoing, send_frames, way_of
from mmcache.config import parse_url
from mmcache.errors import LeaseLost
from mmcache.frame import Kind
from mmcache.keyset import Keys
from mmcache.tensors import as_numpy
from tests.integration.support import blanks, keys_of, segments_of, value_of, values_of


def say(**what: Any) -> None:
    """One line to the test."""
    print(json.dumps(what), flush=True)


def stop() -> None:
    """Stop this process until somebody sends SIGCONT."""
    os.kill(os.getpid(), signal.SIGSTOP)


def open_link(url: str) -> SocketLink:
    """A link as a Client would open it."""
    return Dialer(parse_url(url)).open(time.monotonic() + 30)


def hold(url: str, label: str, count: str, nbytes: str) -> None:
    """Lease entries, look at them without a copy, wait for a line, look again, and give the lease back."""
    keys = keys_of(int(count), label)
    values = values_of(keys, int(nbytes))
    with mmcache.connect(url) as cache:
        began_s = time.monotonic()
        lease = cache.acquire(keys)
        frames = [frame for frame in lease.frames if frame is not None]
        views = [as_numpy(tensor.spec, frame.payload(tensor)) for frame in frames for tensor in frame.header.tensors]
        before = all(map(np.array_equal, views, values))
        say(leased=len(frames), right=before, began_s=began_s, at_s=time.monotonic())
        sys.stdin.readline()
        after = all(map(np.array_equal, views, values))
        try:
            lease.__exit__(None, None, None)
            lost = False
        except LeaseLost:
            lost = True
        say(lost=lost, right=after)


def _stop_after_acquire() -> None:
    """From now on, stop once, as soon as the server has said where entries lie."""
    acquire, done = Conversation.acquire, False

    def acquire_and_stop(self: Conversation, *words: Any, **more: Any) -> Flow[Acquired]:
        nonlocal done
        acquired = yield from acquire(self, *words, **more)
        if not done:
            done = True
            stop()
        return acquired

    Conversation.acquire = acquire_and_stop  # type: ignore[method-assign]


def stop_in_get(url: str, label: str, count: str, nbytes: str, verify: str) -> None:
    """Stop between the answer to Acquire and the first byte read, then go on reading."""
    keys, size = keys_of(int(count), label), int(nbytes)
    values, buffers = values_of(keys, size), blanks(len(keys), size)
    with mmcache.connect(url, deadline_s=60) as cache:
        _stop_after_acquire()
        results = cache.get_into(keys, buffers, verify=verify == "verify")
        verify_failures = cache.counters["verify_failures"]
    right = list(map(np.array_equal, values, buffers))
    wrong = sum(bool(result) and not good for result, good in zip(results, right, strict=True))
    say(outcomes=[result.outcome for result in results], wrong=wrong, verify_failures=verify_failures)


def _until_half(segments: list[bytes | memoryview], then: Any) -> Iterator[bytes | memoryview]:
    header, payload = segments
    yield header
    yield payload[: len(payload) // 2]
    then()
    yield payload[len(payload) // 2 :]


def _put(url: str, label: str, nbytes: str, then: Any) -> None:
    keys = keys_of(1, label)
    link = open_link(url)
    deadline = time.monotonic() + 60
    segments = segments_of(keys, value_of(keys.digests[0], int(nbytes)), alignment=link.joined.alignment)
    size = sum(len(segment) for segment in segments)
    conversation = link.conversation
    reserve = conversation.reserve(keys.digests[0], keys.parents[0], [size], bytes([Kind.KV]), link.ring is not None)
    say(reserved=list(link.run(reserve, deadline)))
    pieces: Any = _until_half(segments, then)
    if link.ring is None:  # the channel takes a frame's buffers as a whole: send the first half on its own
        link.channel.send([next(pieces), next(pieces)], deadline)
        pieces = list(pieces)
    try:
        sending = send_frames([_outgoing(pieces, size)], None, way_of(conversation, link.ring))
        status = link.run(conversation.put_done(sending, 1), deadline)
        say(outcome=put_result(status[0]).outcome, reason=put_result(status[0]).reason)
    except OSError as error:
        say(outcome="unavailable", reason=str(error))


def _outgoing(pieces: Any, nbytes: int) -> Flow[Outgoing]:
    yield from ()
    return Outgoing(b"", pieces, 1, nbytes)


def stop_in_put(url: str, label: str, nbytes: str) -> None:
    """Stop after half of a frame's bytes have gone out, then send the rest."""
    _put(url, label, nbytes, stop)


def wait_in_put(url: str, label: str, nbytes: str) -> None:
    """Say so after half of a frame's bytes have gone out, and wait for a line."""

    def wait() -> None:
        say(half=True, at_s=time.monotonic())
        sys.stdin.readline()

    _put(url, label, nbytes, wait)


def round_trip(url: str, label: str, count: str, nbytes: str) -> None:
    """Put and read back over a connection of this process's own."""
    keys: Keys = keys_of(int(count), label)
    values, buffers = values_of(keys, int(nbytes)), blanks(int(count), int(nbytes))
    with mmcache.connect(url) as cache:
        stored = all(cache.put(keys, values))
        hit = all(cache.get_into(keys, buffers))
    say(stored=stored, hit=hit, right=all(map(np.array_equal, values, buffers)))


if __name__ == "__main__":
    FUNCTIONS = (hold, stop_in_get, stop_in_put, wait_in_put, round_trip)
    {function.__name__: function for function in FUNCTIONS}[sys.argv[1]](*sys.argv[2:])
