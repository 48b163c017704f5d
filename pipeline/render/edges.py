"""What lies around the canvas in an output image: mirrored or repeated pixels, paper, crop marks.

The geometry is in plan/print_sheets.py.

Axes in names: H rows, W columns, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core.tiling import Rect
from pipeline.plan import Sheet

# Columns that are copied at a time: picking rows and columns copies, and a copy of whole rows would be another band.
_BLOCK_PX = 1024


def sheet_rows(read: Callable[[Rect], NDArray[Any]], sheet: Sheet) -> Callable[[int, int], NDArray[Any]]:
    """A reader of rows of an output image, (y0, y1) to (rows, W, C).

    `read`: the pixels of a rectangle of the canvas, uint8 or uint16. Of the canvas no more rows are read at a time than
    are asked for, because neighbouring rows of the image are neighbours in the canvas, or the same row.
    """
    across = sheet.columns.of_the_canvas
    columns_W = sheet.columns.source_N[across]
    x0, x1 = (int(columns_W.min()), int(columns_W.max()) + 1) if columns_W.size else (0, 1)
    line_W, tick_W = np.flatnonzero(sheet.columns.lines_N), np.flatnonzero(sheet.columns.ticks_N)

    def read_rows(y0: int, y1: int) -> NDArray[Any]:
        rows_H = sheet.rows.source_N[y0:y1]
        inside = np.flatnonzero(rows_H >= 0)  # one range: paper is at both ends of an axis only
        first, last = (int(rows_H[inside].min()), int(rows_H[inside].max()) + 1) if inside.size else (0, 1)
        pixels_HWC = read(Rect(first, last, x0, x1))
        shape, dtype = (y1 - y0, sheet.size[1], pixels_HWC.shape[2]), pixels_HWC.dtype
        out_HWC = np.full(shape, np.iinfo(dtype).max, dtype)  # paper: white, and opaque
        if inside.size:
            rows = slice(int(inside[0]), int(inside[-1]) + 1)
            for x in range(0, columns_W.size, _BLOCK_PX):
                picked_W = columns_W[x : x + _BLOCK_PX] - x0
                start = across.start + x
                block_HWC = pixels_HWC[(rows_H[rows] - first)[:, None], picked_W]
                out_HWC[rows, start : start + len(picked_W)] = block_HWC
        _draw_marks(out_HWC, sheet.rows.lines_N[y0:y1], sheet.rows.ticks_N[y0:y1], line_W, tick_W)
        return out_HWC

    return read_rows


def _draw_marks(
    out_HWC: NDArray[Any],
    line_H: NDArray[np.bool_],
    tick_H: NDArray[np.bool_],
    line_W: NDArray[np.intp],
    tick_W: NDArray[np.intp],
) -> None:
    """Draw the parts of the crop marks in these rows, in black; alpha stays opaque."""
    for rows_H, columns_W in ((tick_H, line_W), (line_H, tick_W)):
        out_HWC[np.ix_(np.flatnonzero(rows_H), columns_W, np.arange(3))] = 0
