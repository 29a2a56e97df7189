"""One joined connection to a shard, driven by asyncio: it waits without holding up the loop, and works off it.

A link belongs to one loop, and to one task at a time. When anything goes wrong in it, the task's cancellation
included, it is closed and never used again; the next call opens another.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

from mmcache.client.credentials import Credentials
from mmcache.client.dial import Dial, Route
from mmcache.client.protocol import Effect, Flow, Recv, RecvInto, Send, SendWithFds, Work
from mmcache.client.session import Joined, Session, join
from mmcache.config import ClientConfig
from mmcache.errors import DeadlineExceeded, TransportError
from mmcache.transport.aio import AsyncChannel, connect_tcp_async, connect_unix_async, resolve_async
from mmcache.transport.aio_tls import AsyncTlsChannel
from mmcache.transport.shm import ArenaMap

E = TypeVar("E")
T = TypeVar("T")
INLINE_NBYTES: Final = 2 << 20  # copied and hashed on the loop: up to here a thread's two wake-ups take longer
TURN_S: Final = 0.001  # after this long without a pause, other tasks have a turn


class Workers:
    """Threads for what would hold up the loop: large copies, large hashes. They begin when they are first needed."""

    def __init__(self, threads: int) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="mmcache-work")
        self._closed = False

    async def run(self, work: Work) -> Any:
        """What the work returns. It is over when this ends, however it ends: cancelling waits for what has begun."""
        if (work.nbytes <= INLINE_NBYTES and not work.waits) or self._closed:
            return work.call()
        job = self._executor.submit(work.call)
        done = asyncio.wrap_future(job)
        try:
            await asyncio.wait([done])
        except asyncio.CancelledError:
            if not job.cancel():
                while not done.done():
                    with contextlib.suppress(asyncio.CancelledError):
                        await asyncio.wait([done])
                done.exception()  # nobody asks for it now
            raise
        return done.result()

    def close(self) -> None:
        """Let the threads end; what has begun ends first, and what is still to come runs on the loop."""
        self._closed = True
        self._executor.shutdown(wait=False)


async def within(work: Coroutine[Any, Any, T], deadline: float) -> T:
    """What `work` returns. Raises DeadlineExceeded, and cancels it, when the deadline passes first."""
    try:
        async with asyncio.timeout(deadline - time.monotonic()):
            return await work
    except TimeoutError:
        raise DeadlineExceeded("the deadline passed; raise deadline_s or look at the server's load") from None


async def drive_async(flow: Generator[E, Any, T], perform: Callable[[E], Awaitable[Any]]) -> T:
    """Perform every effect of a flow; what goes wrong is the flow's to hear first. Returns what it returns."""
    try:
        effect = next(flow)
        began = time.monotonic()
        while True:
            try:
                if time.monotonic() - began > TURN_S:  # before the effect: once it has an answer, nothing may be lost
                    await asyncio.sleep(0)
                    began = time.monotonic()
                answer = await perform(effect)
            except BaseException as error:
                effect = flow.throw(error)
            else:
                effect = flow.send(answer)
    except StopIteration as end:
        result: T = end.value
        return result


async def run(channel: AsyncChannel, workers: Workers, flow: Flow[T]) -> T:
    """Perform a flow to its end. Raises TransportError: the channel is unusable then, unless it is RequestRefused."""

    def perform(effect: Effect) -> Awaitable[Any]:
        if isinstance(effect, Send):
            return channel.send(effect.buffers)
        if isinstance(effect, Recv):
            return channel.recv(effect.nbytes)
        if isinstance(effect, RecvInto):
            return channel.recv_into(effect.views)
        if isinstance(effect, Work):
            return workers.run(effect)
        if isinstance(effect, SendWithFds):
            return channel.send_with_fds(effect.data, effect.fds)
        return channel.recv_with_fds(effect.nbytes)

    return await drive_async(flow, perform)


class AsyncLink(Session):
    """A session over a channel that waits with asyncio."""

    channel: AsyncChannel

    def __init__(self, channel: AsyncChannel, joined: Joined, workers: Workers) -> None:
        super().__init__(channel, joined)
        self._workers = workers

    async def run(self, flow: Flow[T], deadline: float) -> T:
        """Perform a flow to its end. Raises TransportError; the link is unusable then, unless it is RequestRefused."""
        self.deadline = deadline
        return await within(run(self.channel, self._workers, flow), deadline)

    def say_goodbye(self) -> None:
        """Give back what is still held, if that goes without waiting, before a close."""
        if self.conversation.rider:
            for effect in self.conversation.release_quietly(self.conversation.rider):
                assert isinstance(effect, Send)
                with contextlib.suppress(OSError):
                    self.channel.sock.send(b"".join(effect.buffers))


class AsyncDialer:
    """Opens links for one server by the best path the settings allow, and remembers what it learnt."""

    def __init__(self, config: ClientConfig, attach: Callable[[], AsyncChannel] | None = None) -> None:
        self._config = config
        self._credentials = Credentials(config)
        self._attach = attach
        self._route: Route[AsyncLink] = Route(config, attached=attach is not None)
        self._addresses: list[tuple[int, tuple[Any, ...]]] = []
        self.workers = Workers(config.copy_threads)

    @property
    def arena(self) -> ArenaMap | None:
        """The map of the server's memory that its links use, None where they have none."""
        return self._route.known

    def forget_arena(self) -> None:
        """Hold the map no longer: it goes with the last link or view that uses it, not when this is collected."""
        self._route.known = None

    async def open(self, deadline: float) -> AsyncLink:
        """A joined link. Raises TransportError when no path works."""

        async def dial(effect: Dial) -> AsyncLink:
            channel = await self._connect(effect.path, deadline)
            try:
                token = self._credentials.token_for(channel)
                nixl_by = deadline if effect.nixl else None
                joining = join(shared=effect.shared, nixl_by=nixl_by, known=self._route.known, token=token)
                joined = await run(channel, self.workers, joining)
                return AsyncLink(channel, joined, self.workers)
            except BaseException:
                channel.close()
                raise

        return await within(drive_async(self._route.open(), dial), deadline)

    async def _connect(self, path: str, deadline: float) -> AsyncChannel:
        """Where every connection of the asyncio client begins. Addresses found last time are used again; after a
        failure the name is resolved anew."""
        config = self._config
        if self._attach is not None:
            return self._attach()
        if path:
            channel = await connect_unix_async(path, config.connect_s, deadline)
            if path != config.path:
                self._credentials.check_same_user(channel)
            return channel
        addresses = self._addresses or await resolve_async(config.host, config.port, deadline)
        self._addresses = []
        channel = await connect_tcp_async(addresses, config.connect_s, deadline)
        self._addresses = addresses
        return await self._secure(channel) if self._credentials.encrypts else channel

    async def _secure(self, channel: AsyncChannel) -> AsyncChannel:
        """The same, encrypted, with the server verified. Raises TransportError and closes it."""
        credentials = self._credentials
        try:
            secured = AsyncTlsChannel(channel, credentials.context(), credentials.server_name)
            channel = secured
            await secured.handshake()
            return secured
        except ValueError as error:  # a name that can be none
            channel.close()
            raise TransportError(f"server_name={credentials.server_name!r} cannot be a host: {error}") from None
        except BaseException:
            channel.close()
            raise
