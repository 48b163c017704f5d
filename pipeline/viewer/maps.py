"""Maps of the running stage with one value per chunk: what is painted now, where it changes, where the gradient is.

They are drawn over the canvas. Nothing here is committed state: the gradient and the slot that is being written have no
checksums in the journal, so that a value may be of one iteration or the next. A few rows of each chunk are read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import numpy as np

from pipeline.core.errors import DamagedStateError, PipelineError
from pipeline.core.tiling import Rect, chunks_of
from pipeline.rundir import stage_path
from pipeline.store import GRADIENT, ChunkError, StageArray, open_array
from pipeline.viewer.pictures import NoPictureError
from pipeline.viewer.snapshot import RunReader, Snapshot

KINDS = ("progress", "gradient", "change")
_ROWS = 8  # of each chunk


def chunk_map(reader: RunReader, kind: str) -> dict[str, Any]:
    """A map of the stage that is being painted, as JSON: `values` by chunk row and column, None where unknown.

    `progress`: 0 waiting, 1 the gradient of this iteration is there, 2 updated. `gradient`: mean |g|. `change`: mean
    |difference| of two iterations, in levels. Raises NoPictureError if no stage is being painted.
    """
    snapshot = reader.latest()
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
    height, width, _ = newest.shape
    return {
        "kind": kind,
        "stage": at.stage,
        "iteration": at.iteration,
        "height": height,
        "width": width,
        "chunk_px": newest.chunk_px,
        "values": values,
    }


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
