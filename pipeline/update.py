"""The update pass: one Adam step, chunk by chunk, from the slot that is read into the other. Numpy alone.

A task reads gradient, canvas, m and v of some chunks, whole, into arrays that its thread keeps; steps; and writes
canvas, m and v. Of a compact state the numbers are unpacked and packed again in blocks of rows, so that the float
values of a chunk are never all in memory.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import adam, timeline
from pipeline.arrays import GRADIENT, slot_names
from pipeline.checksums import ChunkSums
from pipeline.cost import UNPACKED_VALUES
from pipeline.formats import BFLOAT16, FIXED16, RoundingBytes
from pipeline.store import open_array

Array = NDArray[Any]
# Chunks per task: enough to make the scheduler's cost per chunk small, few enough to keep workers busy.
CHUNKS_PER_TASK = 8


@dataclass(frozen=True)
class UpdateSpec:
    """One Adam step of a few chunks, from slot `slot` into the other.

    `checksums`: of all arrays that are read. `rounding`: (seed, stage, iteration), which decide how a compact state is
    rounded.
    """

    stage_dir: Path
    chunks: tuple[tuple[int, int], ...]
    slot: int
    step: adam.AdamStep
    checksums: Mapping[str, str]
    rounding: tuple[int, int, int]


@dataclass(frozen=True)
class UpdateResult:
    """Σ|u| of every chunk, max|u| over them all, and the checksums of what was written, by array."""

    sums_abs_u: tuple[float, ...]
    max_abs_u: float
    sums: Mapping[str, ChunkSums]


def update_specs(
    stage_dir: Path, slot: int, step: adam.AdamStep, checksums: Mapping[str, str], rounding: tuple[int, int, int]
) -> list[UpdateSpec]:
    """The tasks of one update pass, row by row over the canvas."""
    indices = open_array(stage_dir, GRADIENT).chunk_indices()
    return [
        UpdateSpec(stage_dir, tuple(indices[first : first + CHUNKS_PER_TASK]), slot, step, checksums, rounding)
        for first in range(0, len(indices), CHUNKS_PER_TASK)
    ]


def update_task(spec: UpdateSpec) -> UpdateResult:
    """Read gradient, canvas, m, v of each chunk, step, and write canvas, m, v into the other slot.

    Raises ChunkError, StorageError, and DamagedStateError for a canvas that a compact state cannot hold.
    """
    sources = [open_array(spec.stage_dir, name, spec.checksums[name]) for name in (GRADIENT, *slot_names(spec.slot))]
    targets = [open_array(spec.stage_dir, name) for name in slot_names(1 - spec.slot)]
    written: dict[str, ChunkSums] = {name: {} for name in slot_names(1 - spec.slot)}
    stored = [_BUFFERS.array(source.path.name.split("_")[0], source.chunk_shape, source.dtype) for source in sources]
    sums: list[float] = []
    largest = 0.0
    for cy, cx in spec.chunks:
        with timeline.span("read", chunk=(cy, cx)):
            for source, data in zip(sources, stored, strict=True):
                source.read_chunk(cy, cx, data)
        with timeline.span("update", chunk=(cy, cx)):
            if sources[0].encoding is None:
                abs_u = _float_update(stored, spec.step)
            else:
                abs_u = _compact_update(stored, spec.step, RoundingBytes(*spec.rounding, (cy, cx)))
        with timeline.span("write", chunk=(cy, cx)):
            for target, data in zip(targets, stored[1:], strict=True):
                written[target.path.name][cy, cx] = target.write_chunk(cy, cx, data)
        inside = abs_u[sources[0].valid_part(cy, cx)]
        sums.append(float(inside.sum(dtype=np.float64)))
        largest = max(largest, float(inside.max()))
    return UpdateResult(tuple(sums), largest, written)


def _float_update(stored: Sequence[Array], step: adam.AdamStep) -> Array:
    """Advance `stored` (gradient, canvas, m, v) in place; gives |u| of the chunk."""
    gradient, canvas, m, v = stored
    return adam.update(gradient, canvas, m, v, _BUFFERS.array("abs_u", gradient.shape, gradient.dtype), step)


def _compact_update(stored: Sequence[Array], step: adam.AdamStep, random: RoundingBytes) -> Array:
    """Advance `stored` (gradient, canvas, m, v, as on disk) in place; gives |u| of the chunk.

    Canvas and v are rounded by chance, with the same random bytes: each is fair, and their errors need not be
    independent of each other. m changes by a tenth per iteration, and is rounded to nearest.
    """
    shape = stored[0].shape
    abs_u = _BUFFERS.array("abs_u", shape, np.dtype(np.float32))
    block_rows = min(shape[0], max(1, UNPACKED_VALUES // (shape[1] * shape[2])))
    block_shape = (block_rows, *shape[1:])
    blocks = [_BUFFERS.array(f"values_{index}", block_shape, np.dtype(np.float32)) for index in range(4)]
    for y0 in range(0, shape[0], block_rows):
        rows = slice(y0, min(y0 + block_rows, shape[0]))
        gradient, canvas, m, v = values = [block[: rows.stop - rows.start] for block in blocks]
        for encoding, data, into in zip((BFLOAT16, FIXED16, BFLOAT16, BFLOAT16), stored, values, strict=True):
            encoding.decode(data[rows], into)
        adam.update(gradient, canvas, m, v, abs_u[rows], step)
        bytes_ = random.take(canvas.shape)
        scratch = gradient.view(np.uint32)  # it has served
        FIXED16.encode_stochastic(canvas, bytes_, stored[1][rows], scratch)
        BFLOAT16.encode(m, stored[2][rows])
        BFLOAT16.encode_stochastic(v, bytes_, stored[3][rows], scratch)
    return abs_u


class _Buffers(threading.local):
    """Arrays that a thread keeps from task to task: the kernel would have to clear new ones, page by page."""

    def __init__(self) -> None:
        self._kept: dict[str, Array] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """An array of unknown values; the same one for the same arguments."""
        kept = self._kept.get(name)
        if kept is None or kept.shape != shape or kept.dtype != dtype:
            kept = self._kept[name] = np.empty(shape, dtype)
        return kept


_BUFFERS = _Buffers()
