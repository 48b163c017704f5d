"""The update pass: one Adam step, chunk by chunk, from one slot into the other, in numpy on the CPU.

A task processes its chunks in blocks of rows: it reads gradient, canvas, m and v, and the average of the canvases if
there is one, into buffers of its thread, updates them, and writes all but the gradient. A block is small enough to stay
in the processor's cache from reading to writing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core import profiler
from pipeline.core.tiling import Tile, chunks_of
from pipeline.plan import CHUNKS_PER_KERNEL, update_values
from pipeline.render import adam
from pipeline.render.device_state import on_device, update_chunks
from pipeline.render.overview import CanvasOverview
from pipeline.store import (
    BFLOAT16,
    FIXED16,
    GRADIENT,
    ChunkReader,
    ChunkSums,
    ChunkWriter,
    RoundingBytes,
    StageArray,
    open_array,
    slot_names,
)

Array = NDArray[Any]
# Chunks per task: enough to make the scheduler's cost per chunk small, few enough to keep all threads busy.
CHUNKS_PER_TASK = 8


@dataclass(frozen=True)
class UpdateSpec:
    """One Adam step of some chunks, from slot `slot` into the other.

    `step`: None until the step size is known. `checksums`: packed checksums of the arrays that are read, except the
    gradient; `gradient_sums`: checksums of the gradient's chunks. `rounding`: (seed, stage, iteration), the key of the
    random bits with which a compact state is rounded. `chunks` and `block_values`, the values of a chunk that are in
    memory at a time, are set by `update_specs`.
    """

    stage_dir: Path
    slot: int
    step: adam.AdamStep | None
    checksums: Mapping[str, str]
    rounding: tuple[int, int, int]
    chunks: tuple[tuple[int, int], ...] = ()
    block_values: int = 0
    gradient_sums: ChunkSums = field(default_factory=ChunkSums)


@dataclass(frozen=True)
class UpdateResult:
    """Σ|u| of every chunk, max|u| over all of them, and the checksums of the chunks written, by array.

    Chunks in a device's memory have no checksums.
    """

    sums_abs_u: tuple[float, ...]
    max_abs_u: float
    sums: Mapping[str, ChunkSums]


def update_specs(update: UpdateSpec, tiles: Sequence[Tile], device: str = "cpu") -> list[UpdateSpec]:
    """The tasks of `update` in these tiles, a few chunks each, for a run on `device`; without `gradient_sums`."""
    gradient = open_array(update.stage_dir, GRADIENT)
    chunk_px = gradient.chunk_px
    update = replace(update, block_values=update_values(device, chunk_px))
    each = CHUNKS_PER_TASK if device == "cpu" else CHUNKS_PER_TASK // 4  # more threads have to be kept busy
    if on_device(gradient.memory):
        each = 4 * CHUNKS_PER_KERNEL
    specs = []
    for tile in tiles:
        chunks = [(cy, cx) for cy, cx, _ in chunks_of(tile.inner, chunk_px)]
        specs += [replace(update, chunks=tuple(chunks[first : first + each])) for first in range(0, len(chunks), each)]
    return specs


def update_task(spec: UpdateSpec) -> UpdateResult:
    """Read gradient, canvas, m, v (and average) of each chunk, make the step, and write the other slot.

    Raises ChunkError, StorageError, and DamagedStateError for a canvas that a compact state cannot hold.
    """
    assert spec.step is not None
    averaged = spec.step.average_weight is not None
    read, write = (slot_names(slot, averaged=averaged) for slot in (spec.slot, 1 - spec.slot))
    gradient = replace(open_array(spec.stage_dir, GRADIENT), checksums=spec.gradient_sums)
    sources = [gradient, *(_source(spec, name) for name in read)]
    targets = [open_array(spec.stage_dir, name) for name in write]
    if on_device(gradient.memory):
        totals, most = update_chunks(sources, targets, spec.chunks, spec.step)
        return UpdateResult(tuple(totals), most, {})
    written: dict[str, ChunkSums] = {name: {} for name in write}
    sums: list[float] = []
    largest = 0.0
    # each chunk is read and written whole: it is checked on the way, and belongs to this task alone
    for chunk in spec.chunks:
        # a damaged chunk is detected at its end: what is written by then is never committed
        with ExitStack() as opened:
            readers = [opened.enter_context(ChunkReader(source, chunk)) for source in sources]
            writers = [opened.enter_context(ChunkWriter(target, chunk)) for target in targets]
            random = RoundingBytes(*spec.rounding, chunk) if sources[0].encoding else None
            blocks = _blocks(sources, spec.block_values)
            update_block: Callable[[Sequence[Array]], Array] = partial(_update_block, spec.step, random)
            # that of a stage in memory is made when it goes to the disk
            overview = CanvasOverview(targets, chunk) if targets[0].memory is None else None
            if overview is not None:
                update_block = overview.watching(update_block)
            total, most = _update_chunk(readers, writers, blocks, sources[0].valid_part(*chunk), chunk, update_block)
        for target, writer in zip(targets, writers, strict=True):
            written[target.path.name][chunk] = writer.checksum
        if overview is not None:
            overview.write(written)
        sums.append(total)
        largest = max(largest, most)
    return UpdateResult(tuple(sums), largest, written)


def _source(spec: UpdateSpec, name: str) -> StageArray:
    """An array that is read, verified; those in a device's memory have no checksums before a commit."""
    array = open_array(spec.stage_dir, name)
    return array if on_device(array.memory) else open_array(spec.stage_dir, name, spec.checksums[name])


def _update_chunk(
    readers: Sequence[ChunkReader],
    writers: Sequence[ChunkWriter],
    blocks: Iterator[tuple[int, list[Array]]],
    inner: tuple[slice, slice],
    chunk: tuple[int, int],
    update_block: Callable[[Sequence[Array]], Array],
) -> tuple[float, float]:
    """(Σ|u|, max|u|) over `inner`, the chunk's pixels inside the image; the padding at the border is ignored."""
    rows, columns = inner
    total = largest = 0.0
    for y0, stored in blocks:
        with profiler.span("read", chunk=chunk):
            for reader, data in zip(readers, stored, strict=True):
                reader.read(data)
        with profiler.span("update", chunk=chunk):
            abs_u = update_block(stored)
            inside = abs_u[: max(0, rows.stop - y0), columns]
            largest = max(largest, float(inside.max(initial=0)))
            inside *= adam.SUM_SCALE
            np.rint(inside, out=inside)
            # in float64: over 10⁹ pixels a float32 sum would lose what the stop condition compares
            total += float(inside.sum(dtype=np.float64))
        with profiler.span("write", chunk=chunk):
            for writer, data in zip(writers, stored[1:], strict=True):
                writer.write(data)
    return total / adam.SUM_SCALE, largest


def _blocks(sources: Sequence[StageArray], values: int) -> Iterator[tuple[int, list[Array]]]:
    """The first row of every block of a chunk, and the buffers for its gradient, canvas, m, v and average."""
    chunk_rows, columns, channels = sources[0].chunk_shape
    # few rows, so that a block of all arrays stays in the cache of a core; not too few, each costs system calls
    rows = min(chunk_rows, max(1, values // (columns * channels)))
    buffers = [
        _BUFFERS.array(source.path.name.split("_")[0], (rows, columns, channels), source.dtype) for source in sources
    ]
    for y0 in range(0, chunk_rows, rows):
        yield y0, [data[: chunk_rows - y0] for data in buffers]  # the last one may have fewer rows


def _update_block(step: adam.AdamStep, random: RoundingBytes | None, stored: Sequence[Array]) -> Array:
    """Update `stored` (gradient, canvas, m, v, maybe average, as on disk) in place; gives |u|.

    `random`: the random bits of a compact state, None for float state.
    """
    if random is not None:
        return _compact_update(stored, step, random)
    gradient, canvas, m, v, *average = stored
    abs_u = adam.update(gradient, canvas, m, v, _BUFFERS.array("abs_u", gradient.shape, gradient.dtype), step)
    if step.average_weight is not None:
        adam.move_average(average[0], canvas, gradient, step.average_weight)
    return abs_u


def _compact_update(stored: Sequence[Array], step: adam.AdamStep, random: RoundingBytes) -> Array:
    """The same for a compact state, which is decoded, updated and encoded again.

    Canvas, v and average are rounded stochastically with the same random bytes: each rounding is unbiased, and their
    errors need not be independent. m changes by a tenth per iteration, which nearest rounding does not lose.
    """
    names = ("values_0", "values_1", "values_2", "values_3", "abs_u")
    *values, abs_u = (_BUFFERS.array(name, stored[0].shape, np.dtype(np.float32)) for name in names)
    gradient, canvas, m, v = values
    for encoding, data, into in zip((BFLOAT16, FIXED16, BFLOAT16, BFLOAT16), stored[:4], values, strict=True):
        encoding.decode(data, into)
    adam.update(gradient, canvas, m, v, abs_u, step)
    # the bytes depend on (seed, stage, iteration, chunk) alone: a repeated task rounds alike
    bytes_ = random.take(canvas.shape)
    scratch = gradient.view(np.uint32)  # it is no longer needed
    FIXED16.encode_stochastic(canvas, bytes_, stored[1], scratch)
    BFLOAT16.encode(m, stored[2])
    BFLOAT16.encode_stochastic(v, bytes_, stored[3], scratch)
    if step.average_weight is not None:
        average = m  # likewise
        FIXED16.decode(stored[4], average)
        adam.move_average(average, canvas, gradient, step.average_weight)
        FIXED16.encode_stochastic(average, bytes_, stored[4], scratch)
    return abs_u


class _Buffers(threading.local):
    """Buffers that a thread reuses from task to task: for new ones the kernel would have to clear pages."""

    def __init__(self) -> None:
        self._arrays: dict[str, Array] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """An uninitialised array, in the memory of the last one of this name if that is large enough."""
        buffer, count = self._arrays.get(name), int(np.prod(shape))
        if buffer is None or buffer.size < count or buffer.dtype != dtype:
            buffer = self._arrays[name] = np.empty(count, dtype)
        return buffer[:count].reshape(shape)


_BUFFERS = _Buffers()
