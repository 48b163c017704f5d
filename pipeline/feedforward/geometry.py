"""Which positions of every layer a window of the output needs. Loads no torch.

Everything is per axis, a half-open range (lo, hi) of a layer's own grid. Backwards from a range that is wanted:

    wanted of the output      [lo ............ hi)
    raw, before the conv    [lo·s−p ..................... )   may reach beyond the border of the image
    held of the input         [hull of the raw positions and of those that the padding mirrors)

So a tile at the border of the image is padded as the whole image is, and one inside reads real values there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipeline.core.tiling import Rect, Size
from pipeline.feedforward.spec import Conv, Layer, Layered, Padding, Pool, Residual

Range = tuple[int, int]


@dataclass(frozen=True)
class Source:
    """Where a range beyond a border of an axis comes from: positions `before` and `after` are padded."""

    before: Range
    inside: Range
    after: Range

    def held(self, size: int, padding: Padding) -> Range:
        """The hull of the positions that are read."""
        ranges = [self.inside] if self.inside[0] < self.inside[1] else []
        if padding == "reflect":
            ranges += [mirrored(part, size) for part in (self.before, self.after) if part[0] < part[1]]
        return min(lo for lo, _ in ranges), max(hi for _, hi in ranges)


def source(raw: Range, size: int) -> Source:
    """`raw` split at the borders of an axis of `size` positions."""
    lo, hi = raw
    inside = (min(max(lo, 0), size), min(max(hi, 0), size))
    return Source((lo, min(hi, 0)), inside, (max(lo, size), hi))


def mirrored(part: Range, size: int) -> Range:
    """The positions that reflection copies to `part`, which lies beyond one border; in reverse order."""
    lo, hi = part
    return (1 - hi, 1 - lo) if lo < 0 else (2 * size - 1 - hi, 2 * size - 1 - lo)


def raw_of(conv: Conv, wanted: Range) -> Range:
    """The enlarged positions under the kernel."""
    lo, hi = wanted
    return lo * conv.stride - conv.padding_px, (hi - 1) * conv.stride - conv.padding_px + conv.kernel


def held_of(conv: Conv, wanted: Range, size: int) -> Range:
    """The positions of its input that a convolution reads. `size`: all positions of the input."""
    enlarged = size * conv.enlargement
    lo, hi = source(raw_of(conv, wanted), enlarged).held(enlarged, conv.padding)
    return lo // conv.enlargement, -(-hi // conv.enlargement)


def held_rect(conv: Conv, wanted: Rect, size: Size) -> Rect:
    """`held_of` in both axes."""
    rows, columns = (held_of(conv, part, side) for part, side in zip((wanted[:2], wanted[2:]), size, strict=True))
    return Rect(*rows, *columns)


def skip_margin(block: Residual) -> int:
    """Positions of a block's input beyond each side of its output; 0 with padding."""
    return sum(conv.kernel // 2 - conv.padding_px for conv in block.convs)


def held_of_layer(layer: Layer, wanted: Range, size: int) -> Range:
    """The positions of its input that a layer reads."""
    if isinstance(layer, Conv):
        return held_of(layer, wanted, size)
    if isinstance(layer, Pool):
        return 2 * wanted[0], min(2 * wanted[1], size)
    first, second = layer.convs
    lo, hi = held_of(first, held_of(second, wanted, first.size(size)), size)
    margin = skip_margin(layer)
    return min(lo, wanted[0] + margin), max(hi, wanted[1] + margin)


@dataclass(frozen=True)
class Window:
    """A window through the network: the rectangle of each layer's output, and of the pixels that are read.

    `sizes`: (height, width) of the input of each layer, and of the last output. `layers`: those that are run.
    `start_padding_px`: of the image before the first of them.
    """

    layers: tuple[Layer, ...]
    pixels: Rect
    held: tuple[Rect, ...]
    sizes: tuple[Size, ...]
    start_padding_px: int = 0


def window(spec: Layered, size: Size, layers: Sequence[Layer], wanted: Rect) -> Window:
    """The window that gives `wanted` of the output of the last of `layers`. `size`: (height, width) of the image."""
    padding = spec.start_padding_px
    inner = inner_window(_padded(spec, size), layers, wanted)
    raw = Rect(*(edge - padding for edge in inner.pixels))
    rows, columns = (
        source(part, side).held(side, "reflect") for part, side in zip((raw[:2], raw[2:]), size, strict=True)
    )
    return replace(inner, pixels=Rect(*rows, *columns), start_padding_px=padding)


def inner_window(size: Size, layers: Sequence[Layer], wanted: Rect) -> Window:
    """The window of layers in the middle of a network; its `pixels` are positions of their input, which has `size`."""
    axes = [_axis(side, layers, part) for side, part in zip(size, (wanted[:2], wanted[2:]), strict=True)]
    (rows, heights), (columns, widths) = axes
    rects = tuple(Rect(*row, *column) for row, column in zip(rows, columns, strict=True))
    return Window(tuple(layers), rects[0], rects, tuple(zip(heights, widths, strict=True)))


def _axis(side: int, layers: Sequence[Layer], wanted: Range) -> tuple[list[Range], list[int]]:
    """The range of the input of each layer and of the last output; and the size of these grids."""
    sizes = [side]
    for layer in layers:
        sizes.append(layer.size(sizes[-1]))
    held = [wanted]
    for layer, before in zip(reversed(layers), reversed(sizes[:-1]), strict=True):
        held.append(held_of_layer(layer, held[-1], before))
    return held[::-1], sizes


def layers_until(spec: Layered, conv: Conv) -> tuple[Layer, ...]:
    """The layers before the norm of `conv`: whole ones, and of its residual block only the convolutions up to it."""
    before: list[Layer] = []
    for layer in spec.layers:
        if layer == conv:
            return (*before, conv)
        if isinstance(layer, Residual) and conv in layer.convs:
            return (*before, *layer.convs[: layer.convs.index(conv) + 1])
        before.append(layer)
    raise ValueError(f"{conv.name} is no layer of this network")


def grid_size(spec: Layered, size: Size, layers: Sequence[Layer]) -> Size:
    """(height, width) of the output of the last of `layers`. `size`: of the image."""
    return size_after(_padded(spec, size), layers)


def size_after(size: Size, layers: Sequence[Layer]) -> Size:
    """(height, width) of the output of the last of `layers`, whose input has `size`."""
    height, width = size
    for layer in layers:
        height, width = layer.size(height), layer.size(width)
    return height, width


def enlarged_from(wanted: Rect, size: Size, factor: int) -> Rect:
    """The pixels of an image of `size` that `wanted` of its bicubic enlargement needs: two to each side."""
    rows, columns = ((lo // factor, -(-hi // factor)) for lo, hi in (wanted[:2], wanted[2:]))
    return Rect(*rows, *columns).grown(2, *size)


def _padded(spec: Layered, size: Size) -> Size:
    return size[0] + 2 * spec.start_padding_px, size[1] + 2 * spec.start_padding_px


def owned(inner: Rect, canvas: Size, grid: Size) -> Rect:
    """The positions of a grid that belong to a tile: every position to one tile of the canvas, in proportion."""
    (height, width), (rows, columns) = canvas, grid
    return Rect(
        inner.y0 * rows // height, inner.y1 * rows // height, inner.x0 * columns // width, inner.x1 * columns // width
    )
