"""Connections of dask.distributed that only processes of this user can make.

A scheduler runs whatever it is sent, and a port on 127.0.0.1 is open to everybody who has an account on the machine.
The kernel knows whose a connection is: those of other users are closed before a byte of them is read.
"""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path
from typing import Any

from distributed.comm.registry import backends
from distributed.comm.tcp import TCPBackend, TCPConnector, TCPListener

SCHEME = "own"
_ESTABLISHED = "01"  # from net/tcp_states.h; what a process has closed is nobody's


def is_ours(connection: socket.socket) -> bool:
    """Whether the other end of a connection within this machine is a socket of this user."""
    ends = [_in_hex(*connection.getpeername()), _in_hex(*connection.getsockname())]
    for line in Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]:
        _, *addresses, state, _, _, _, uid = line.split()[:8]
        if addresses == ends:
            return state == _ESTABLISHED and int(uid) == os.getuid()
    return False


def _in_hex(host: str, port: int) -> str:
    """An address as /proc/net/tcp writes it."""
    (number,) = struct.unpack("=I", socket.inet_aton(host))
    return f"{number:08X}:{port:04X}"


class _Listener(TCPListener):
    prefix = f"{SCHEME}://"

    async def _handle_stream(self, stream: Any, address: Any) -> None:
        if is_ours(stream.socket):
            await super()._handle_stream(stream, address)  # type: ignore[no-untyped-call]
        else:
            stream.close()


class _Connector(TCPConnector):
    prefix = f"{SCHEME}://"


class _Backend(TCPBackend):
    _listener_class = _Listener
    _connector_class = _Connector


backends[SCHEME] = _Backend()
