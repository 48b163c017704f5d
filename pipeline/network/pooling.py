"""The poolings between the blocks, and their backward passes.

    max, average    of the cell of 2×2 positions
    l2              (Σ φ²/4 + ε)^½ over the cell
    tent            Σ φ·(1, 3, 3, 1)/8 along both axes: the cell and one position around it, which at the border of the
                    image is the network's padding

Only torch's own kernels for max and average, and sums in a fixed order for the others: the bits are the same on every
run, on a GPU too. Axes in names: 1 batch, C channels, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.core.tiling import Rect
from pipeline.core.vgg_layers import POOLING_REACH
from pipeline.network.padding import SOURCE, Cut

# Under the root of l2, so that its gradient is finite where a cell is 0. Features are around 1, so 1e-6 is nothing.
L2_EPSILON = 1e-12
Slices = tuple[slice, slice]


@dataclass
class Pooled:
    """A pooled map, and what the backward pass needs.

    `cells`: the (rows, columns) of the input in which the cells of all outputs lie. `source_1CHW`: the input there, a
    view; None for tent, whose backward pass depends on no value. `indices`: the positions of the maxima.
    """

    features_1CHW: Tensor
    input_shape: torch.Size
    cells: Slices
    source_1CHW: Tensor | None = None
    indices: Tensor | None = None


class Pooling:
    """Pooling of one kind, in a network of one padding."""

    def __init__(self, kind: str, padding: str):
        self._kind, self._reach, self._offset = kind, POOLING_REACH[kind], SOURCE[padding]

    def positions(self, region: Rect, cut: Cut) -> Rect:
        """The positions of the output, from those of the input: at a cut only those whose window is inside."""
        top, bottom, left, right = cut
        y0, x0 = (
            (first + 1 + self._reach) // 2 if is_cut else 0 for first, is_cut in ((region.y0, top), (region.x0, left))
        )
        y1, x1 = ((last - self._reach * is_cut) // 2 for last, is_cut in ((region.y1, bottom), (region.x1, right)))
        return Rect(y0, y1, x0, x1)

    def forward(self, x_1CHW: Tensor, cells: Slices, with_tape: bool) -> Pooled:
        """Pool the windows around `cells`. Without a tape, `backward` cannot follow, but autograd may record."""
        rows, columns = cells
        source, shape = x_1CHW[:, :, rows, columns], x_1CHW.shape
        if self._kind == "tent":
            filtered = _filtered(_filtered(x_1CHW, 2, rows, self._offset), 3, columns, self._offset)
            return Pooled(filtered.mul_(1 / 64), shape, cells)
        if self._kind == "l2":
            return Pooled(_root_mean_square(source), shape, cells, source)
        if self._kind == "average":
            return Pooled(F.avg_pool2d(source, 2), shape, cells, source)
        if with_tape:
            pooled, indices = F.max_pool2d_with_indices(source, (2, 2))
            return Pooled(pooled, shape, cells, source, indices)
        return Pooled(F.max_pool2d(source, 2), shape, cells, source)

    def backward(self, pooled: Pooled, gradient_1CHW: Tensor) -> Tensor:
        """The gradient of the input, in channels-last layout, from that of the output."""
        source, (rows, columns) = pooled.source_1CHW, pooled.cells
        height, width = pooled.input_shape[2:]
        if source is None:
            gradient = _transposed(gradient_1CHW * (1 / 64), 3, columns, width, self._offset)
            return _transposed(gradient, 2, rows, height, self._offset)
        if self._kind == "l2":
            gradient = _root_mean_square_backward(pooled.features_1CHW, source, gradient_1CHW)
        elif pooled.indices is not None:
            gradient = torch.ops.aten.max_pool2d_with_indices_backward(
                gradient_1CHW, source, [2, 2], [2, 2], [0, 0], [1, 1], False, pooled.indices
            )
        else:
            gradient = torch.ops.aten.avg_pool2d_backward(
                gradient_1CHW, source, [2, 2], [2, 2], [0, 0], False, True, None
            )
        if gradient.shape == pooled.input_shape:
            return gradient
        whole = gradient.new_zeros(pooled.input_shape).contiguous(memory_format=torch.channels_last)
        whole[:, :, rows, columns] = gradient
        return whole


def _corners(x_1CHW: Tensor) -> Iterator[Tensor]:
    """The four positions of every cell, as views; an odd last line belongs to no cell."""
    height, width = (side // 2 * 2 for side in x_1CHW.shape[2:])
    for row in (0, 1):
        for column in (0, 1):
            yield x_1CHW[:, :, row:height:2, column:width:2]


def _root_mean_square(x_1CHW: Tensor) -> Tensor:
    first, *others = _corners(x_1CHW)
    sums = first.square()
    for corner in others:
        sums.addcmul_(corner, corner)
    return sums.mul_(0.25).add_(L2_EPSILON).sqrt_()


def _root_mean_square_backward(root_1CHW: Tensor, x_1CHW: Tensor, gradient_1CHW: Tensor) -> Tensor:
    """φ/(4·root) times the gradient: not above half of it, also where all of a cell is 0."""
    factor = (gradient_1CHW / root_1CHW).mul_(0.25)
    result = _empty(x_1CHW, x_1CHW.shape)
    if any(side % 2 for side in x_1CHW.shape[2:]):
        result.zero_()
    for corner, target in zip(_corners(x_1CHW), _corners(result), strict=True):
        torch.mul(corner, factor, out=target)
    return result


def _empty(like: Tensor, shape: torch.Size) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _lines(x: Tensor, axis: int, at: slice) -> Tensor:
    """A view of some rows (axis 2) or columns (axis 3)."""
    return x[:, :, at] if axis == 2 else x[:, :, :, at]


def _taps(cells: slice, size: int, offset: int | None) -> Iterator[tuple[slice, slice]]:
    """(output lines, input lines) of the two taps of weight 1 along an axis of `size`, before and behind every cell.

    Where the first or last cell lies on the border of the image, that tap is the line that padding copies: the
    `offset`-th from the border, none for zeros.
    """
    start, stop = cells.start, cells.stop
    count = (stop - start) // 2
    first, last = int(start == 0), count - int(stop == size)
    yield slice(first, count), slice(start - 1 + 2 * first, stop - 2, 2)
    yield slice(0, last), slice(start + 2, start + 2 + 2 * last, 2)
    if offset is not None:
        yield slice(0, first), slice(offset, offset + first)
        yield slice(last, count), slice(size - 1 - offset, size - 1 - offset + count - last)


def _filtered(x: Tensor, axis: int, cells: slice, offset: int | None) -> Tensor:
    """Every output line is (1, 3, 3, 1) times the lines of its cell and the two around it."""
    first, second = (_lines(x, axis, slice(cells.start + line, cells.stop, 2)) for line in (0, 1))
    result = torch.add(first, second).mul_(3)
    for target, source in _taps(cells, x.shape[axis], offset):
        _lines(result, axis, target).add_(_lines(x, axis, source))
    return result


def _transposed(gradient: Tensor, axis: int, cells: slice, size: int, offset: int | None) -> Tensor:
    """The backward pass of `_filtered`, whose input had `size` lines."""
    shape = torch.Size([*gradient.shape[:axis], size, *gradient.shape[axis + 1 :]])
    result = _empty(gradient, shape)
    for beside in (slice(0, cells.start), slice(cells.stop, size)):
        _lines(result, axis, beside).zero_()
    for line in (0, 1):
        torch.mul(gradient, 3, out=_lines(result, axis, slice(cells.start + line, cells.stop, 2)))
    for source, target in _taps(cells, size, offset):
        _lines(result, axis, target).add_(_lines(gradient, axis, source))
    return result
