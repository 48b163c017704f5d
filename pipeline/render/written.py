"""What a pass has written so far, for the pass that follows it through the canvas, chunk by chunk."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from pipeline.core import profiler
from pipeline.store.checksums import ChunkSums


class NotNeeded(Exception):  # noqa: N818 - an outcome, not an error
    """The other pass has failed, or ended the stage: what this one does is of no use."""


class Written:
    """The chunks of one array that may be read, with their checksums. Safe to use from any thread."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._sums: ChunkSums = {}
        self._closed = self._unread = False

    def add(self, sums: ChunkSums) -> None:
        """These may be read now. Raises NotNeeded after `close`."""
        with self._condition:
            self.raise_if_closed()
            self._sums.update(sums)
            self._condition.notify_all()

    def close(self) -> None:
        """Nothing more will be written, or is wanted: both passes give up."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()

    def leave(self) -> None:
        """The pass that reads has failed: what of it waits, or would, gives up. The pass that writes goes on."""
        with self._condition:
            self._unread = True
            self._condition.notify_all()

    def raise_if_closed(self) -> None:
        """Raise NotNeeded after `close`."""
        if self._closed:
            raise NotNeeded

    def wait_for(self, chunks: Iterable[tuple[int, int]]) -> ChunkSums:
        """Their checksums, once they are all written. Raises NotNeeded after `close` or `leave`."""
        wanted = set(chunks)
        with profiler.span("wait"), self._condition:
            self._condition.wait_for(lambda: self._closed or self._unread or wanted <= self._sums.keys())
            if self._closed or self._unread:
                raise NotNeeded
            return {chunk: self._sums[chunk] for chunk in wanted}
