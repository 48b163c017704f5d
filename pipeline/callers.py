"""How many threads are inside calls of ours: each may compute with a network of its own."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_inside: Counter[int] = Counter()


@contextmanager
def inside() -> Iterator[None]:
    """This thread is inside one more call while the block runs."""
    thread = threading.get_ident()
    with _lock:
        _inside[thread] += 1
    try:
        yield
    finally:
        with _lock:
            _inside[thread] -= 1
            if not _inside[thread]:
                del _inside[thread]


def number() -> int:
    """Threads inside; calls within calls count once."""
    with _lock:
        return len(_inside)
