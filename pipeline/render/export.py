"""Exports the canvas of a stage: rows are read from the store and rounded while the image is written."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config import ExportConfig
from pipeline.core.cancel import CancelToken
from pipeline.core.errors import storage
from pipeline.core.files import new_partial
from pipeline.core.image_formats import PixelKind
from pipeline.core.tiling import Rect
from pipeline.images import ImageMetadata, writer
from pipeline.render.resample import OnProgress
from pipeline.store import COLOR_AND_ALPHA, StageArray, ome_zarr


def canvas_rows(planes: Sequence[StageArray], bits: int) -> Callable[[int, int], NDArray[Any]]:
    """A reader of rows as exported: (y0, y1) to (rows, W, 3 or 4) uint8 or uint16, rounded to the nearest level."""
    levels, dtype = (255, np.uint8) if bits == 8 else (65535, np.uint16)
    canvas = planes[0]
    width = canvas.shape[1]

    def read_rows(y0: int, y1: int) -> NDArray[Any]:
        out = np.empty((y1 - y0, width, sum(plane.shape[2] for plane in planes)), dtype)
        for x0 in range(0, width, canvas.chunk_px):  # chunk by chunk: float rows of the whole width would be large
            x1 = min(x0 + canvas.chunk_px, width)
            for plane, channels in zip(planes, COLOR_AND_ALPHA, strict=False):
                pixels = plane.read_window(Rect(y0, y1, x0, x1))
                out[:, x0:x1, channels] = np.rint(np.clip(pixels, 0, 255) * (levels / 255))
        return out

    return read_rows


def export_canvas(
    planes: Sequence[StageArray],
    output: Path,
    options: ExportConfig,
    cancel: CancelToken,
    on_progress: OnProgress,
    on_whole: Callable[[Path], None] = lambda partial: None,
    metadata: ImageMetadata | None = None,
) -> None:
    """Write a canvas as the image `output`, in the format of its suffix; it gets its name when it is complete.

    `planes`: the canvas, and the content's alpha for formats that have it. `options`: without any auto. `on_whole`: as
    for write_image. Raises StorageError, ConfigError (format limits), Stopped; then nothing is left behind.
    """
    assert options.bits != "auto"
    height, width, _ = planes[0].shape
    kind = PixelKind(options.bits, alpha=len(planes) == 2)
    encoding = options.compression, options.quality, options.pyramid
    image = writer.ImageSpec(output, width, height, kind, *encoding, metadata=metadata)
    read = canvas_rows(planes, kind.bits)

    def read_rows(y0: int, y1: int) -> NDArray[Any]:
        rows = read(y0, y1)
        cancel.raise_if_set()
        return rows

    if output.suffix.lower() == ".zarr":
        with storage(output):
            _export_ome_zarr(image, read_rows, cancel, on_progress, on_whole)
        return
    writer.write_image(
        image,
        read_rows,
        on_progress=lambda share: on_progress(math.floor(share * 100), 100),
        cancel=cancel,
        on_whole=on_whole,
    )


def _export_ome_zarr(
    image: writer.ImageSpec,
    read_rows: Callable[[int, int], NDArray[Any]],
    cancel: CancelToken,
    on_progress: OnProgress,
    on_whole: Callable[[Path], None],
) -> None:
    output = image.path
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = new_partial(output)

    def counted_rows(y0: int, y1: int) -> NDArray[Any]:
        on_progress(y1, image.height_px)
        return read_rows(y0, y1)

    try:
        temporary.mkdir()
        group = temporary / output.name
        ome_zarr.write_ome_zarr(group, (image.height_px, image.width_px), image.kind, counted_rows, cancel=cancel)
        if image.metadata is not None:
            ome_zarr.add_attributes(group, image.metadata.as_attributes())
        writer.put_in_place(group, output, on_whole)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
