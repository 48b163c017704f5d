"""Tile geometry: how a canvas is divided into tiles, which are read with a halo.

    canvas (H, W)
    ┌──────────────────────────────────────────┐
    │        outer: inner + halo, cut at the canvas border
    │      ┌───────────────────────┐           │
    │      │  halo                 │           │
    │      │    ┌────────────┐     │           │
    │      │    │   inner    │     │           │   inner: a whole number of chunks,
    │      │    │ (result)   │     │           │   aligned to 16 px except at the right and
    │      │    └────────────┘     │           │   bottom border of the canvas
    │      └───────────────────────┘           │
    └──────────────────────────────────────────┘

Every convolution pads a side of `outer` that lies on the canvas border, as it pads the whole image. It does not pad the
other sides: there the feature map shrinks, so wrong values are never computed. All rectangles are half-open and in
(y, x) order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import lcm
from typing import NamedTuple

from pipeline.core.vgg_layers import ALIGN_PX, Layer, ceil_to


class Rect(NamedTuple):
    """Half-open rectangle [y0, y1) × [x0, x1), in pixels or in positions of a layer."""

    y0: int
    y1: int
    x0: int
    x1: int

    @property
    def height(self) -> int:
        """Rows, never negative."""
        return max(0, self.y1 - self.y0)

    @property
    def width(self) -> int:
        """Columns, never negative."""
        return max(0, self.x1 - self.x0)

    @property
    def area(self) -> int:
        """Rows times columns."""
        return self.height * self.width

    def grown(self, by_px: int, height: int, width: int) -> Rect:
        """This rectangle enlarged by `by_px` on every side, clipped to a (height, width) image."""
        return Rect(
            max(0, self.y0 - by_px), min(height, self.y1 + by_px), max(0, self.x0 - by_px), min(width, self.x1 + by_px)
        )

    def positions(self, layer: Layer) -> Rect:
        """The positions of `layer` that belong to this pixel rectangle.

        Exact for edges aligned to the stride, and for the canvas border, where every pooling rounds sizes down.
        """
        return Rect(*(edge // layer.stride for edge in self))

    def shrunk(self, scale: int) -> Rect:
        """This pixel rectangle in an image shrunk by 2^scale, for edges aligned to that or on the image border."""
        return Rect(*(edge >> scale for edge in self))

    def within(self, other: Rect) -> tuple[slice, slice]:
        """Slices of this rectangle in an array that covers `other`."""
        return slice(self.y0 - other.y0, self.y1 - other.y0), slice(self.x0 - other.x0, self.x1 - other.x0)

    def intersection(self, other: Rect) -> Rect:
        """The common part of both rectangles, possibly empty."""
        y0, x0 = max(self.y0, other.y0), max(self.x0, other.x0)
        return Rect(y0, max(y0, min(self.y1, other.y1)), x0, max(x0, min(self.x1, other.x1)))


@dataclass(frozen=True)
class Tile:
    """One unit of compute: its inner rectangle, and the (height, width) of the canvas."""

    index: int
    inner: Rect
    height: int
    width: int

    def outer(self, halo_px: int) -> Rect:
        """The rectangle that is read: `inner` with the halo, clipped to the canvas."""
        return self.inner.grown(halo_px, self.height, self.width)

    def shrunk(self, scale: int) -> Tile:
        """This tile of the canvas shrunk by 2^scale; empty if only a part of a block of 2^scale px lies in it."""
        return Tile(self.index, self.inner.shrunk(scale), self.height >> scale, self.width >> scale)


def tile_step_px(chunk_px: int, scales: int) -> int:
    """What the side of a tile is a multiple of: whole chunks, and aligned to ALIGN_PX at each of the scales."""
    return lcm(chunk_px, ALIGN_PX << scales - 1)


def grid(height: int, width: int, tile_px: int) -> tuple[Tile, ...]:
    """Divide a (height, width) canvas into tiles of `tile_px`, row by row; the last ones may be smaller.

    Raises ValueError if `tile_px` is not a positive multiple of ALIGN_PX.
    """
    if tile_px <= 0 or tile_px % ALIGN_PX:
        raise ValueError(f"tile_px must be a positive multiple of {ALIGN_PX}, not {tile_px}")
    rects = [
        Rect(y, min(y + tile_px, height), x, min(x + tile_px, width))
        for y in range(0, height, tile_px)
        for x in range(0, width, tile_px)
    ]
    return tuple(Tile(index, rect, height, width) for index, rect in enumerate(rects))


def chunks_of(rect: Rect, chunk_px: int) -> Iterator[tuple[int, int, Rect]]:
    """The chunks that overlap `rect`: (chunk row, chunk column, the part of `rect` inside that chunk)."""
    for cy in range(rect.y0 // chunk_px, ceil_to(rect.y1, chunk_px) // chunk_px):
        for cx in range(rect.x0 // chunk_px, ceil_to(rect.x1, chunk_px) // chunk_px):
            chunk = Rect(cy * chunk_px, (cy + 1) * chunk_px, cx * chunk_px, (cx + 1) * chunk_px)
            yield cy, cx, rect.intersection(chunk)


def bands(rect: Rect, chunk_px: int) -> Iterator[Rect]:
    """The rectangle row of chunks by row of chunks."""
    for y0 in range(rect.y0 // chunk_px * chunk_px, rect.y1, chunk_px):
        yield Rect(max(rect.y0, y0), min(rect.y1, y0 + chunk_px), rect.x0, rect.x1)


Size = tuple[int, int]  # (height, width) in px
