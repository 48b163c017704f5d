"""A contact sheet: images in rows and columns with their labels, as one image.

    title
    settings
    reference  reference            the images that all others were made from, smaller
    caption    caption
               key value  key value
    key value  image      image
    key value  image      image

The sheet is drawn strip by strip from the top, so that only one row of images is in memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyvips
from numpy.typing import NDArray

from pipeline.core.cancel import CancelToken
from pipeline.core.text import printable
from pipeline.core.tiling import Size
from pipeline.images.reader import stream_rgb
from pipeline.images.writer import write_rows

# (key, value) lines; either text may be empty.
Label = tuple[tuple[str, str], ...]

# The font comes with the package: on a machine without any font, libvips would draw boxes.
_FONT, _FONT_FILE = "DejaVu Sans", Path(__file__).parents[1] / "assets" / "DejaVuSans.ttf"
_KEY_COLOUR = "#6e6e6e"
_BREAKS = re.compile(r"[._/,-](?!\d)")  # a key or a path may be broken after these, a number not
_MAX_LINES = 2  # of a key or a value; the middle of a longer one is left out
_CHAR_WIDTH = 0.62  # mean width of a character over the size of the font
_WHITE = [255, 255, 255]


class SheetImage(NamedTuple):
    """An image file, and the size (height, width) in px at which it is shown."""

    path: Path
    size: Size


@dataclass(frozen=True)
class Row:
    """A row of images: the label at its left, and the labels above the images (for a row below others, maybe none)."""

    label: Label
    above: tuple[Label, ...]
    images: tuple[SheetImage, ...]


@dataclass(frozen=True)
class ContactSheet:
    """Rows of images under a title, the settings of all and the reference images, each with its caption."""

    title: str
    references: Sequence[tuple[Label, SheetImage]]
    rows: Sequence[Row]
    settings: Sequence[str] = ()  # of all images, below the title, a line each

    @property
    def size(self) -> Size:
        """(height, width) of the sheet in px."""
        return sum(self._strip_heights), self._width_px

    @property
    def strip_bytes(self) -> int:
        """Memory that drawing takes: the images of the highest strip, and the strip itself."""
        return 2 * 3 * self._width_px * max(self._strip_heights)

    def write(
        self,
        output: Path,
        cancel: CancelToken,
        on_progress: Callable[[float], None],
        on_whole: Callable[[Path], None] = lambda partial: None,
    ) -> None:
        """Write the sheet in the format of the suffix. Raises InputError for a broken image, else as write_image."""
        write_rows(self._bands(cancel), output, self.size, cancel, on_progress, on_whole)

    def _bands(self, cancel: CancelToken) -> Iterator[NDArray[np.uint8]]:
        for strip in self._strips(_decoded):
            cancel.raise_if_set()
            yield strip.numpy()

    @cached_property
    def _strip_heights(self) -> list[int]:
        return [strip.height for strip in self._strips(_blank)]

    @cached_property
    def _box(self) -> Size:
        """(height, width) of the cell of one image: the largest of each."""
        sizes = [image.size for row in self.rows for image in row.images]
        return max(height for height, _ in sizes), max(width for _, width in sizes)

    @cached_property
    def _text_px(self) -> int:
        """Size of the text, and of the gaps."""
        return min(max(max(self._box) // 26, 13), 48)

    @cached_property
    def _label_px(self) -> int:
        """Width of the labels at the left of the rows; 0 if there are none."""
        widths = [text_image(row.label, self._text_px).width for row in self.rows if row.label]
        return min(max(widths, default=0), max(self._box[1], 9 * self._text_px))

    @cached_property
    def _width_px(self) -> int:
        columns = max(len(row.images) for row in self.rows)
        label_px = self._label_px + self._text_px if self._label_px else 0
        widest = max((image.size[1] for _, image in self.references), default=0)
        return self._text_px + max(label_px + columns * (self._box[1] + self._text_px), widest + self._text_px)

    def _strips(self, load: Callable[[SheetImage], Any]) -> Iterator[Any]:
        """The sheet from top to bottom, in libvips images of its full width."""
        gap = pyvips.Image.black(1, self._text_px, bands=3).invert()
        inner_px = self._width_px - 2 * self._text_px
        strips = [gap, *(self._text((("", line),), inner_px) for line in (self.title, *self.settings)), gap]
        yield from map(self._full_width, strips)
        for line in self._reference_lines(load, inner_px):
            yield from map(self._full_width, (line, gap))
        for row in self.rows:
            if any(row.above):
                labels = [self._text(label, self._box[1]) for label in row.above]
                yield self._full_width(self._beside_label(None, _grid(labels, self._text_px, self._box[1], "high")))
            images = _grid([load(image) for image in row.images], self._text_px, self._box[1], "low")
            label = self._text(row.label, self._label_px) if row.label else None
            yield from map(self._full_width, (self._beside_label(label, images), gap))

    def _reference_lines(self, load: Callable[[SheetImage], Any], inner_px: int) -> Iterator[Any]:
        """The references with their captions, as many side by side as fit."""
        if not self.references:
            return
        cell_px = min(max(8 * self._text_px, *(image.size[1] for _, image in self.references)), inner_px)
        across = max(1, (inner_px + self._text_px) // (cell_px + self._text_px))
        for start in range(0, len(self.references), across):
            cells = [
                load(image).join(self._text(label, cell_px), "vertical", expand=True, shim=4, background=_WHITE)
                for label, image in self.references[start : start + across]
            ]
            yield _grid(cells, self._text_px, cell_px, "low")

    def _full_width(self, strip: Any) -> Any:
        return strip.embed(self._text_px, 0, self._width_px, strip.height, extend="white")

    def _beside_label(self, label: Any | None, cells: Any) -> Any:
        """Cells to the right of the column of labels."""
        if not self._label_px:
            return cells
        if label is None:
            label = pyvips.Image.black(1, 1, bands=3).invert()
        label = label.embed(0, 0, self._label_px, label.height, extend="white")
        return label.join(cells, "horizontal", expand=True, shim=self._text_px, background=_WHITE)

    def _text(self, label: Label, width_px: int) -> Any:
        """A label that is at most `width_px` wide."""
        max_chars = max(8, int(_MAX_LINES * width_px / (_CHAR_WIDTH * self._text_px)))
        short = tuple((shortened(key, max_chars), shortened(value, max_chars)) for key, value in label)
        return text_image(short, self._text_px, width_px)


def text_image(label: Label, text_px: int, width_px: int | None = None) -> Any:
    """A libvips image of the lines of a label on white, keys grey and values black; lines are broken at `width_px`."""
    lines = []
    for key, value in label:
        if key:
            lines.append(f'<span foreground="{_KEY_COLOUR}">{_markup(key)}</span>')
        if value:
            lines.append(_markup(value))
    line_px = text_px * 4 // 3
    if not any(line.strip() for line in lines):
        return pyvips.Image.black(1, line_px, bands=3).invert()
    options = {} if width_px is None else {"width": width_px, "wrap": "word-char"}
    font = f"{_FONT} {text_px * 3 / 4}"
    letters = pyvips.Image.text("\n".join(lines), font=font, fontfile=str(_FONT_FILE), dpi=96, rgba=True, **options)
    # libvips crops to the letters; their offsets put them back onto lines of one height.
    x, y = max(letters.xoffset, 0), max(letters.yoffset, 0)
    height_px = -(-(y + letters.height) // line_px) * line_px
    width_px = min(x + letters.width, width_px or x + letters.width)
    return letters.flatten(background=_WHITE).embed(x, y, width_px, height_px, extend="white")


def _markup(text: str) -> str:
    return escape(_BREAKS.sub("\\g<0>\u200b", printable(text)), quote=False)


def shortened(text: str, max_chars: int) -> str:
    """`text` on one line, without its middle if it is too long: the end tells one path from another."""
    line = printable(text).replace("\n", " ")
    head = max_chars // 3
    return line if len(line) <= max_chars else f"{line[:head]}…{line[len(line) - (max_chars - head - 1) :]}"


def _grid(cells: Sequence[Any], gap_px: int, cell_px: int, align: str) -> Any:
    """One row of cells, each `cell_px` wide; `align`: low puts them at the top, high at the bottom."""
    return pyvips.Image.arrayjoin(
        cells, across=len(cells), shim=gap_px, hspacing=cell_px, valign=align, background=_WHITE
    )


def _blank(image: SheetImage) -> Any:
    height, width = image.size
    return pyvips.Image.black(width, height, bands=3)


def _decoded(image: SheetImage) -> Any:
    height, width = image.size
    bands = stream_rgb(image.path, width, height, min(height, 256))
    return pyvips.Image.new_from_array(np.concatenate([rows for _, rows in bands]), interpretation="srgb")
