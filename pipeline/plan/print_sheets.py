"""The output images of a run: what lies around the canvas on paper, and how it is divided into panels.

    ┌───────────────────────────┐
    │ ─┐                     ┌─ │   margin with crop marks (export.marks), paper white
    │   ┌─────────────────┐     │   bleed, cut off: continues what is inside, or white around a border
    │   │ border          │     │   border, paper white
    │   │  ┌───────────┐  │     │   wrap, folded over a frame: continues the canvas
    │   │  │  canvas   │  │     │
    │   │  └───────────┘  │     │   Panels divide all but the margin; each has marks of its own.

Rows and columns are independent: an axis says for each px of the output which row or column of the canvas it shows.
So a mirrored corner needs no case of its own, and the images are written row by row.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.config import EdgeConfig, ExportConfig
from pipeline.core.errors import ConfigError
from pipeline.core.image_formats import MAX_OUTPUT_SIDE_PX
from pipeline.core.lengths import Length
from pipeline.core.tiling import Size

# The index of a row or column of paper.
PAPER = -1
# From the sheet's edge inwards: white, the mark, and a gap, so that no mark is inside the bleed.
_OUTSIDE, _MARK, _GAP = Length(1, "mm"), Length(5, "mm"), Length(2, "mm")
_STROKE = Length(0.1, "mm")
_MAX_PANELS = 1000


@dataclass(frozen=True, eq=False)
class Axis:
    """The rows or the columns of an output image, N of them.

    `source_N`: the row of the canvas, or PAPER, which is found at both ends only. `lines_N`: where a crop mark is, seen
    across its length. `ticks_N`: where the crop marks are, seen along their length.
    """

    source_N: NDArray[np.int32]
    lines_N: NDArray[np.bool_]
    ticks_N: NDArray[np.bool_]

    @property
    def of_the_canvas(self) -> slice:
        """The part between the paper at both ends."""
        inside = np.flatnonzero(self.source_N != PAPER)
        return slice(int(inside[0]), int(inside[-1]) + 1) if inside.size else slice(0, 0)


@dataclass(frozen=True, eq=False)
class Sheet:
    """One output image."""

    path: Path
    rows: Axis
    columns: Axis

    @property
    def size(self) -> Size:
        """(height, width) in px."""
        return len(self.rows.source_N), len(self.columns.source_N)


def has_edges(options: ExportConfig) -> bool:
    """Whether the output images differ from the canvas."""
    edges = (options.wrap.mirror, options.wrap.stretch, options.border, options.bleed.mirror, options.bleed.stretch)
    return options.marks or options.panels.width is not None or any(edge.mm for edge in edges)


def sheets_of(output: Path, canvas: Size, options: ExportConfig) -> tuple[Sheet, ...]:
    """The output images of a canvas of this (height, width); `options`: with a number as dpi.

    A single one has the path `output`, panels are numbered: wall-1of3.tif. Raises ConfigError for panels that are too
    many, or that have no px of their own.
    """
    dpi, bleed_px = _dpi(options), _edge_px(options.bleed, options)
    _check_sides(canvas, options)
    rows_H, columns_W = (_with_edges(side_px, options) for side_px in canvas)
    rows = _axis(rows_H, (bleed_px, len(rows_H) - bleed_px), dpi if options.marks else None)
    parts = list(_panels(len(columns_W), options))
    sheets = []
    for number, (x0, x1) in enumerate(parts, start=1):
        # at the seams a panel is cut at its own edge, where the next one overlaps it
        trim = (max(x0, bleed_px) - x0, min(x1, len(columns_W) - bleed_px) - x0)
        columns = _axis(columns_W[x0:x1], trim, dpi if options.marks else None)
        sheets.append(Sheet(output if len(parts) == 1 else _panel_path(output, number, len(parts)), rows, columns))
    return tuple(sheets)


def _panel_path(output: Path, number: int, panels: int) -> Path:
    return output.with_name(f"{output.stem}-{number:0{len(str(panels))}}of{panels}{output.suffix}")


def whole_of(path: Path) -> tuple[Path, tuple[Path, ...]]:
    """The output that a file is a panel of, by its name, and all panels of it; of another file itself."""
    match = re.fullmatch(r"(.+)-[0-9]{1,4}of([0-9]{1,4})", path.stem)
    output = path if match is None else path.with_name(f"{match[1]}{path.suffix}")
    panels = () if match is None else tuple(_panel_path(output, 1 + n, int(match[2])) for n in range(int(match[2])))
    return (output, panels) if path in panels else (path, (path,))


def _check_sides(canvas: Size, options: ExportConfig) -> None:
    """Raise ConfigError for an image that no format holds, before an array of that length is made."""
    around_px = _edge_px(options.wrap, options) + options.border.px(_dpi(options)) + _edge_px(options.bleed, options)
    if (side_px := max(canvas) + 2 * around_px) > MAX_OUTPUT_SIDE_PX:
        raise ConfigError(
            f"export: with wrap, border and bleed the image would have {side_px:,} px a side at {_dpi(options):g} dpi, "
            f"beyond the {MAX_OUTPUT_SIDE_PX:,} px that any format holds. Choose smaller edges, or another dpi."
        )


def _dpi(options: ExportConfig) -> float:
    dpi: float | None = options.dpi
    assert dpi is not None, "export.dpi is resolved before lengths become px"
    return dpi


def _edge_px(edge: EdgeConfig, options: ExportConfig) -> int:
    return edge.mirror.px(_dpi(options)) + edge.stretch.px(_dpi(options))


def _with_edges(side_px: int, options: ExportConfig) -> NDArray[np.int32]:
    """The source of each row or column of a canvas with all that is around it, except for the margin."""
    source_N = _continued(np.arange(side_px, dtype=np.int32), options.wrap, options)
    border_px = options.border.px(_dpi(options))
    source_N = _on_paper(source_N, border_px)
    if border_px:
        return _on_paper(source_N, _edge_px(options.bleed, options))
    return _continued(source_N, options.bleed, options)


def _continued(source_N: NDArray[np.int32], edge: EdgeConfig, options: ExportConfig) -> NDArray[np.int32]:
    mirrored = np.pad(source_N, edge.mirror.px(_dpi(options)), mode="symmetric")
    return np.pad(mirrored, edge.stretch.px(_dpi(options)), mode="edge")


def _on_paper(source_N: NDArray[np.int32], width_px: int) -> NDArray[np.int32]:
    return np.pad(source_N, width_px, constant_values=PAPER)


def _panels(width_px: int, options: ExportConfig) -> Iterator[tuple[int, int]]:
    """(x0, x1) of each panel: all but the last have the full width of a panel."""
    if options.panels.width is None:
        yield 0, width_px
        return
    panel_px, overlap_px = options.panels.width.px(_dpi(options)), options.panels.overlap.px(_dpi(options))
    step_px = panel_px - overlap_px
    number = max(1, -(-(width_px - overlap_px) // step_px)) if step_px > 0 else _MAX_PANELS + 1
    if number > _MAX_PANELS:
        raise ConfigError(
            f"export.panels: panels of {panel_px} px that overlap by {overlap_px} px ({_dpi(options):g} dpi) would be "
            f"more than {_MAX_PANELS} for {width_px:,} px. Choose wider panels, or less overlap."
        )
    for index in range(number):
        yield index * step_px, min(index * step_px + panel_px, width_px)


def _axis(source_N: NDArray[np.int32], trim: tuple[int, int], marks_dpi: float | None) -> Axis:
    """`trim`: the (first, last + 1) px that is not cut off. `marks_dpi`: the resolution; None for no crop marks."""
    if marks_dpi is None:
        nothing_N = np.zeros(len(source_N), np.bool_)
        return Axis(source_N, nothing_N, nothing_N)
    outside_px, mark_px, gap_px = (length.px(marks_dpi) for length in (_OUTSIDE, _MARK, _GAP))
    stroke_px, margin_px = max(1, _STROKE.px(marks_dpi)), outside_px + mark_px + gap_px
    source_N = _on_paper(source_N, margin_px)
    lines_N, ticks_N = np.zeros(len(source_N), np.bool_), np.zeros(len(source_N), np.bool_)
    start, end = (margin_px + position for position in trim)
    lines_N[max(0, start - stroke_px) : start] = lines_N[end : end + stroke_px] = True
    ticks_N[outside_px : outside_px + mark_px] = True
    return Axis(source_N, lines_N, ticks_N | ticks_N[::-1])
