"""How many threads are inside calls of ours: each may compute with a network of its own."""

from __future__ import annotations

import threading
from collections import Counter

_lock = threading.Lock()
_inside: Counter[int] = Counter()


def enter() -> None:
    """This thread is inside one more call."""
    with _lock:
        _inside[threading.get_ident()] += 1


def leave() -> None:
    """And one less."""
    thread = threading.get_ident()
    with _lock:
        _inside[thread] -= 1
        if not _inside[thread]:
            del _inside[thread]


def number() -> int:
    """Threads inside; calls within calls count once."""
    with _lock:
        return len(_inside)
