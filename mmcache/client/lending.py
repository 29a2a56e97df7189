"""Which values of a put lie in memory that can be lent to the server, and the lending of it, as a flow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mmcache.client.protocol import Flow, Send, SendWithFds
from mmcache.client.session import Session
from mmcache.errors import TransportError
from mmcache.pb import cache_pb2 as pb
from mmcache.tensors import Bytes, HostTensor
from mmcache.transport.base import LENT_MEMORIES, Op
from mmcache.transport.lent import BUFFERS, Lendable


class Lent:
    """Memory that a server has mapped, by the numbers it knows it by."""

    def __init__(self, numbers: Mapping[Lendable, int]) -> None:
        self._numbers = numbers

    def place(self, data: bytes | memoryview) -> tuple[int, int, int]:
        """(number, offset, size) of bytes that lie in it."""
        address, nbytes = _address(np.frombuffer(data, np.uint8)), len(data)
        memory = BUFFERS.holding(address, nbytes)
        if memory is None or memory not in self._numbers:
            raise TransportError("memory that was lent went away while it was put")
        return self._numbers[memory], address - memory.address, nbytes


def lend(session: Session, values: Sequence[Mapping[str, HostTensor]]) -> Flow[Lent | None]:
    """Have the server map the memory that these values lie in; None if not all lie in such, or it cannot have it."""
    if not BUFFERS or not session.joined.lends:
        return None
    memories = _memories(values)
    if not memories:
        return None
    for memory in memories:
        if memory not in session.lent and not (yield from _lend(session, memory)):
            return None
    return Lent(dict(session.lent))


def _address(data: Bytes) -> int:
    return int(data.__array_interface__["data"][0])  # several times faster than data.ctypes.data


def _memories(values: Sequence[Mapping[str, HostTensor]]) -> set[Lendable] | None:
    found = set()
    for value in values:
        for tensor in value.values():
            if not tensor.data.nbytes:
                continue
            memory = BUFFERS.holding(_address(tensor.data), tensor.data.nbytes)
            if memory is None:
                return None
            found.add(memory)
    return found


def _lend(session: Session, memory: Lendable) -> Flow[bool]:
    """Raises TransportError."""
    free = set(range(LENT_MEMORIES)).difference(session.lent.values())
    if not free or memory in session.refused:
        return False
    number, conversation = min(free), session.conversation
    yield Send((conversation.request(Op.LEND, pb.LendRequest(number=number, nbytes=memory.nbytes)),))
    yield from conversation.reply(Op.LEND, pb.LendReply())
    yield SendWithFds(b"\0", [memory.fd])
    reply, _ = yield from conversation.reply(Op.LEND, pb.LendReply())
    if reply.why:
        session.refused.add(memory)
        return False
    session.lent[memory] = number
    return True
