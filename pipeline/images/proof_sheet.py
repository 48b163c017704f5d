"""A proof sheet: parts of an image at the scale of the print, on a page with rulers, colour patches and settings.

┌──────────────────────────┐
│   title, settings        │
│ │ ┌─────────┐┌─────────┐ │    the parts: a pixel of the image is a pixel of the sheet
│ ┼ │         ││         │ │
│ │ └─────────┘└─────────┘ │
│ ┼  caption    caption    │
│ │ ▓▒░ patches            │
│ └─┼─┼─┼─┼─┼─┼─┼─┼─┼─┼─   │    rulers in mm along the left and the lower edge
└──────────────────────────┘
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.core.cancel import CancelToken
from pipeline.core.errors import storage
from pipeline.core.files import partial_beside
from pipeline.core.lengths import MM_PER_INCH, PAPERS_MM
from pipeline.core.tiling import Rect, Size
from pipeline.images.pdf import write_pdf
from pipeline.images.sheet import Label, shortened, text_image
from pipeline.images.tiff_layout import TiffLayout
from pipeline.images.writer import ImageSpec, put_in_place, write_image

_PRIMARIES = np.array([(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 0, 1), (1, 1, 0)])
# Greys from black to white in tenths; then red, green, blue, cyan, magenta, yellow: full, half as dark, half as light.
_PATCHES = np.concatenate(
    [
        np.rint(np.arange(11) * 25.5)[:, None].repeat(3, 1),
        *(np.rint(colours) for colours in (255 * _PRIMARIES, 127.5 * _PRIMARIES, 127.5 + 127.5 * _PRIMARIES)),
    ]
).astype(np.uint8)
_NOTE = "sRGB patches: black to white in tenths; red green blue cyan magenta yellow, full, dark, light. "
_NOTE += "Print at 100 %, without fitting to the page: then the rulers show true millimetres."
# In mm. Most printers leave 4 to 5 mm at the edges white.
_EDGE, _RULER, _GAP, _TEXT, _SMALL, _PATCH = 6.0, 6.0, 2.0, 3.0, 2.4, 7.0
_MAX_SETTINGS_CHARS = 900


@dataclass(frozen=True)
class ProofSheet:
    """A sheet for a number of parts. `title`, `settings`: of the header. `paper`: a key of PAPERS_MM."""

    paper: str
    dpi: float
    parts: int
    title: str
    settings: str

    @property
    def size(self) -> Size:
        """(height, width) of the sheet in px."""
        width_mm, height_mm = PAPERS_MM[self.paper]
        return self._px(height_mm), self._px(width_mm)

    @property
    def memory_bytes(self) -> int:
        """Memory that drawing and writing take: the sheet, its copy for the writer, and the compressed one."""
        return 4 * 3 * self.size[0] * self.size[1]

    @cached_property
    def cells(self) -> tuple[Rect, ...]:
        """Where the parts are: cells of one size, in px of the sheet, in two columns from four parts on."""
        height, width = self.size
        columns = 1 if self.parts < 4 else 2
        rows = -(-self.parts // columns)
        gap, caption = self._px(_GAP), self._px(_SMALL * 2)
        top = self._px(_EDGE) + len(self._header) + gap
        bottom = height - self._px(_EDGE + _RULER + 2 * _GAP + _PATCH + 3 * _SMALL)
        cell_height = (bottom - top) // rows - caption - gap
        cell_width = (width - self._left - self._px(_EDGE) - (columns - 1) * gap) // columns
        return tuple(
            Rect(y, y + cell_height, x, x + cell_width)
            for index in range(self.parts)
            for y in [top + index // columns * (cell_height + caption + gap)]
            for x in [self._left + index % columns * (cell_width + gap)]
        )

    def draw(self, parts: Sequence[tuple[NDArray[np.uint8], str]]) -> NDArray[np.uint8]:
        """The sheet, (H, W, 3). `parts`: the pixels, at most as many as a cell has, and the caption of each."""
        sheet = np.full((*self.size, 3), 255, np.uint8)
        _paste(sheet, self._header, self._px(_EDGE), self._left)
        for cell, (pixels, caption) in zip(self.cells, parts, strict=True):
            assert pixels.shape[0] <= cell.height and pixels.shape[1] <= cell.width, "a part is larger than its cell"
            _paste(sheet, pixels, cell.y0, cell.x0)
            text = self._text((("", shortened(caption, 160)),), _SMALL, cell.width)
            _paste(sheet, text[: self._px(_SMALL * 2)], cell.y0 + len(pixels) + self._px(0.5), cell.x0)
        self._draw_patches(sheet)
        self._draw_ruler(sheet)
        self._draw_ruler(sheet.transpose(1, 0, 2)[::-1, ::-1])  # the left edge, from the bottom up
        self._draw_numbers(sheet)
        return sheet

    def _draw_patches(self, sheet: NDArray[np.uint8]) -> None:
        height, width = self.size
        top = height - self._px(_EDGE + _RULER + _GAP + _PATCH + 3 * _SMALL)
        edges = np.linspace(self._left, width - self._px(_EDGE), len(_PATCHES) + 1).astype(int)
        for colour, x0, x1 in zip(_PATCHES, edges, edges[1:], strict=False):
            sheet[top : top + self._px(_PATCH), x0:x1] = colour
        note = self._text((("", _NOTE),), _SMALL, width - self._left - self._px(_EDGE))
        _paste(sheet, note[: self._px(3 * _SMALL)], top + self._px(_PATCH + 0.5), self._left)

    def _draw_ruler(self, sheet: NDArray[np.uint8]) -> None:
        """A ruler along the lower edge, whose zero is `_left`: a line every mm, longer ones every 5 and 10."""
        height, width = sheet.shape[:2]
        base, thick = height - self._px(_EDGE), max(1, self._px(0.12))
        length_mm = int((width - self._px(_EDGE) - self._left) * MM_PER_INCH / self.dpi)
        for mm in range(length_mm + 1):
            x = self._left + self._px(mm)
            tall = self._px(3.2 if mm % 10 == 0 else 2.2 if mm % 5 == 0 else 1.4)
            sheet[base - tall : base, x : x + thick] = 0

    def _draw_numbers(self, sheet: NDArray[np.uint8]) -> None:
        height, width = self.size
        for cm in range(0, int(max(self.size) * MM_PER_INCH / self.dpi / 10)):
            digits = self._text((("", str(cm)),), _SMALL, self._px(10))
            along = self._left + self._px(10 * cm + 0.5)
            if along + digits.shape[1] < width - self._px(_EDGE):
                _paste(sheet, digits, height - self._px(_EDGE + 3.4) - len(digits), along)
            if along + len(digits) < height - self._px(_EDGE):
                _paste(sheet, digits, height - along - len(digits), self._px(_EDGE + 3.4))

    @property
    def _left(self) -> int:
        """The left edge of the parts, and the zero of the rulers."""
        return self._px(_EDGE + _RULER + _GAP)

    @cached_property
    def _header(self) -> NDArray[np.uint8]:
        width_px = self.size[1] - self._left - self._px(_EDGE)
        title = self._text((("", shortened(self.title, 240)),), _TEXT, width_px)
        settings = self._text((("", shortened(self.settings, _MAX_SETTINGS_CHARS)),), _SMALL, width_px)
        header = np.full((len(title) + len(settings), width_px, 3), 255, np.uint8)
        _paste(header, title, 0, 0)
        _paste(header, settings, len(title), 0)
        return header

    def _text(self, label: Label, size_mm: float, width_px: int) -> NDArray[np.uint8]:
        pixels: NDArray[np.uint8] = text_image(label, self._px(size_mm), width_px).numpy()
        return pixels[:, :width_px]

    def _px(self, length_mm: float) -> int:
        return round(length_mm * self.dpi / MM_PER_INCH)


def _paste(sheet: NDArray[np.uint8], pixels: NDArray[np.uint8], y: int, x: int) -> None:
    sheet[y : y + pixels.shape[0], x : x + pixels.shape[1]] = pixels


def write_proof(
    sheet: NDArray[np.uint8], path: Path, proof: ProofSheet, cancel: CancelToken, on_whole: Callable[[Path], None]
) -> None:
    """Write a drawn sheet as PDF or TIFF, by the suffix of `path`. Raises StorageError, Stopped."""
    if path.suffix.lower() != ".pdf":
        height_px, width_px = proof.size
        spec = ImageSpec(path, width_px, height_px, pyramid=False, layout=TiffLayout(strips=True), dpi=proof.dpi)
        write_image(spec, lambda y0, y1: sheet[y0:y1], cancel=cancel, on_whole=on_whole)
        return
    with storage(path), partial_beside(path) as partial:
        write_pdf(sheet, partial, proof.dpi, PAPERS_MM[proof.paper], proof.title)
        cancel.raise_if_set()
        put_in_place(partial, path, on_whole)
