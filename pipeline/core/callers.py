"""The threads that are inside a call of the library. Each of them may use a network of its own."""

from __future__ import annotations

import threading

# Thread ids, one per call. No lock: every operation below is a single step under the GIL.
_inside: list[int] = []


def enter() -> None:
    """Record that this thread has entered a call; calls may be nested."""
    _inside.append(threading.get_ident())


def leave() -> None:
    """Record that this thread has left a call."""
    _inside.remove(threading.get_ident())


def number() -> int:
    """The number of threads inside a call."""
    return len(set(_inside))
