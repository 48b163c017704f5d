"""Image files into the arrays of a stage, resized while they are decoded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline import images
from pipeline.config import AnyConfig
from pipeline.core.image_formats import PixelKind
from pipeline.core.tiling import Rect
from pipeline.executors import Executor
from pipeline.losses.color import luminance
from pipeline.render.resample import OnProgress
from pipeline.store import COLOR_AND_ALPHA, ChunkSums, StageArray


def canvas_colors(config: AnyConfig) -> images.Colors:
    """What content and styles of a run are converted to. Raises ConfigError for a proof that cannot be used."""
    return images.Colors(config.canvas_space, None if config.proof is None else images.proof_profile(config.proof))


def ingest(
    source: Path, array: StageArray, executor: Executor, on_progress: OnProgress, colors: images.Colors = images.SRGB
) -> str:
    """Stream an image file, resized to the array's size, into an array of 8 or 16 bits; gives the packed checksums.

    An array of one channel gets the luminance.
    Raises InputError for a broken file.
    """
    (sums,) = ingest_planes(source, [array], executor, on_progress, colors)
    return sums


def ingest_planes(
    source: Path,
    planes: Sequence[StageArray],
    executor: Executor,
    on_progress: OnProgress,
    colors: images.Colors = images.SRGB,
) -> list[str]:
    """The same for the colours of an image, and for its alpha if there is a second array, decoded once."""
    first = planes[0]
    height, width, _ = first.shape
    kind = PixelKind(8 * first.dtype.itemsize, alpha=len(planes) == 2)
    sums: list[ChunkSums] = [{} for _ in planes]
    parts = list(zip(planes, COLOR_AND_ALPHA, sums, strict=False))
    scratch = first.path.parent  # on the disk whose space is planned
    cancel = executor.cancel
    for y0, rows in images.stream_rgb(source, width, height, first.chunk_px, cancel, kind, colors, scratch):
        executor.cancel.raise_if_set()  # a band of a large image takes seconds
        rect = Rect(y0, y0 + len(rows), 0, width)
        pixels = rows if first.shape[2] == 3 else np.rint(luminance(rows.astype(np.float32))).astype(np.uint8)
        for plane, channels, written in parts:
            written.update(plane.write_window(rect, pixels[..., channels]))
        on_progress(y0 + len(rows), height)
    return [plane.packed(written) for plane, written in zip(planes, sums, strict=True)]
