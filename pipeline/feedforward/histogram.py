"""The histogram of an enlarged picture matched to that of its content, channel by channel (Johnson et al. 2016, 4.2).

    T = Q ∘ F        F: share of the picture's pixels below a value; Q: the value below which that share of the
                     content's pixels is

Pixels are counted in steps of 1/257 level, which are all levels of 8 and 16 bits: whole numbers, whose sum has no
rounding, and 1.5 MB however large the picture is. Between the steps T is linear, so that no level of a smooth area is
lost; a level of the content is spread over its width, because an 8-bit content would leave only 256 values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import InputError
from pipeline.core.tiling import Rect, chunks_of, grid
from pipeline.executors import Executor
from pipeline.store import ChunkSums, StageArray, merged

_STEPS = 257  # per level
_BINS = 255 * _STEPS + 1
# Rows of a chunk that are looked up at a time: np.interp takes float64.
_BLOCK_ROWS = 64

Counts = NDArray[np.int64]  # (C, bins)
Curves = NDArray[np.float64]  # (C, bins): T at every step


@dataclass(frozen=True)
class _TileSpec:
    """A tile of an array."""

    array: StageArray
    rect: Rect


@dataclass(frozen=True)
class _MapSpec(_TileSpec):
    """Write T of the array's tile to the same tile of `target`, another array: a task may run twice."""

    target: StageArray
    curves: Curves


def matched(
    source: StageArray,
    content: StageArray,
    target: StageArray,
    executor: Executor,
    tile_px: int,
    on_done: Callable[[], None],
) -> str:
    """Fill `target` with `source` in the histograms of `content`; gives its packed checksums.

    `on_done` is called for every tile of the three arrays. Raises ChunkError, StorageError.
    """
    counts = []
    for array in (source, content):
        specs = [_TileSpec(array, tile.inner) for tile in grid(*array.shape[:2], tile_px)]
        counts.append(executor.fold(_count_task, specs, _added, _no_counts(array), on_done))
    width = _STEPS if content.dtype == np.uint8 else 1
    curves = np.stack([_curve(own, wanted, width) for own, wanted in zip(*counts, strict=True)])
    maps = [_MapSpec(source, tile.inner, target, curves) for tile in grid(*target.shape[:2], tile_px)]
    return target.packed(merged(executor.map(_map_task, maps, on_done, tile=True)))


def _no_counts(array: StageArray) -> Counts:
    return np.zeros((array.shape[2], _BINS), np.int64)


def _count_task(spec: _TileSpec) -> Counts:
    """The pixels of the tile at every step, by channel."""
    counts = _no_counts(spec.array)
    for _, _, part in chunks_of(spec.rect, spec.array.chunk_px):
        for rows_RWC in _blocks(spec.array.read_window(part)):
            if not np.isfinite(rows_RWC).all():
                raise InputError(
                    "networks: what they make of this content is not finite, so it has no histogram. Use "
                    "compute.dtype: float32, or another network."
                )
            steps_RWC = np.rint(rows_RWC.astype(np.float64) * _STEPS).astype(np.int64)
            for channel in range(len(counts)):
                counts[channel] += np.bincount(steps_RWC[..., channel].reshape(-1), minlength=_BINS)
    return counts


def _added(total: Counts, tile: Counts) -> Counts:
    return total + tile


def _curve(own: Counts, wanted: Counts, width: int) -> NDArray[np.float64]:
    """T of a channel at every step. `width`: of a level of the content, in steps."""
    shares = (np.cumsum(own) - own / 2) / own.sum()
    used = np.flatnonzero(wanted)
    below = (np.cumsum(wanted[used]) - wanted[used]) / wanted.sum()
    above = np.cumsum(wanted[used]) / wanted.sum()
    edges = np.stack([used - width / 2, used + width / 2], axis=1).reshape(-1)
    curve: NDArray[np.float64] = np.interp(
        shares, np.stack([below, above], axis=1).reshape(-1), edges.clip(0, _BINS - 1)
    )
    return curve / _STEPS


def _map_task(spec: _MapSpec) -> ChunkSums:
    sums: ChunkSums = {}
    steps = np.arange(_BINS) / _STEPS
    for _, _, part in chunks_of(spec.rect, spec.target.chunk_px):
        window_HWC = spec.array.read_window(part).astype(spec.target.value_dtype)
        for rows_RWC in _blocks(window_HWC):
            for channel, curve in enumerate(spec.curves):
                rows_RWC[..., channel] = np.interp(rows_RWC[..., channel], steps, curve)
        sums |= spec.target.write_window(part, window_HWC)
    return sums


def _blocks(window_HWC: NDArray[Any]) -> Iterator[NDArray[Any]]:
    for row in range(0, len(window_HWC), _BLOCK_ROWS):
        yield window_HWC[row : row + _BLOCK_ROWS]
