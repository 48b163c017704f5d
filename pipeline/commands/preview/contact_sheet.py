"""A contact sheet: pictures in rows and columns with their labels, as one picture.

    title
    reference  reference            what all pictures were made of, smaller
    caption    caption
               key value  key value
    key value  picture    picture
    key value  picture    picture

Axes in names: H rows, W columns, C channels. The sheet is made strip by strip from the top; of the pictures, one row is
in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline import images
from pipeline.core.cancel import CancelToken
from pipeline.core.text import printable
from pipeline.core.tiling import Size
from pipeline.images.text import text_mask
from pipeline.images.writer import write_rows

Pixels = NDArray[np.uint8]
# (key, value) lines, of which one may be empty.
Label = tuple[tuple[str, str], ...]

_BLACK, _GRAY = 0, 110
_MOST_LINES = 2  # of a value or a key; longer ones lose their middle
_CHAR_WIDTH = 0.62  # of the font, in its size


class Picture(NamedTuple):
    """A picture file, and the size (height, width) in px at which it is shown."""

    path: Path
    size: Size


@dataclass(frozen=True)
class Row:
    """A row of pictures: what stands left of it, and above each (for a row below others, maybe nothing)."""

    label: Label
    above: tuple[Label, ...]
    pictures: tuple[Picture, ...]


class _Strip(NamedTuple):
    """Some rows of the sheet: their number, and what draws them onto white."""

    height_px: int
    draw: Callable[[Pixels], None]


@dataclass(frozen=True)
class ContactSheet:
    """Rows of pictures under a title and the pictures that they were made of, each with its caption."""

    title: str
    references: Sequence[tuple[Label, Picture]]
    rows: Sequence[Row]

    @property
    def size(self) -> Size:
        """(height, width) of the sheet in px."""
        return sum(strip.height_px for strip in self._strips), self._width_px

    @property
    def strip_bytes(self) -> int:
        """Memory that drawing takes: the highest strip, and the picture that is put into it."""
        return 2 * 3 * self._width_px * max(strip.height_px for strip in self._strips)

    def write(
        self,
        output: Path,
        cancel: CancelToken,
        on_progress: Callable[[float], None],
        on_whole: Callable[[Path], None] = lambda partial: None,
    ) -> None:
        """Write the sheet in the format of the suffix. Raises InputError for a broken picture, else as write_image."""
        write_rows(self._drawn(cancel), output, self.size, cancel, on_progress, on_whole)

    def _drawn(self, cancel: CancelToken) -> Iterator[Pixels]:
        for strip in self._strips:
            cancel.raise_if_set()
            rows_HWC = np.full((strip.height_px, self._width_px, 3), 255, np.uint8)
            strip.draw(rows_HWC)
            yield rows_HWC

    @cached_property
    def _box(self) -> Size:
        """(height, width) of the place of one picture: that of the largest."""
        sizes = [picture.size for row in self.rows for picture in row.pictures]
        return max(height for height, _ in sizes), max(width for _, width in sizes)

    @cached_property
    def _text_px(self) -> int:
        return min(max(max(self._box) // 26, 13), 48)

    @property
    def _gap_px(self) -> int:
        return self._text_px

    @cached_property
    def _left_px(self) -> int:
        """Where the first picture of a row starts."""
        lines = [text for row in self.rows for line in row.label for text in line if text]
        if not lines:
            return self._gap_px
        longest: int = max(text_mask(text, self._text_px).shape[1] for text in lines)
        return min(longest, max(self._box[1], 9 * self._text_px)) + 2 * self._gap_px

    @cached_property
    def _width_px(self) -> int:
        columns = max(len(row.pictures) for row in self.rows)
        widest = max((picture.size[1] for _, picture in self.references), default=0)
        return max(self._left_px + columns * (self._box[1] + self._gap_px), widest + 2 * self._gap_px)

    @cached_property
    def _strips(self) -> list[_Strip]:
        gap = _Strip(self._gap_px, lambda rows: None)
        title = self._text(((self.title, ""),), self._width_px - 2 * self._gap_px, _BLACK)
        strips = [gap, _Strip(len(title), partial(_put, title, self._gap_px)), gap]
        for line in self._reference_lines():
            strips += [line, gap]
        for row in self.rows:
            if any(row.above):
                strips += [self._labels_above(row)]
            label = self._text(row.label, self._left_px - 2 * self._gap_px) if row.label else None
            height_px = max(self._box[0], 0 if label is None else len(label))
            strips += [_Strip(height_px, partial(self._draw_row, row, label)), gap]
        return strips

    def _reference_lines(self) -> Iterator[_Strip]:
        """The references, as many side by side as there is room for."""
        line: list[tuple[int, Picture, Pixels]] = []
        x = self._gap_px
        for label, picture in self.references:
            width = max(picture.size[1], 8 * self._text_px)
            if line and x + width + self._gap_px > self._width_px:
                yield _reference_strip(line)
                line, x = [], self._gap_px
            line.append((x, picture, self._text(label, min(width, self._width_px - 2 * self._gap_px))))
            x += width + self._gap_px
        if line:
            yield _reference_strip(line)

    def _labels_above(self, row: Row) -> _Strip:
        texts = [self._text(label, self._box[1]) for label in row.above]
        height = max(map(len, texts)) + self._gap_px // 3

        def draw(rows_HWC: Pixels) -> None:
            for column, text in enumerate(texts):
                _put(text, self._x(column), rows_HWC, height - len(text) - self._gap_px // 3)

        return _Strip(height, draw)

    def _draw_row(self, row: Row, label: Pixels | None, rows_HWC: Pixels) -> None:
        if label is not None:
            _put(label, self._gap_px, rows_HWC)
        for column, picture in enumerate(row.pictures):
            _put_picture(picture, self._x(column), rows_HWC)

    def _x(self, column: int) -> int:
        return self._left_px + column * (self._box[1] + self._gap_px)

    def _text(self, label: Label, width_px: int, colour: int = _GRAY) -> Pixels:
        """Lines of text, at most `width_px` wide: keys in `colour`, values in black."""
        most_chars = max(8, int(_MOST_LINES * width_px / (_CHAR_WIDTH * self._text_px)))
        lines = [
            (shortened(text, most_chars), level)
            for key, value in label
            for text, level in ((key, colour), (value, _BLACK))
            if text
        ]
        parts = [
            255 - (text_mask(line, self._text_px, width_px) / 255 * (255 - level)).astype(np.uint8)
            for line, level in lines
        ]
        out = np.full((sum(map(len, parts)), width_px, 3), 255, np.uint8)
        y = 0
        for part in parts:
            out[y : y + len(part), : part.shape[1]] = part[:, :width_px, None]
            y += len(part)
        return out


def shortened(text: str, most_chars: int) -> str:
    """`text` on one line, with its middle left out where it is too long: a path is known by its end."""
    line = printable(text).replace("\n", " ")
    head = most_chars // 3
    return line if len(line) <= most_chars else f"{line[:head]}…{line[len(line) - (most_chars - head - 1) :]}"


def _reference_strip(line: Sequence[tuple[int, Picture, Pixels]]) -> _Strip:
    below = max(picture.size[0] for _, picture, _ in line)

    def draw(rows_HWC: Pixels) -> None:
        for x, picture, caption in line:
            _put_picture(picture, x, rows_HWC)
            _put(caption, x, rows_HWC, below + 4)

    return _Strip(below + 4 + max(len(caption) for _, _, caption in line), draw)


def _put(part_HWC: Pixels, x: int, rows_HWC: Pixels, y: int = 0) -> None:
    height, width, _ = part_HWC.shape
    rows_HWC[y : y + height, x : x + width] = part_HWC


def _put_picture(picture: Picture, x: int, rows_HWC: Pixels) -> None:
    height, width = picture.size
    for y0, band_HWC in images.stream_rgb(picture.path, width, height, min(height, 256)):
        rows_HWC[y0 : y0 + len(band_HWC), x : x + width] = band_HWC
