"""Cutting rectangles from an image file while it is resized, or from a canvas, and writing them as images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import images
from pipeline.core.cancel import CancelToken
from pipeline.core.color_spaces import SpaceName
from pipeline.core.tiling import Rect, Size
from pipeline.images import write_rows
from pipeline.losses import color
from pipeline.losses.color import ColorStatistics
from pipeline.render.resample import Region, moved

_BAND_PX = 256


def cut_file(
    path: Path, size: Size, rect: Rect, output: Path, cancel: CancelToken, space: SpaceName = "srgb"
) -> ColorStatistics:
    """Write the rectangle `rect` of an image file, resized to `size`, as the image `output`, in a canvas's space.

    Returns the colour statistics of the whole image at that size. Raises InputError for a broken file, StorageError,
    Stopped.
    """
    moments: list[color.Moments] = []
    # Closed explicitly: an error's traceback would keep this frame, and with it the decoder's thread and the open file.
    band_px, colors = min(_BAND_PX, size[0]), images.Colors(space)
    with closing(images.stream_rgb(path, size[1], size[0], band_px, cancel, colors=colors)) as decoded:
        bands = _cut_bands(decoded, rect, moments)
        write_rows(bands, output, (rect.height, rect.width), cancel, colors=images.canvas_output(space))
        for _ in bands:
            raise AssertionError("a cut has more rows than its rectangle")
    return color.statistics_of(moments)


def _cut_bands(
    bands: Iterator[tuple[int, NDArray[Any]]], rect: Rect, moments: list[color.Moments]
) -> Iterator[NDArray[Any]]:
    for y0, rows_HWC in bands:
        moments.append(color.moments(rows_HWC))
        part = rows_HWC[max(rect.y0 - y0, 0) : max(rect.y1 - y0, 0), rect.x0 : rect.x1]
        if len(part):
            yield part.copy()  # a view would keep the whole band in memory


def cut_canvas(
    canvas: Region,
    rect: Rect,
    output: Path,
    cancel: CancelToken,
    on_whole: Callable[[Path], None],
    space: SpaceName = "srgb",
) -> None:
    """Write the rectangle `rect` of the image of which `canvas` is a region, in sRGB of 8 bits, as `output`.

    `space`: the canvas's own.
    """
    bands = _canvas_bands(canvas, rect, images.srgb_output(space))
    write_rows(bands, output, (rect.height, rect.width), cancel, on_whole=on_whole)


def _canvas_bands(canvas: Region, rect: Rect, colors: images.OutputColors) -> Iterator[NDArray[Any]]:
    for y0 in range(rect.y0, rect.y1, _BAND_PX):
        band = Rect(y0, min(y0 + _BAND_PX, rect.y1), rect.x0, rect.x1)
        pixels = canvas.array.read_window(moved(band, -canvas.rect.y0, -canvas.rect.x0))
        yield np.rint(colors.convert(np.clip(pixels, 0, 255))).astype(np.uint8)
