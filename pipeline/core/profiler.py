"""Profiler: the time that threads spend on each kind of work, and optionally a Chrome trace of every span.

    with span("read", tile=3): …

    kind      measured
    read      reading chunks from disk and decoding them
    compute   the network on one tile, or other work on the device
    update    the arithmetic of the Adam update of one block
    write     encoding chunks and writing them to disk
    wait      waiting for the device, for the disk or for chunks of another pass

The sums are always kept: a span costs microseconds, and there are a few per tile. Open a trace with chrome://tracing or
https://ui.perfetto.dev.
"""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from pipeline.core.errors import ConfigError

_lock = threading.Lock()
_seconds: defaultdict[str, float] = defaultdict(float)
_trace: TextIO | None = None


@contextmanager
def span(kind: str, **details: object) -> Iterator[None]:
    """Add the duration of the block to the sum of `kind`. `details` are the arguments of the event in the trace."""
    start_ns = time.perf_counter_ns()
    try:
        yield
    finally:
        duration_ns = time.perf_counter_ns() - start_ns
        with _lock:
            _seconds[kind] += duration_ns / 1e9
            if _trace is not None:
                event = {"name": kind, "ph": "X", "ts": start_ns / 1000, "dur": duration_ns / 1000, "pid": 0}
                event |= {"tid": threading.get_native_id(), "args": details}
                _trace.write(f"{json.dumps(event)},\n")


def add(seconds: Mapping[str, float]) -> None:
    """Add the sums of another process. Its spans are not part of the trace."""
    with _lock:
        for kind, value in seconds.items():
            _seconds[kind] += value


def take() -> dict[str, float]:
    """Seconds by kind, summed over all threads since the last call."""
    with _lock:
        sums = dict(_seconds)
        _seconds.clear()
    return sums


@contextmanager
def recording(path: Path | None) -> Iterator[None]:
    """Append every span of the block to the Chrome trace `path`; None writes nothing.

    The JSON list of events is never closed, so that a resumed run can append to it; viewers accept that.
    Raises ConfigError if `path` cannot be written, or is a file of another kind.
    """
    global _trace  # noqa: PLW0603 - one trace per process
    if path is None:
        yield
        return
    with _opened(path) as file:
        with _lock:
            _trace = file
        try:
            yield
        finally:
            with _lock:
                _trace = None


def _opened(path: Path) -> TextIO:
    try:
        file = path.open("a+", encoding="utf-8", errors="replace")
        file.seek(0)
        start = file.read(2)
        if not start:
            file.write("[\n")
    except OSError as error:
        raise ConfigError(f"--profile {path}: cannot be written ({error.strerror}). Choose another place.") from error
    if start not in ("", "[\n"):
        file.close()
        raise ConfigError(f"--profile {path}: exists and is not a trace; it would be damaged. Choose another name.")
    return file
