"""Work that is done again in smaller tiles while those of the plan do not fit in the device's memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.commands.commits import Commits
from pipeline.core.errors import DeviceMemoryError
from pipeline.core.events import Note, Sink
from pipeline.rundir import records


@dataclass(frozen=True)
class TileWork:
    """What a device does in tiles of `largest_px` at most and `step_px` at least; it resumes after the last `unit`."""

    largest_px: int
    step_px: int
    device: str
    unit: str

    def do(
        self, work: Callable[[int], None], commits: Commits, sink: Sink, leaves_memory: Callable[[], bool] = bool
    ) -> None:
        """Call `work` with the tile size in px until it fits. Raises DeviceMemoryError if the smallest does not.

        `leaves_memory`: frees the device otherwise, if that is possible; smaller tiles would change the last bits.
        """
        while True:
            tile_px = min(commits.position.tile_px or self.largest_px, self.largest_px)
            try:
                work(tile_px)
                return
            except DeviceMemoryError:
                has_left = leaves_memory()
                if tile_px == self.step_px and not has_left:
                    raise
            gc.collect()  # the error's frames refer to each other, and to the tile's tensors
            if has_left:
                continue
            smaller = max(self.step_px, tile_px // 2 // self.step_px * self.step_px)
            # recorded: the bits depend on the tiles, and a resume must take the same
            commits.commit(records.SmallerTile(tile_px=smaller))
            cause = f"{self.device} is out of memory for tiles of {tile_px} px"
            sink(Note(f"{cause}: resuming with tiles of {smaller} px from the last {self.unit}"))
