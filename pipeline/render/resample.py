"""Filling an array of a stage from another one: copied where they have the same size, else enlarged.

Centred bicubic (images.resize), pixels clipped to 0..255. Both arrays may hold only a region of their images.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline import images
from pipeline.core.events import in_order
from pipeline.core.tiling import Rect, Size, bands, chunks_of
from pipeline.executors import Executor
from pipeline.render.noise import uniform_noise
from pipeline.store import ChunkSums, StageArray, merged

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Region:
    """An array that holds the rectangle `rect` of an image of `size` (height, width)."""

    array: StageArray
    rect: Rect
    size: Size


def whole(array: StageArray) -> Region:
    """The region of an array that holds a whole image."""
    return Region(array, array.rect, array.shape[:2])


def moved(rect: Rect, y: int, x: int) -> Rect:
    """The rectangle `y` further down and `x` further right."""
    return Rect(rect.y0 + y, rect.y1 + y, rect.x0 + x, rect.x1 + x)


def needed(rect: Rect, size: Size, source_size: Size) -> Rect:
    """The rectangle of the image at `source_size` that `enlarge` reads for the rectangle `rect` of it at `size`."""
    return rect if size == source_size else Rect(*images.source_window(rect, source_size, size))


@dataclass(frozen=True)
class Filling:
    """What is done to the values, beside enlarging them.

    `noise_seed`: of the noise of ±`noise_levels` that is added (render/noise.py); None: none. `smoothing`: before it is
    enlarged, the source is smoothed, so that its pixel grid leaves no lattice; never at the same size. `moment`: the
    values are Adam's m, which is signed, or v, which is never below 0; None: pixels, clipped to 0..255.
    """

    noise_seed: int | None = None
    noise_levels: float = 0.5
    smoothing: bool = False
    moment: Literal["m", "v"] | None = None


@dataclass(frozen=True)
class EnlargeSpec:
    """Fill a row of chunks of `target` from `source`, a region of the same image at a smaller or equal size."""

    source: Region
    target: Region
    rect: Rect
    filling: Filling


def enlarge_task(spec: EnlargeSpec) -> ChunkSums:
    """Gives the same bits as enlarging the whole image."""
    source, target, filling = spec.source, spec.target, spec.filling
    sums: ChunkSums = {}
    # chunk by chunk: a row of chunks of a wide canvas in float would be large
    for _, _, own in chunks_of(spec.rect, target.array.chunk_px):
        rect = moved(own, target.rect.y0, target.rect.x0)
        window = needed(rect, target.size, source.size)
        values = source.array.read_window(moved(window, -source.rect.y0, -source.rect.x0))
        if target.size != source.size:
            if filling.smoothing:
                values = images.smoothed(values)
            linear = filling.moment == "v"  # bicubic interpolation overshoots at edges, below 0 too
            values = images.resize_window(values, window, source.size, target.size, rect, linear=linear)
            if filling.moment is None:
                values = np.clip(values, 0, 255)
        if filling.noise_seed is not None:
            noise = uniform_noise(filling.noise_seed, rect) * np.float32(2 * filling.noise_levels)
            values = np.clip(values + noise, 0, 255)
        sums |= target.array.write_window(own, values.astype(target.array.value_dtype))
    return sums


def enlarge(
    source: Region,
    target: Region,
    executor: Executor,
    on_progress: OnProgress = lambda done, total: None,
    filling: Filling = Filling(),
) -> str:
    """Fill a region from one that holds all that is `needed`; gives the packed checksums."""
    array = target.array
    specs = [EnlargeSpec(source, target, rect, filling) for rect in bands(array.rect, array.chunk_px)]
    return array.packed(merged(executor.map(enlarge_task, specs, in_order(on_progress, len(specs)))))


def tiles_of(rect: Rect, tile_px: int) -> list[Rect]:
    """The rectangle cut into tiles of at most `tile_px` on a side."""
    rows, columns = range(rect.y0, rect.y1, tile_px), range(rect.x0, rect.x1, tile_px)
    return [
        Rect(y, min(y + tile_px, rect.y1), x, min(x + tile_px, rect.x1)) for y, x in itertools.product(rows, columns)
    ]
