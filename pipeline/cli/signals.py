"""Signals that ask the process to stop, and a stderr or stdout that can no longer be written."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from pipeline.core.events import Note, Sink

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_aborting = threading.Event()  # once set, nothing more is written to stderr


@contextmanager
def stop_on_signals(sink: Sink, farewell: Callable[[], bytes] = bytes) -> Iterator[threading.Event]:
    """An event that Ctrl-C, TERM and HUP set, to stop between two tasks. A second signal aborts the process at once.

    `farewell` returns the bytes that restore the terminal before an abort.

    Aborting is safe: committed state is on the disk, and the system releases the lock. Signals that are ignored stay
    ignored: HUP under nohup, Ctrl-C in the background. A thread of its own reads the signals, because the main thread
    may be inside a long library call (a sync, a hash), during which Python runs no handlers.
    """
    stop = threading.Event()
    reader, writer = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(writer, False)
    listener = threading.Thread(target=_listen, args=(reader, stop, sink, farewell), name="signals", daemon=True)
    listener.start()
    # Connect the pipe before the handlers, and disconnect it after them, so that no signal is lost in between.
    outer = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    # The handlers do nothing, but Python only writes signal numbers to the pipe for signals that have a handler.
    listened = [number for number in _STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    handlers = {number: signal.signal(number, lambda *_: None) for number in listened}
    for number in listened:
        # Restart interrupted system calls: some libraries do not retry EINTR, which slow disks (NFS, FUSE) return.
        signal.siginterrupt(number, False)
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(outer)
        os.close(writer)  # ends the listener
        listener.join()
        os.close(reader)


def _listen(reader: int, stop: threading.Event, sink: Sink, farewell: Callable[[], bytes]) -> None:
    """Handle every signal number that arrives through the pipe, until the pipe is closed."""
    while received := os.read(reader, 1):
        if received[0] not in _STOP_SIGNALS:
            continue
        if stop.is_set():
            _abort(received[0], farewell)
        stop.set()
        # In another thread: while a suspended or full terminal blocks the note, a second signal must still abort.
        note = Note("stopping after the tiles in flight; interrupt again to abort")
        threading.Thread(target=sink, args=(note,), daemon=True).start()


def _abort(number: int, farewell: Callable[[], bytes]) -> None:
    _aborting.set()
    with contextlib.suppress(OSError):
        if select.select([], [2], [], 0)[1]:  # a suspended or full terminal would block the write
            os.write(2, farewell())
    os._exit(128 + number)


class _TolerantStream:
    """A text stream that ignores write errors: a closed terminal or a full disk under a log must not end a run."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            if not _aborting.is_set():
                return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def tolerant_stderr() -> Iterator[None]:
    """Inside the block, text that cannot be written to stderr is lost without an error."""
    stream = sys.stderr
    sys.stderr = _TolerantStream(stream)
    try:
        yield
    finally:
        sys.stderr = stream


def discard_unwritable_stdout() -> None:
    """Discard unwritten stdout. Otherwise the interpreter flushes it at exit, fails again and changes the exit code."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
