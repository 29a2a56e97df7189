"""A framed stream socket, unix or TCP, with a deadline on every call. Blocking; used by both ends.

Each wait is a poll with what is left of the deadline. The call that follows may wait for more (a large receive is one
system call into the destination), so the kernel's own timeouts (SO_RCVTIMEO, SO_SNDTIMEO) bound it too.
"""

from __future__ import annotations

import array
import contextlib
import ipaddress
import os
import select
import socket
import time
from collections.abc import Sequence
from struct import pack
from typing import Any, Final

from mmcache.errors import DeadlineExceeded, TransportError
from mmcache.transport.base import SHORT_NBYTES, Buffer, pieces_of

MAX_FDS: Final = 2
MAX_VIEWS: Final = 512  # in one system call; Linux takes 1024
SPIN_S: Final = 100e-6
CROWDED_S: Final = 500e-6  # a yield this long: somebody else had the CPU
FIRST_REST_S: Final = 0.005
LONGEST_REST_S: Final = 0.2
READ_AHEAD_NBYTES: Final = 16 << 10  # small messages arrive whole in one system call; payloads bypass this


def fds_in(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    """The file descriptors that came with a message; the caller owns them."""
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    return list(fds)


def _timeval(seconds: float) -> bytes:
    whole = int(seconds)
    return pack("ll", whole, max(1, int((seconds - whole) * 1e6)))


class Channel:
    """Exact sends and receives over one connected socket. Any failure raises TransportError: drop the channel then.

    `deadline` is a `time.monotonic()` instant; `None` waits for ever (a server waiting for the next request).
    """

    __slots__ = ("_ahead", "_end", "_poll", "_recv_timeout_s", "_rest_s", "_send_timeout_s", "_soon", "_spin_from",
                 "_start", "_wanted_nbytes", "sock", "spin_s")  # fmt: skip

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(True)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self._recv_timeout_s = self._send_timeout_s = 0.0
        self._ahead = memoryview(bytearray(READ_AHEAD_NBYTES))
        self._start = self._end = 0
        self._poll = select.poll()
        self._poll.register(sock)
        self.spin_s = SPIN_S
        self._spin_from = self._rest_s = 0.0
        self._wanted_nbytes = 1
        self._soon = True  # the next message is expected within `spin_s`, as the last one came within that

    def _arm(self, option: int, current_s: float, deadline: float | None) -> float:
        """Have a kernel timeout of 90 to 100% of what is left; returns it. A call it ends early is tried again."""
        if deadline is None:
            left_s = wanted_s = 0.0
        else:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise DeadlineExceeded("the deadline passed; raise deadline_s or look at the server's load")
            wanted_s = 0.95 * left_s
        if not 0.9 * left_s <= current_s <= left_s:
            self.sock.setsockopt(socket.SOL_SOCKET, option, _timeval(wanted_s) if wanted_s else bytes(16))
            return wanted_s
        return current_s

    def send(self, buffers: Sequence[Buffer], deadline: float | None) -> None:
        """Send all the buffers, in order."""
        if len(buffers) == 1 and len(buffers[0]) <= SHORT_NBYTES:
            self._send_all(buffers[0], deadline, self._try_send(buffers[0]))
            return
        for piece in pieces_of(buffers):
            self._send_all(piece, deadline)

    def _try_send(self, data: Buffer) -> int:
        """How much of this can be sent without a wait."""
        try:
            return self.sock.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise as_transport_error(error) from error

    def _send_all(self, data: Buffer, deadline: float | None, sent: int = 0) -> None:
        while sent < len(data):
            self._send_timeout_s = self._arm(socket.SO_SNDTIMEO, self._send_timeout_s, deadline)
            self._wait_for(select.POLLOUT, deadline)
            try:
                sent += self.sock.send(memoryview(data)[sent:] if sent else data)
            except BlockingIOError:
                continue  # a little before the deadline: arming again tells
            except OSError as error:
                raise as_transport_error(error) from error

    def recv_into(self, views: Sequence[memoryview], deadline: float | None) -> None:
        """Fill the views (bytes) completely and in order: from what was read ahead, the rest straight from the socket,
        in as few system calls as it allows."""
        for start in range(0, len(views), MAX_VIEWS):
            left = [view for view in views[start : start + MAX_VIEWS] if len(view)]
            while left:
                ahead = self._start < self._end
                count = self._take(left[0]) if ahead else self._recv_some(left, deadline, socket.MSG_WAITALL)
                while left and count >= len(left[0]):
                    count -= len(left.pop(0))
                if count:
                    left[0] = left[0][count:]

    def recv(self, nbytes: int, deadline: float | None) -> bytes:
        """Exactly `nbytes` bytes (bounded by the caller before it asks); may read a little ahead."""
        if nbytes > READ_AHEAD_NBYTES:
            data = bytearray(nbytes)
            self.recv_into((memoryview(data),), deadline)
            return bytes(data)
        self._read_ahead(nbytes, deadline)
        start = self._start
        self._start = start + nbytes
        return bytes(self._ahead[start : start + nbytes])

    def wait_message(self) -> None:
        """Wait, as long as it takes, for what comes next: awake for a moment, if the last message came soon."""
        if self._start < self._end:
            return
        began = time.perf_counter()
        if self._soon:
            self._start, self._end = 0, self._spin(self._ahead)
        self._sleep_for_message()
        self._soon = time.perf_counter() - began < self.spin_s

    def _sleep_for_message(self) -> None:
        while self._start == self._end:
            self._recv_timeout_s = self._arm(socket.SO_RCVTIMEO, self._recv_timeout_s, None)
            try:
                count = self.sock.recv_into(self._ahead)
            except BlockingIOError:
                continue
            except OSError as error:
                raise as_transport_error(error) from error
            if count == 0:
                raise TransportError("the peer closed the connection")
            self._start, self._end = 0, count

    def recv_available_into(self, view: memoryview) -> int:
        """What has already arrived, at most `view`: 0 when nothing has. Never waits. Raises on a closed peer."""
        if self._start < self._end:
            return self._take(view)
        try:
            count = self.sock.recv_into(view, 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise as_transport_error(error) from error
        if count == 0 and len(view):
            raise TransportError("the peer closed the connection")
        return count

    def wait_readable(self, deadline: float) -> None:
        """Wait until there is something to receive, awake for a moment: a sleeper that the sender's CPU wakes is often
        put on that CPU, and then the two take turns. Raises DeadlineExceeded."""
        if self._start < self._end:
            return
        self._poll.modify(self.sock, select.POLLIN)
        now = time.perf_counter()
        end = now + self.spin_s if now >= self._spin_from else now
        while now < end:
            if self._poll.poll(0):
                return
            os.sched_yield()
            later = time.perf_counter()
            if later - now > CROWDED_S:
                break
            now = later
        self._wait_for(select.POLLIN, deadline)

    def want(self, nbytes: int) -> None:
        """Have the waits that follow end when so many bytes are there at least: one wake-up instead of many. Say 1 when
        fewer may come. Where the transport knows no such thing, this does nothing."""
        if nbytes != self._wanted_nbytes and not self.is_unix:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, nbytes)
            self._wanted_nbytes = nbytes

    def _wait_for(self, event: int, deadline: float | None) -> None:
        """Wait until the socket is ready. The kernel's own timeouts bound the call that follows, but begin anew after
        every signal; this one goes on counting, and afterwards each call gets somewhere."""
        if deadline is None:
            return
        self._poll.modify(self.sock, event)
        left_s = deadline - time.monotonic()
        if left_s <= 0 or not self._poll.poll(left_s * 1000):
            raise DeadlineExceeded("the peer was silent, or took nothing, until the deadline")

    def _spin(self, view: memoryview) -> int:
        """Ask a few times for what is about to arrive before going to sleep; how many bytes came.

        Waking a sleeper on another, idle CPU costs tens of microseconds, several times what answering a small request
        takes. Every try yields the CPU, and after a yield that shows others need it, this rests: ever
        longer, until a try succeeds again.
        """
        now = time.perf_counter()
        if now < self._spin_from:
            return 0
        end = now + self.spin_s
        while now < end:
            try:
                count = self._try_recv(view)
            except BlockingIOError:
                pass
            except OSError as error:
                raise as_transport_error(error) from error
            else:
                if count == 0:
                    raise TransportError("the peer closed the connection")
                self._rest_s = 0.0
                return count
            os.sched_yield()
            later = time.perf_counter()
            if later - now > CROWDED_S:
                self._rest_s = min(LONGEST_REST_S, max(FIRST_REST_S, 2 * self._rest_s))
                self._spin_from = later + self._rest_s
                break
            now = later
        return 0

    def _try_recv(self, view: memoryview) -> int:
        """What has arrived, without a wait: BlockingIOError when nothing has."""
        return self.sock.recv_into(view, 0, socket.MSG_DONTWAIT)

    def _recv_some(self, views: Sequence[memoryview], deadline: float | None, flags: int = 0) -> int:
        while True:
            self._recv_timeout_s = self._arm(socket.SO_RCVTIMEO, self._recv_timeout_s, deadline)
            self._wait_for(select.POLLIN, deadline)
            try:
                if len(views) == 1:
                    count = self.sock.recv_into(views[0], 0, flags)
                else:
                    count = self.sock.recvmsg_into(views, 0, flags)[0]
            except BlockingIOError:
                continue  # a little before the deadline: arming again tells
            except OSError as error:
                raise as_transport_error(error) from error
            if count == 0:
                raise TransportError("the peer closed the connection")
            return count

    def _read_ahead(self, nbytes: int, deadline: float | None) -> None:
        """Have at least `nbytes` (at most READ_AHEAD_NBYTES) read ahead."""
        held = self._end - self._start
        if held >= nbytes:
            return
        ahead = self._ahead
        if self._start:
            ahead[:held] = ahead[self._start : self._end]
            self._start, self._end = 0, held
        if self._end < nbytes:
            self._end += self._spin(ahead[self._end :])
        while self._end < nbytes:
            self._end += self._recv_some((ahead[self._end :],), deadline)

    def _take(self, view: memoryview) -> int:
        """Move what was read ahead into `view`, as far as it goes."""
        count = min(len(view), self._end - self._start)
        view[:count] = self._ahead[self._start : self._start + count]
        self._start += count
        return count

    def send_with_fds(self, data: bytes, fds: Sequence[int], deadline: float) -> None:
        """Send `data` with file descriptors beside its first byte (unix sockets only)."""
        self._send_timeout_s = self._arm(socket.SO_SNDTIMEO, self._send_timeout_s, deadline)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        try:
            sent = self.sock.sendmsg([data], rights)
        except OSError as error:
            raise as_transport_error(error) from error
        if sent < len(data):
            self.send([memoryview(data)[sent:]], deadline)

    def recv_with_fds(self, nbytes: int, deadline: float | None) -> tuple[bytes, list[int]]:
        """Exactly `nbytes` bytes and the file descriptors that came beside them; the caller owns those."""
        space = socket.CMSG_SPACE(MAX_FDS * 4)
        while True:
            self._recv_timeout_s = self._arm(socket.SO_RCVTIMEO, self._recv_timeout_s, deadline)
            self._wait_for(select.POLLIN, deadline)
            try:
                data, ancillary, _, _ = self.sock.recvmsg(nbytes, space, socket.MSG_CMSG_CLOEXEC)
                break
            except BlockingIOError:
                continue  # a little before the deadline: arming again tells
            except OSError as error:
                raise as_transport_error(error) from error
        fds = fds_in(ancillary)
        if not data:
            close_fds(fds)
            raise TransportError("the peer closed the connection")
        try:
            rest = self.recv(nbytes - len(data), deadline) if len(data) < nbytes else b""
        except TransportError:
            close_fds(fds)
            raise
        return data + rest, fds

    @property
    def is_unix(self) -> bool:
        """True for a unix socket."""
        return self.sock.family == socket.AF_UNIX

    @property
    def is_tls(self) -> bool:
        """True where what is sent is encrypted."""
        return False

    @property
    def is_loopback(self) -> bool:
        """True if the peer is on this host's loopback interface."""
        return ipaddress.ip_address(self.sock.getpeername()[0].split("%")[0]).is_loopback

    def linger(self, deadline: float) -> None:
        """Say nothing more, and drop what the peer still sends until it leaves or the deadline passes: closing over
        unread bytes would reset the connection before the peer has read the last words."""
        scratch = memoryview(bytearray(4096))
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)
            while True:
                self.recv_into((scratch,), deadline)

    def hang_up(self) -> None:
        """End the connection from another thread: whoever waits on it hears that the peer is gone."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close this end's descriptor (no shutdown: a forked copy in another process stays usable)."""
        with contextlib.suppress(OSError):
            self.sock.close()


def close_fds(fds: Sequence[int]) -> None:
    """Close descriptors, ignoring those already closed."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


def as_transport_error(error: OSError) -> TransportError:
    """What a socket's error is to a caller."""
    if isinstance(error, TransportError):
        return error
    return TransportError(f"the connection broke: {error}")


def connect_tcp(addresses: Sequence[tuple[int, tuple[Any, ...]]], timeout_s: float, deadline: float) -> Channel:
    """A channel to the first address that answers, each given `timeout_s` at most. Raises TransportError."""
    trouble = "no address is known for it"
    for family, address in addresses:
        left_s = min(timeout_s, deadline - time.monotonic())
        if left_s <= 0:
            raise DeadlineExceeded(f"connecting took too long ({trouble}); raise deadline_s")
        try:
            return Channel(_connected(family, address, left_s))
        except OSError as error:
            trouble = f"no answer from {address[0]}:{address[1]}: {error}"
    raise TransportError(f"{trouble}; is `mmcache serve` running there?")


def connect_unix(path: str, timeout_s: float, deadline: float) -> Channel:
    """A channel to a unix socket. Raises TransportError."""
    try:
        return Channel(_connected(socket.AF_UNIX, path, max(0.001, min(timeout_s, deadline - time.monotonic()))))
    except OSError as error:
        raise TransportError(
            f"no answer from unix socket {path}: {error}; is `mmcache serve` running there?"
        ) from error


def _connected(family: int, address: Any, timeout_s: float) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout_s)
        sock.connect(address)
    except BaseException:
        sock.close()
        raise
    return sock
