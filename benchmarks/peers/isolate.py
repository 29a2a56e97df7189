"""A network namespace of one's own, in which only loopback exists: nothing a peer opens can be reached from outside."""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct

# <sched.h>, <linux/sockios.h>, <linux/if.h>
CLONE_NEWNET = 0x40000000
SIOCSIFFLAGS, IFF_UP = 0x8914, 1
INTERFACE_REQUEST = struct.Struct("16sh22x")  # struct ifreq with flags


def isolate() -> str:
    """Move this process, and those it starts from now on, into a new namespace; "" or why it may not.

    Call it before there are threads that use the network: they would stay behind.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET):
        return os.strerror(ctypes.get_errno())
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, INTERFACE_REQUEST.pack(b"lo", IFF_UP))
    return ""
