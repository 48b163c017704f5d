"""The overview of the canvas, taken from the blocks of a chunk while the update pass has them in the cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from pipeline.core import profiler
from pipeline.store import ChunkSums, OverviewChunk, StageArray, result_name

Array = NDArray[Any]


class CanvasOverview:
    """Makes the overview of one chunk of the slot that an update writes, whose arrays are `targets`."""

    def __init__(self, targets: Sequence[StageArray], chunk: tuple[int, int]) -> None:
        names = [target.path.name for target in targets]
        # of what the stage would be exported from: the average of the canvases, if there is one
        self._index = names.index(result_name(int(names[0][-1]), names))
        self._name, self._chunk = names[self._index], chunk
        self._pixels = OverviewChunk(targets[self._index], chunk)

    def watching(self, update: Callable[[Sequence[Array]], Array]) -> Callable[[Sequence[Array]], Array]:
        """`update`, which takes gradient, canvas, m, v and average and changes all but the first, with the overview."""

        def watched(stored: Sequence[Array]) -> Array:
            abs_u = update(stored)
            self._pixels.add(stored[1 + self._index])
            return abs_u

        return watched

    def write(self, written: Mapping[str, ChunkSums]) -> None:
        """Write it, once the chunk has been written with these checksums."""
        with profiler.span("write", chunk=self._chunk):
            self._pixels.write(written[self._name][self._chunk])
