"""Exports the canvas of a stage: rows are read from the store and rounded while the image is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config import ExportConfig
from pipeline.core.cancel import CancelToken
from pipeline.core.errors import storage
from pipeline.core.files import partial_beside
from pipeline.core.image_formats import PixelKind
from pipeline.core.tiling import Rect
from pipeline.images import ImageMetadata, OutputColors, TiffLayout, writer
from pipeline.plan import Sheet, has_edges
from pipeline.render.edges import sheet_rows
from pipeline.render.resample import OnProgress
from pipeline.store import COLOR_AND_ALPHA, StageArray, ome_zarr


def canvas_pixels(planes: Sequence[StageArray], bits: int, colors: OutputColors) -> Callable[[Rect], NDArray[Any]]:
    """A reader of pixels as exported: a rectangle to (h, w, 3 or 4) uint8 or uint16, rounded to the nearest level.

    `planes`: the canvas, which was optimised over white, and the alpha, if it is exported.
    """
    levels, dtype = (255, np.uint8) if bits == 8 else (65535, np.uint16)
    canvas = planes[0]

    def read(rect: Rect) -> NDArray[Any]:
        out = np.empty((rect.height, rect.width, sum(plane.shape[2] for plane in planes)), dtype)
        first = rect.x0 // canvas.chunk_px * canvas.chunk_px
        for start in range(first, rect.x1, canvas.chunk_px):  # chunk by chunk: float rows of all columns would be large
            x0, x1 = max(start, rect.x0), min(start + canvas.chunk_px, rect.x1)
            window = Rect(rect.y0, rect.y1, x0, x1)
            pixels = [np.clip(plane.read_window(window), 0, 255) for plane in planes]
            if len(pixels) == 2:
                pixels[0] = without_white(*pixels)
            pixels[0] = colors.convert(pixels[0])
            for values, channels in zip(pixels, COLOR_AND_ALPHA, strict=False):
                out[:, x0 - rect.x0 : x1 - rect.x0, channels] = np.rint(values * (levels / 255))
        return out

    return read


def without_white(colors: NDArray[Any], alpha: NDArray[Any]) -> NDArray[Any]:
    """The colours that give `colors` when they are laid over white with this alpha; all 0..255.

    Colours that would have to be darker than black become black. Where alpha is 0 they stay as they are.
    """
    share = np.maximum(alpha, 1e-3) / 255  # less than a level of 16 bits
    return np.where(alpha > 0, np.clip(255 - (255 - colors) / share, 0, 255), colors)


def export_canvas(
    planes: Sequence[StageArray],
    sheet: Sheet,
    options: ExportConfig,
    colors: OutputColors,
    cancel: CancelToken,
    on_progress: OnProgress,
    on_whole: Callable[[Path], None] = lambda partial: None,
    metadata: ImageMetadata | None = None,
) -> None:
    """Write a canvas as the output image `sheet`, in the format of its suffix; it gets its name when it is complete.

    `planes`: the canvas, and the content's alpha for formats that have it. `options`: with numbers for bits and dpi.
    `colors`: what the canvas is converted to. `on_whole`: as for write_image. Raises StorageError, ConfigError (format
    limits), Stopped; then nothing is left behind.
    """
    assert options.bits != "auto" and options.dpi is not None
    height, width = sheet.size
    kind = PixelKind(options.bits, alpha=len(planes) == 2)
    image = writer.ImageSpec(
        sheet.path,
        width,
        height,
        kind,
        options.compression,
        options.quality,
        pyramid=options.has_levels,
        layout=TiffLayout(strips=options.purpose == "print", subifds=options.levels == "subifds"),
        dpi=options.dpi,
        colors=colors,
        metadata=metadata,
    )
    pixels = canvas_pixels(planes, image.rows_kind.bits, colors)
    around = sheet_rows(pixels, sheet) if has_edges(options) else None

    def read_rows(y0: int, y1: int) -> NDArray[Any]:
        rows = around(y0, y1) if around is not None else pixels(Rect(y0, y1, 0, width))
        cancel.raise_if_set()
        return rows

    if sheet.path.suffix.lower() == ".zarr":
        with storage(sheet.path):
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

    def counted_rows(y0: int, y1: int) -> NDArray[Any]:
        on_progress(y1, image.height_px)
        return read_rows(y0, y1)

    with partial_beside(output) as temporary:
        temporary.mkdir()
        group = temporary / output.name
        size = (image.height_px, image.width_px)
        ome_zarr.write_ome_zarr(group, size, image.kind, counted_rows, dpi=image.dpi, cancel=cancel)
        if image.metadata is not None:
            ome_zarr.add_attributes(group, image.metadata.as_attributes())
        writer.put_in_place(group, output, on_whole)
