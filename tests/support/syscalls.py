"""Intercepts every system call by which a process and its threads change files, before the call happens.

The process installs a seccomp filter; the kernel then suspends each of these calls until a supervisor answers it:

    run: openat("c/0/0", O_WRONLY) ──► kernel ──► Watch, in another process: continue | kill before the call
                                                  | kill after half a write | fail with an errno, as a broken disk

The supervisor sees the calls of all threads in one order, so a sweep over all calls is complete; strace counts each
thread's calls separately. Linux on x86-64 only.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import platform
import re
import select
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path

# System call number: name, and the arguments that identify the file: p a path, f a descriptor, dp a directory's
# descriptor and a path relative to it.
_CALLS: dict[int, tuple[str, str]] = {
    1: ("write", "f"),
    2: ("open", "p"),
    18: ("pwrite64", "f"),
    20: ("writev", "f"),
    40: ("sendfile", "f"),
    74: ("fsync", "f"),
    75: ("fdatasync", "f"),
    76: ("truncate", "p"),
    77: ("ftruncate", "f"),
    82: ("rename", "pp"),
    83: ("mkdir", "p"),
    84: ("rmdir", "p"),
    86: ("link", "pp"),
    87: ("unlink", "p"),
    88: ("symlink", "pp"),
    162: ("sync", ""),
    257: ("openat", "dp"),
    258: ("mkdirat", "dp"),
    263: ("unlinkat", "dp"),
    264: ("renameat", "dpdp"),
    265: ("linkat", "dpdp"),
    277: ("sync_file_range", "f"),
    285: ("fallocate", "f"),
    296: ("pwritev", "f"),
    306: ("syncfs", "f"),
    316: ("renameat2", "dpdp"),
    326: ("copy_file_range", "f"),
}
# The same for calls that only read; they are suspended if a Watch asks for reads.
_READS: dict[int, tuple[str, str]] = {
    0: ("read", "f"),
    17: ("pread64", "f"),
    295: ("preadv", "f"),
    327: ("preadv2", "f"),
}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_OPEN_FLAGS = {2: 1, 257: 2}  # the index of the flags argument
_AT_CWD = -100
HALVED = ("write", "pwrite64")  # the calls after half of which a process can be killed

_RECEIVE, _SEND = 0xC0502100, 0xC0182101  # ioctls of a listener: receive the next call, answer one
_NOTICE = struct.Struct("<QIIiIQ6Q")  # id, thread, flags, number, architecture, instruction, arguments
_ANSWER = struct.Struct("<QqiI")  # id, value, error, flags
_END_S = 60  # limit from the end of a process to the end of its listener
_GO_ON = 1  # SECCOMP_USER_NOTIF_FLAG_CONTINUE


class Verdict(Enum):
    """What happens to a call, and to the process that makes it."""

    GO = auto()
    KILL = auto()  # before the call
    HALF = auto()  # after half the bytes of a write, else before the call
    HOLD = auto()  # the call never returns, as on a disk that hangs


Answer = Verdict | int | threading.Event  # errno: the call fails with it; event: the call waits until it is set


@dataclass(frozen=True)
class Call:
    """A call that changes a file: its name, and the path below the watched folder without its random parts."""

    name: str
    path: str


def supported() -> bool:
    """Whether this machine has seccomp user notification."""
    actions = "/proc/sys/kernel/seccomp/actions_avail"
    with contextlib.suppress(OSError):
        return (
            sys.platform == "linux"
            and platform.machine() == "x86_64"
            and "user_notif" in Path(actions).read_text(encoding="ascii")
        )
    return False


# --- in the watched process ------------------------------------------------------------------------------------------


def be_watched(address: str, reads: bool) -> None:
    """Suspend the calls of this process, its threads and its children from now on until the Watch at `address` answers.

    Raises OSError where the kernel refuses.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(address)
        listener = _install_filter(reads)
        socket.send_fds(connection, [b"!"], [listener])
        os.close(listener)


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]


def _install_filter(reads: bool) -> int:
    """Install the seccomp filter in this process; returns the descriptor of its listener."""
    libc = ctypes.CDLL(None, use_errno=True)
    code = _filter(reads)
    program = _Program(len(code) // 8, code)
    no_new_privileges, set_filter, with_listener, seccomp = 38, 1, 8, 317
    if libc.prctl(no_new_privileges, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    listener = libc.syscall(seccomp, set_filter, with_listener, ctypes.byref(program))
    if listener < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    return int(listener)


def _filter(reads: bool) -> bytes:
    """The BPF program: suspend the calls of the table, allow all others; without `reads`, allow opening for reading."""
    load, equal, any_bit, give = 0x20, 0x15, 0x45, 0x06
    number_at, architecture_at, arguments_at = 0, 4, 16
    x86_64, allow, hold = 0xC000003E, 0x7FFF0000, 0x7FC00000

    def line(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("<HBBI", code, if_true, if_false, value)

    lines = [line(load, architecture_at), line(equal, x86_64, 1, 0), line(give, allow), line(load, number_at)]
    for number in _CALLS | _READS if reads else _CALLS:
        if number in _OPEN_FLAGS and not reads:
            lines += [line(equal, number, 0, 4), line(load, arguments_at + 8 * _OPEN_FLAGS[number])]
            lines += [line(any_bit, _WRITING, 0, 1), line(give, hold), line(give, allow)]
        else:
            lines += [line(equal, number, 0, 1), line(give, hold)]
    return b"".join([*lines, line(give, allow)])


# --- in the watching process -----------------------------------------------------------------------------------------


class Watch:
    """Listens for one watched process and answers its calls on files below `folder`.

    `judge` is called with every such call, in order, until it has the process killed.
    `reads`: calls that only read are suspended too.
    """

    def __init__(self, folder: Path, judge: Callable[[Call], Answer], reads: bool = False):
        self.reads = reads
        self.calls: list[Call] = []
        self._folder = folder.resolve()
        self._judge = judge
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind("")  # an empty name: Linux assigns a free abstract address
        self._socket.listen(1)
        self.address = "\0" + self._socket.getsockname()[1:].decode()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def wait(self) -> list[Call]:
        """Wait for the end of the process; returns all its calls."""
        self._thread.join(_END_S)
        assert not self._thread.is_alive(), "no process has connected, or it is still running"
        return self.calls

    def _watch(self) -> None:
        with self._socket, self._socket.accept()[0] as connection:
            _, (listener, *_), _, _ = socket.recv_fds(connection, 1, 1)
        poll = select.poll()
        poll.register(listener, select.POLLIN)
        try:
            while poll.poll()[0][1] & select.POLLIN:
                self._answer(listener)
        finally:
            os.close(listener)

    def _answer(self, listener: int) -> None:
        notice = bytearray(_NOTICE.size)
        try:
            fcntl.ioctl(listener, _RECEIVE, notice)
            identity, thread, _, number, _, _, *arguments = _NOTICE.unpack(notice)
            error = self._decide(thread, number, arguments)
        except (FileNotFoundError, ProcessLookupError):
            return  # the thread was killed before the answer
        if isinstance(error, threading.Event):  # answered on another thread, so that other calls continue
            threading.Thread(target=self._answer_later, args=(listener, identity, error), daemon=True).start()
        elif error is not None:
            _send(listener, identity, error)

    def _answer_later(self, listener: int, identity: int, allowed: threading.Event) -> None:
        allowed.wait()
        _send(listener, identity, 0)

    def _decide(self, thread: int, number: int, arguments: list[int]) -> int | threading.Event | None:
        """The errno with which the call fails, 0 to continue, an event to wait for, or None for no answer at all."""
        name, kinds = (_CALLS | _READS)[number]
        paths = _paths(thread, kinds, arguments)
        inside = [path for path in paths if Path(path).is_relative_to(self._folder)]
        if paths and not inside:
            return 0
        call = Call(name, _steady(" -> ".join(os.path.relpath(path, self._folder) for path in inside)))
        self.calls.append(call)
        verdict = self._judge(call)
        if not isinstance(verdict, Verdict):
            return verdict
        if verdict in (Verdict.GO, Verdict.HOLD):
            return 0 if verdict is Verdict.GO else None
        if verdict is Verdict.HALF and name in HALVED:
            _write_half(thread, name, arguments)
        os.kill(_process_of(thread), signal.SIGKILL)
        return 0


def _send(listener: int, identity: int, error: int) -> None:
    with contextlib.suppress(OSError):  # the thread was killed before the answer
        fcntl.ioctl(listener, _SEND, _ANSWER.pack(identity, 0, -error, 0 if error else _GO_ON))


def _steady(path: str) -> str:
    """`path` without the parts that differ from run to run: process ids, random names."""
    return re.sub(r"partial-.*-\d+-[0-9a-f]{8}", "partial", re.sub(r"[0-9a-f]{32}", "random", path))


def _paths(thread: int, kinds: str, arguments: list[int]) -> list[str]:
    """The absolute paths that a call names; empty for a call without a file argument."""
    proc = f"/proc/{thread}"
    paths: list[str] = []
    folder = str(Path(f"{proc}/cwd").readlink())
    for kind, argument in zip(kinds, arguments, strict=False):
        if kind == "d":
            signed = ctypes.c_int(argument & 0xFFFFFFFF).value
            folder = str(Path(f"{proc}/cwd" if signed == _AT_CWD else f"{proc}/fd/{signed}").readlink())
        elif kind == "f":
            paths.append(str(Path(f"{proc}/fd/{argument}").readlink()))
        else:
            paths.append(str(Path(folder, _text(thread, argument))))
    return paths


def _text(thread: int, address: int) -> str:
    """The zero-terminated string at an address of the process."""
    with Path(f"/proc/{thread}/mem").open("rb", buffering=0) as memory:
        memory.seek(address)
        data = b""
        while b"\0" not in data and (
            part := memory.read(256 - (address + len(data)) % 256)
        ):  # never across the end of a page, which may be unmapped
            data += part
    return os.fsdecode(data.partition(b"\0")[0])


def _process_of(thread: int) -> int:
    status = Path(f"/proc/{thread}/status").read_text(encoding="ascii", errors="replace")
    return int(re.findall(r"^Tgid:\s+(\d+)", status, re.MULTILINE)[0])


def _write_half(thread: int, name: str, arguments: list[int]) -> None:
    """Write the first half of the buffer on behalf of the thread."""
    descriptor, address, count, offset = arguments[:4]
    with Path(f"/proc/{thread}/mem").open("rb", buffering=0) as memory:
        memory.seek(address)
        data = memory.read(count // 2)
    if name == "write":
        info = Path(f"/proc/{thread}/fdinfo/{descriptor}").read_text(encoding="ascii")
        offset = int(re.findall(r"^pos:\s+(\d+)", info, re.MULTILINE)[0])
        if int(re.findall(r"^flags:\s+(\d+)", info, re.MULTILINE)[0], 8) & os.O_APPEND:
            offset = Path(f"/proc/{thread}/fd/{descriptor}").stat().st_size
    file = os.open(f"/proc/{thread}/fd/{descriptor}", os.O_WRONLY)
    try:
        os.pwrite(file, data, offset)
    finally:
        os.close(file)
