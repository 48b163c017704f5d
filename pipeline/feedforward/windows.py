"""Runs the layers of a network over a window: exact at the borders of a tile, padded at those of the image.

Axes in names: 1 batch, C channels, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.core.tiling import Rect, Size
from pipeline.feedforward import geometry
from pipeline.feedforward.geometry import Range, Source, Window
from pipeline.feedforward.network import upsampled
from pipeline.feedforward.spec import Conv, Padding, Pool, Residual

# Weight and bias of a convolution, and whether its ReLU follows.
Parameters = Callable[[Conv], tuple[Tensor, Tensor, bool]]


def run_window(window: Window, x_1CHW: Tensor, parameters: Parameters) -> Tensor:
    """The output of the window's last layer. `x_1CHW`: `window.pixels` of the image, or of an inner map."""
    padding = window.start_padding_px
    size = window.sizes[0][0] - 2 * padding, window.sizes[0][1] - 2 * padding
    raw = Rect(*(edge - padding for edge in window.held[0]))
    x = _taken(x_1CHW, window.pixels, raw, size, "reflect")
    for index, layer in enumerate(window.layers):
        held, wanted, before = window.held[index], window.held[index + 1], window.sizes[index]
        if isinstance(layer, Residual):
            x = _block(layer, x, held, wanted, before, parameters)
        elif isinstance(layer, Pool):
            x = F.max_pool2d(x, 2, ceil_mode=True)
        else:
            x = _conv(layer, x, held, wanted, before, parameters)
    return x


def _block(block: Residual, x: Tensor, held: Rect, wanted: Rect, size: Size, parameters: Parameters) -> Tensor:
    first, second = block.convs
    inner_size = first.size(size[0]), first.size(size[1])
    inner = geometry.held_rect(second, wanted, inner_size)
    source = geometry.held_rect(first, inner, size)
    y = _conv(first, _cut(x, held, source), source, inner, size, parameters)
    y = _conv(second, y, inner, wanted, inner_size, parameters)
    margin = geometry.skip_margin(block)
    kept = Rect(*(edge + margin for edge in wanted))
    return y.add_(_cut(x, held, kept))


def _conv(conv: Conv, x: Tensor, held: Rect, wanted: Rect, size: Size, parameters: Parameters) -> Tensor:
    """`wanted` of a convolution's output from `held` of its input."""
    times = conv.enlargement
    x = upsampled(x, conv.upsampling)
    raw = Rect(*geometry.raw_of(conv, wanted[:2]), *geometry.raw_of(conv, wanted[2:]))
    enlarged = Rect(*(edge * times for edge in held))
    x = _taken(x, enlarged, raw, (size[0] * times, size[1] * times), conv.padding)
    weight, bias, has_relu = parameters(conv)
    x = F.conv2d(x.contiguous(memory_format=torch.channels_last), weight, bias, conv.stride)
    return F.relu_(x) if has_relu else x


def _cut(x: Tensor, held: Rect, kept: Rect) -> Tensor:
    rows, columns = kept.within(held)
    return x[:, :, rows, columns]


def _taken(x: Tensor, held: Rect, raw: Rect, size: Size, padding: Padding) -> Tensor:
    """`raw` of a map of which `held` is there: cut, and padded where it reaches beyond the map of `size`."""
    for axis, (lo, hi), wanted, side in (
        (2, held[:2], raw[:2], size[0]),
        (3, held[2:], raw[2:], size[1]),
    ):
        if wanted != (lo, hi):
            x = _taken_axis(x, axis, lo, geometry.source(wanted, side), side, padding)
    return x


def _taken_axis(x: Tensor, axis: int, start: int, parts: Source, size: int, padding: Padding) -> Tensor:
    def read(part: Range) -> Tensor:
        return x.narrow(axis, part[0] - start, part[1] - part[0])

    def beyond(part: Range) -> Tensor:
        if padding == "reflect":
            return read(geometry.mirrored(part, size)).flip(axis)
        shape = list(x.shape)
        shape[axis] = part[1] - part[0]
        return x.new_zeros(shape)

    pieces = [
        beyond(part) if outside else read(part)
        for part, outside in ((parts.before, True), (parts.inside, False), (parts.after, True))
        if part[0] < part[1]
    ]
    return torch.cat(pieces, axis) if len(pieces) > 1 else pieces[0]
