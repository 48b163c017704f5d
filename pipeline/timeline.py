"""Where the threads of this process spend their time: sums by kind of work, and a Chrome trace if one is asked for.

    with span("read"): …          the kinds: read, compute, write, update, and wait (for the device)

The sums are always kept; a span costs microseconds, and there are a few per tile. A trace is opened with
chrome://tracing or https://ui.perfetto.dev.
"""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

_lock = threading.Lock()
_seconds: defaultdict[str, float] = defaultdict(float)
_trace: TextIO | None = None


@contextmanager
def span(kind: str, **details: object) -> Iterator[None]:
    """Count the time of the block as `kind`; `details` go into the trace."""
    start = time.perf_counter_ns()
    try:
        yield
    finally:
        _add(kind, start, time.perf_counter_ns(), details)


def _add(kind: str, start_ns: int, end_ns: int, details: dict[str, object]) -> None:
    with _lock:
        _seconds[kind] += (end_ns - start_ns) / 1e9
        if _trace is not None:
            event = {
                "name": kind,
                "ph": "X",
                "ts": start_ns / 1000,
                "dur": (end_ns - start_ns) / 1000,
                "pid": 0,
                "tid": threading.get_native_id(),
                "args": details,
            }
            _trace.write(f"{json.dumps(event)},\n")


def take() -> dict[str, float]:
    """Seconds by kind, summed over all threads since the last call."""
    with _lock:
        taken = dict(_seconds)
        _seconds.clear()
    return taken


@contextmanager
def recording(path: Path | None) -> Iterator[None]:
    """Write every span of the block to `path`, as Chrome trace events; None writes nothing.

    The list's end is missing while it is written, and after a crash: viewers take it all the same.
    """
    global _trace  # noqa: PLW0603 - one process, one timeline
    if path is None:
        yield
        return
    with path.open("w", encoding="utf-8") as file:
        file.write("[\n")
        with _lock:
            _trace = file
        try:
            yield
        finally:
            with _lock:
                _trace = None
            file.write(json.dumps({"name": "end", "ph": "i", "ts": time.perf_counter_ns() / 1000, "pid": 0}) + "\n]\n")
