"""Whose turn the disk is: that of tiles that are read, for which the network waits, before that of the update.

On a slow disk the update's large calls would hold up the small ones by which halo strips are read. One tile alone does
not keep a disk busy, so the update gives way where two or more are read, and goes on between two of them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.core import profiler

# Tiles that are read at once, from which on the update waits.
GIVE_WAY_TO = 2


class DiskTurns:
    """The tiles that are being read in this process. Safe to use from any thread."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._reading = 0

    @contextmanager
    def reading(self) -> Iterator[None]:
        """A tile is read while the block runs."""
        with self._condition:
            self._reading += 1
        try:
            yield
        finally:
            with self._condition:
                self._reading -= 1
                self._condition.notify_all()

    def give_way(self) -> None:
        """Return when fewer tiles are read than it is worth to wait for."""
        if self._reading >= GIVE_WAY_TO:
            with profiler.span("wait"), self._condition:
                self._condition.wait_for(lambda: self._reading < GIVE_WAY_TO)


TURNS = DiskTurns()
