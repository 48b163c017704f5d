"""What the outside does to the process: signals that ask it to stop, and a terminal or log that goes away."""

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

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_ending = threading.Event()  # set: nothing more is written to stderr


@contextmanager
def stop_on_signals(sink: Sink, farewell: Callable[[], bytes] = bytes) -> Iterator[threading.Event]:
    """The event that Ctrl-C, TERM or HUP sets: stop between two tasks. A second signal ends the process at once.

    `farewell` gives what stderr needs at such an end, for a terminal whose display was changed.

    Ending at once is safe: what is committed is on the disk, and the system releases the lock. A signal that is
    ignored stays so: HUP under nohup, Ctrl-C in the background. A thread listens, so that a long call of the main
    thread into a library (a sync, a hash) keeps no signal waiting.
    """
    stop = threading.Event()
    hearing, telling = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(telling, False)
    listener = threading.Thread(target=_listen, args=(hearing, stop, sink, farewell), name="signals", daemon=True)
    listener.start()
    # The pipe before the handlers, and after them at the end: else a signal between the two would be lost.
    outer = signal.set_wakeup_fd(telling, warn_on_full_buffer=False)
    # What a handler does is of no matter, but there must be one: the byte for the listener is written beside it.
    listened = [number for number in _STOPPING if signal.getsignal(number) is not signal.SIG_IGN]
    handlers = {number: signal.signal(number, lambda *_: None) for number in listened}
    for number in listened:
        signal.siginterrupt(number, False)  # else a slow disk (NFS, FUSE) answers EINTR to what Python does not repeat
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(outer)
        os.close(telling)  # the listener reads the end
        listener.join()
        os.close(hearing)


def _listen(hearing: int, stop: threading.Event, sink: Sink, farewell: Callable[[], bytes]) -> None:
    """Act on every signal number that comes through the pipe, until that is closed."""
    while heard := os.read(hearing, 1):
        if heard[0] not in _STOPPING:
            continue
        if stop.is_set():
            _end_at_once(heard[0], farewell)
        stop.set()
        # on a thread of its own: where the terminal is stopped or full, the second signal must still be heard
        note = Note("stopping after the tiles in flight; once more to abort")
        threading.Thread(target=sink, args=(note,), daemon=True).start()


def _end_at_once(number: int, farewell: Callable[[], bytes]) -> None:
    _ending.set()
    with contextlib.suppress(OSError):
        if select.select([], [2], [], 0)[1]:  # a terminal that is stopped or full would keep us here
            os.write(2, farewell())
    os._exit(128 + number)


class _Steadfast:
    """A text stream whose reader may go away: a closed terminal or a full disk under a log must not end a run."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            if not _ending.is_set():
                return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def steadfast_stderr() -> Iterator[None]:
    """Inside, what cannot be written to stderr is lost, and nothing else."""
    stream = sys.stderr
    sys.stderr = _Steadfast(stream)
    try:
        yield
    finally:
        sys.stderr = stream


def drop_unwritable_stdout() -> None:
    """Forget what nobody takes from stdout: the interpreter would try again at its end, and fail with its own code."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
