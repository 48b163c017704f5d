"""Maps of the newest stage, drawn over its canvas: what is painted now, where it changes, where the gradient is, and
the losses tile by tile.

Nothing here is committed state: the gradient, the slot that is being written and the file of the losses have no
checksums in the journal, so that a value may be of one iteration or the next. A few rows of each chunk are read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import numpy as np

from pipeline.core.errors import DamagedStateError, PipelineError
from pipeline.core.files import read_regular
from pipeline.core.text import shown
from pipeline.core.tiling import Rect, chunks_of
from pipeline.rundir import stage_path
from pipeline.store import GRADIENT, TILE_LOSSES, ChunkError, StageArray, open_array
from pipeline.viewer.pictures import NoPictureError
from pipeline.viewer.snapshot import RunReader, Snapshot

_LOSSES = {  # by kind of map, the terms that it adds up
    "losses": ("content", "style", "variation"),
    "content": ("content",),
    "style": ("style",),
    "variation": ("variation",),
}
KINDS = ("progress", "gradient", "change", *_LOSSES)
_ROWS = 8  # of each chunk
_MAX_LOSSES_BYTES = 64 * 2**20  # a hundred thousand tiles take 6 MB


def chunk_map(reader: RunReader, kind: str) -> dict[str, Any]:
    """A map of the stage that is being painted, as JSON: `values` by row and column, None where unknown.

    `cell_px`: the side of what one value is for, a chunk or, for losses, a tile.

    `progress`: 0 waiting, 1 the gradient of this iteration is there, 2 updated. `gradient`: mean |g|. `change`: mean
    |difference| of two iterations, in levels. Raises NoPictureError if no stage is being painted.
    """
    snapshot = reader.latest()
    if kind in _LOSSES:
        return _loss_map(reader, snapshot, kind)
    if snapshot.manifest is None or not snapshot.position.prepared or snapshot.position.stage_done:
        raise NoPictureError("no stage is being painted, and a finished one keeps its canvas only")
    at = snapshot.position
    gradient = _array(reader, snapshot, GRADIENT)
    newest, other = (_array(reader, snapshot, f"canvas_{slot}") for slot in (at.newest_slot, 1 - at.newest_slot))
    values: Sequence[Sequence[float | None]]
    if kind == "progress":
        values = _progress(gradient, other, _committed_at(snapshot))
    elif kind == "gradient":
        values = _grid(newest, lambda rect: _mean(gradient, rect))
    else:
        values = _grid(newest, lambda rect: _mean(newest, rect, other))
    return _map(snapshot, kind, at.iteration, newest.chunk_px, values)


def _map(
    snapshot: Snapshot, kind: str, iteration: int, cell_px: int, values: Sequence[Sequence[float | None]]
) -> dict[str, Any]:
    assert snapshot.manifest is not None
    stage = snapshot.position.stage
    height, width = snapshot.manifest.stages[stage].size
    return {
        "kind": kind,
        "stage": stage,
        "iteration": iteration,
        "height": height,
        "width": width,
        "cell_px": cell_px,
        "values": values,
    }


def _loss_map(reader: RunReader, snapshot: Snapshot, kind: str) -> dict[str, Any]:
    """The losses of the newest iteration, as the run has left them; also of a stage that is done."""
    if snapshot.manifest is None or not snapshot.position.slots:
        raise NoPictureError("no stage has been painted")
    stage = snapshot.position.stage
    path = stage_path(reader.work_dir, stage) / TILE_LOSSES
    try:
        data = json.loads(read_regular(path, _MAX_LOSSES_BYTES))
        iteration, tile_px = int(data["iteration"]), int(data["tile_px"])
        terms = [[float(value) for value in data["terms"][name]] for name in _LOSSES[kind]]
    except FileNotFoundError:
        raise NoPictureError("this stage has no losses by tile yet: the first iteration measures them") from None
    except (ValueError, LookupError, TypeError, OSError) as error:
        raise NoPictureError(f"{path}: cannot be read ({shown(str(error), 200)})") from error
    height, width = snapshot.manifest.stages[stage].size
    columns = -(-width // max(tile_px, 1))
    sums = [math.fsum(values) for values in zip(*terms, strict=False)]
    if len(sums) != columns * -(-height // max(tile_px, 1)):  # a stranger's file
        raise NoPictureError(f"{path}: is not of this stage")
    finite = [value if math.isfinite(value) else None for value in sums]
    return _map(
        snapshot, kind, iteration + 1, tile_px, [finite[at : at + columns] for at in range(0, len(finite), columns)]
    )


def _array(reader: RunReader, snapshot: Snapshot, name: str) -> StageArray:
    assert snapshot.manifest is not None
    stage = snapshot.position.stage
    try:
        array = open_array(stage_path(reader.work_dir, stage), name)
    except DamagedStateError as error:  # the stage has ended meanwhile
        raise NoPictureError(str(error)) from error
    if array.shape != (*snapshot.manifest.stages[stage].size, 3):
        raise NoPictureError(f"{name} has another size than the stage")
    return array


def _committed_at(snapshot: Snapshot) -> float:
    """The time of the last commit. Records have whole seconds, so that a chunk of the same second counts as new."""
    times = [record.time for record in snapshot.records if record.time]
    return datetime.fromisoformat(times[-1]).timestamp() if times else 0.0


def _progress(gradient: StageArray, written: StageArray, since: float) -> list[list[int]]:
    rows: dict[int, list[int]] = {}
    for cy, cx in gradient.chunk_indices():
        rows.setdefault(cy, []).append(
            2 if _is_newer(written, cy, cx, since) else 1 if _is_newer(gradient, cy, cx, since) else 0
        )
    return [rows[cy] for cy in sorted(rows)]


def _is_newer(array: StageArray, cy: int, cx: int, since: float) -> bool:
    try:
        return array.chunk_path(cy, cx).stat(follow_symlinks=False).st_mtime > since
    except OSError:
        return False


def _grid(array: StageArray, value: Callable[[Rect], float | None]) -> list[list[float | None]]:
    height, width, _ = array.shape
    rows: dict[int, list[float | None]] = {}
    for cy, _, part in chunks_of(Rect(0, height, 0, width), array.chunk_px):
        rows.setdefault(cy, []).append(value(part))
    return [rows[cy] for cy in sorted(rows)]


def _mean(array: StageArray, rect: Rect, minus: StageArray | None = None) -> float | None:
    """The mean of |values|, or of |differences|, in a few rows of a chunk; None if they cannot be read."""
    total, count = 0.0, 0
    try:
        for y in range(rect.y0 + min(_ROWS, rect.height) // 2, rect.y1, max(1, rect.height // _ROWS)):
            row = Rect(y, y + 1, rect.x0, rect.x1)
            values = array.read_window(row).astype(np.float64)
            if minus is not None:
                values = values - minus.read_window(row)
            total, count = total + float(np.abs(values).sum()), count + values.size
    except (ChunkError, PipelineError, OSError):
        return None
    return total / count if count and np.isfinite(total) else None
