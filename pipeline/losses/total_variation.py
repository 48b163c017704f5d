"""Total variation (Johnson et al.): how much a canvas differs from pixel to pixel. It is local: no pass of its own.

    Ltv = 1/(3N) · Σ over pixels and channels of ((x[y+1, X] − x[y, X])² + (x[y, X+1] − x[y, X])²) / 255²

Pairs of neighbours lie inside the image; each belongs to its upper or left pixel. Axes in names: 1 batch, C channels,
H rows, W columns.
"""

from __future__ import annotations

from torch import Tensor

from pipeline.core.tiling import Tile

_LEVELS_SQUARED = 255.0**2
# What the sum is divided by, per pixel.
CHANNELS = 3


def variation(pixels_1CHW: Tensor, top: int, left: int, tile: Tile) -> tuple[float, Tensor]:
    """(the tile's share of 3N·Ltv, d(N·Ltv)/dx of its inner rectangle as (C, H, W)), exact for any partition.

    `pixels_1CHW`: 0..255 of a window that begins at row `top` and column `left` of the canvas, and reaches at least
    1 px beyond the inner rectangle, but for the border of the canvas.
    """
    around = tile.outer(1)
    rows, columns = slice(around.y0 - top, around.y1 - top), slice(around.x0 - left, around.x1 - left)
    x_CHW = pixels_1CHW[0, :, rows, columns]
    down, right = x_CHW.diff(dim=1), x_CHW.diff(dim=2)
    gradient = x_CHW.new_zeros(x_CHW.shape)
    gradient[:, 1:] += down
    gradient[:, :-1] -= down
    gradient[:, :, 1:] += right
    gradient[:, :, :-1] -= right
    inner = tile.inner
    rows, columns = inner.within(around)
    # of the pairs of the window, those whose upper or left pixel is an inner one
    squares = down[:, rows, columns].double().square().sum() + right[:, rows, columns].double().square().sum()
    return float(squares) / _LEVELS_SQUARED, gradient[:, rows, columns] * (2 / (CHANNELS * _LEVELS_SQUARED))
