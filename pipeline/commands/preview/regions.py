"""The rectangles that a crop renders: geometry only."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.core.tiling import Rect, Size
from pipeline.core.vgg_layers import ALIGN_PX, ceil_to
from pipeline.render.resample import needed


def scaled(rect: Rect, size: Size, target: Size) -> Rect:
    """A rectangle of an image of `size` in the same image at `target`: all px that it touches, at least one."""
    y0, x0 = rect.y0 * target[0] // size[0], rect.x0 * target[1] // size[1]
    y1, x1 = -(-rect.y1 * target[0] // size[0]), -(-rect.x1 * target[1] // size[1])
    return Rect(y0, min(max(y1, y0 + 1), target[0]), x0, min(max(x1, x0 + 1), target[1]))


def regions(rect: Rect, sizes: Sequence[Size], around_px: Sequence[int], align_px: int = ALIGN_PX) -> list[Rect]:
    """The region to render at each size for `rect`, which is of the last: with `around_px` more on every side.

    Every region contains what the next one is enlarged from.
    """
    results: list[Rect] = []
    for size, around in reversed(list(zip(sizes, around_px, strict=True))):
        region = scaled(rect, sizes[-1], size).grown(around, *size)
        if results:
            below = needed(results[-1], sizes[len(sizes) - len(results)], size)
            region = Rect(
                min(region.y0, below.y0), max(region.y1, below.y1), min(region.x0, below.x0), max(region.x1, below.x1)
            )
        results.append(aligned(region, size, align_px))
    return results[::-1]


def aligned(rect: Rect, size: Size, align_px: int = ALIGN_PX) -> Rect:
    """The rectangle grown to whole pooling windows, as tiles are, or to the image's border."""
    y0, x0 = (edge // align_px * align_px for edge in (rect.y0, rect.x0))
    return Rect(y0, min(ceil_to(rect.y1, align_px), size[0]), x0, min(ceil_to(rect.x1, align_px), size[1]))
