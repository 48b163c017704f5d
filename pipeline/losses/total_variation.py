"""Total variation (Johnson et al.): the differences between neighbouring pixels, summed in the gradient pass.

    Ltv = 1/(3N) · Σ over pixels and channels of ((x[y+1, X] − x[y, X])² + (x[y, X+1] − x[y, X])²) / 255²

Both pixels of a pair lie inside the image; a pair belongs to the tile of its upper or left pixel. Axes in names:
1 batch, C channels, H rows, W columns.
"""

from __future__ import annotations

from torch import Tensor

from pipeline.core.tiling import Tile

_LEVELS_SQUARED = 255.0**2
# The sum is divided by this number and by N.
CHANNELS = 3


def variation(pixels_1CHW: Tensor, top: int, left: int, tile: Tile) -> tuple[float, Tensor]:
    """(the tile's part of 3N·Ltv, d(N·Ltv)/dx of its inner rectangle as (C, H, W)), exact for any partition.

    `pixels_1CHW`: 0..255 of a window whose upper left corner is at row `top` and column `left` of the canvas. It must
    reach 1 px beyond the inner rectangle, except at the border of the canvas.
    """
    outer = tile.outer(1)
    rows, columns = slice(outer.y0 - top, outer.y1 - top), slice(outer.x0 - left, outer.x1 - left)
    x_CHW = pixels_1CHW[0, :, rows, columns]
    down, right = x_CHW.diff(dim=1), x_CHW.diff(dim=2)
    gradient = x_CHW.new_zeros(x_CHW.shape)
    gradient[:, 1:] += down
    gradient[:, :-1] -= down
    gradient[:, :, 1:] += right
    gradient[:, :, :-1] -= right
    rows, columns = tile.inner.within(outer)
    # Of all pairs in the window, those whose upper or left pixel is in the inner rectangle: tiles add up to the whole.
    squares = down[:, rows, columns].double().square().sum() + right[:, rows, columns].double().square().sum()
    return float(squares) / _LEVELS_SQUARED, gradient[:, rows, columns] * (2 / (CHANNELS * _LEVELS_SQUARED))
