"""Tasks of colour preservation: statistics of an image, and the canvas in the colours of the content."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.core.tiling import Rect, bands, chunks_of
from pipeline.executors import Executor
from pipeline.losses.color import ColorStatistics, Moments, added, luminance, moments, statistics_of
from pipeline.store import ChunkSums, StageArray, merged


@dataclass(frozen=True)
class _RowSpec:
    """A row of chunks of an image, and of the weights 0..255 of its pixels."""

    array: StageArray
    rect: Rect
    weights: StageArray | None


def moments_task(spec: _RowSpec) -> Moments:
    """The moments of a row of chunks; of 8-bit pixels whole numbers below 2^53, so that their sum has no rounding."""
    parts = [
        moments(spec.array.read_window(part), None if spec.weights is None else spec.weights.read_window(part))
        for _, _, part in chunks_of(spec.rect, spec.array.chunk_px)
    ]
    return added(parts)


def statistics(array: StageArray, executor: Executor, weights: StageArray | None = None) -> ColorStatistics:
    """The statistics of a whole image in the store, the same bits whatever the tiles. Raises ChunkError."""
    specs = [_RowSpec(array, rect, weights) for rect in bands(array.rect, array.chunk_px)]
    return statistics_of(executor.map(moments_task, specs))


@dataclass(frozen=True)
class RecolorSpec:
    """One row of chunks of `target`: the luminance of `source` with the colours of `content`; all have one size."""

    source: StageArray
    content: StageArray
    target: StageArray
    rect: Rect


def recolor_task(spec: RecolorSpec) -> ChunkSums:
    """Write content + (Y(source) − Y(content)), clipped to 0..255; if the source is the content, the content itself."""
    sums: ChunkSums = {}
    for _, _, part in chunks_of(spec.rect, spec.target.chunk_px):
        content = spec.content.read_window(part).astype(spec.target.value_dtype)
        source = spec.source.read_window(part).astype(spec.target.value_dtype)
        # the content's chroma is kept by adding one difference to all three channels
        colored = content + (luminance(source) - luminance(content))
        sums |= spec.target.write_window(part, np.clip(colored, 0, 255))
    return sums


def recolor(source: StageArray, content: StageArray, target: StageArray, executor: Executor) -> str:
    """Fill `target` with the luminance of `source` in the colours of `content`; gives the packed checksums.

    The target is not the source: a task that is repeated must read the same pixels again.
    """
    specs = [RecolorSpec(source, content, target, rect) for rect in bands(target.rect, target.chunk_px)]
    return target.packed(merged(executor.map(recolor_task, specs)))
