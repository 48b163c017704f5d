"""Total variation: the differences between neighbouring pixels, summed in the gradient pass.

With dy = x[y+1, X] − x[y, X] and dx = x[y, X+1] − x[y, X], 0 at the image's last row or column:

    squared (Johnson et al.):          Ltv = 1/(3N) · Σ over pixels and channels of (dy² + dx²) / 255²
    absolute (Rudin, Osher, Fatemi):   Ltv = 1/N · Σ over pixels of (√(Σ over channels of (dy² + dx²) + ε²) − ε) / 255

Squares take most from the strongest edges, and leave low ridges everywhere; absolute differences take as much from a
ridge as from an edge of a hundred times its height, so areas become flat and edges stay. A pixel's root joins its
channels and directions: separate ones would draw steps along the axes.

All pixels of a term lie inside the image; it belongs to the tile of its upper left pixel. Axes in names: 1 batch,
C channels, H rows, W columns.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pipeline.core.tiling import Tile

TvKind = Literal["squared", "absolute"]

_LEVELS = 255.0
# ε: differences below it, in levels, count as squares do: the steps of a smooth slope are no ridges.
_SMALL = 2.0
# The sum is divided by this number and by N.
CHANNELS = 3


def variation(pixels_1CHW: Tensor, top: int, left: int, tile: Tile, kind: TvKind = "squared") -> tuple[float, Tensor]:
    """(the tile's part of 3N·Ltv, d(N·Ltv)/dx of its inner rectangle as (C, H, W)), exact for any partition.

    `pixels_1CHW`: 0..255 of a window whose upper left corner is at row `top` and column `left` of the canvas. It must
    reach 1 px beyond the inner rectangle, except at the border of the canvas.
    """
    outer = tile.outer(1)
    rows, columns = slice(outer.y0 - top, outer.y1 - top), slice(outer.x0 - left, outer.x1 - left)
    x_CHW = pixels_1CHW[0, :, rows, columns]
    down, right = torch.zeros_like(x_CHW), torch.zeros_like(x_CHW)
    down[:, :-1], right[:, :, :-1] = x_CHW.diff(dim=1), x_CHW.diff(dim=2)
    rows, columns = tile.inner.within(outer)
    if kind == "absolute":
        root_1HW = (down.square() + right.square()).sum(0, keepdim=True).add_(_SMALL**2).sqrt_()
        # of the terms in the window, those that belong to the inner rectangle: tiles add up to the whole
        total = CHANNELS * float((root_1HW[:, rows, columns].double() - _SMALL).sum()) / _LEVELS
        down, right, factor = down / root_1HW, right / root_1HW, 1 / _LEVELS
    else:
        squares = down[:, rows, columns].double().square().sum() + right[:, rows, columns].double().square().sum()
        total, factor = float(squares) / _LEVELS**2, 2 / (CHANNELS * _LEVELS**2)
    gradient_CHW = torch.zeros_like(x_CHW)
    gradient_CHW[:, 1:] += down[:, :-1]
    gradient_CHW -= down
    gradient_CHW[:, :, 1:] += right[:, :, :-1]
    gradient_CHW -= right
    return total, gradient_CHW[:, rows, columns] * factor
