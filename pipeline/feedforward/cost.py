"""What a pass of a network costs: memory of a tile, and arithmetic. Pure sums; loads no torch."""

from __future__ import annotations

from pipeline.core.tiling import Rect, Size, grid
from pipeline.feedforward import geometry
from pipeline.feedforward.geometry import Window
from pipeline.feedforward.spec import Conv, Layer, Layered, Pool, convs_of


def tile_bytes(spec: Layered, size: Size, tile_px: int, itemsize: int) -> int:
    """Peak bytes of the feature maps of one tile of any pass. `size`: (height, width) of the input."""
    return max(
        _window_bytes(spec, geometry.window(spec, size, spec.layers, rect), itemsize)
        for rect in _tiles(spec, size, tile_px)
    )


def window_px(spec: Layered, size: Size, tile_px: int) -> int:
    """The most input pixels that a tile reads."""
    return max(geometry.window(spec, size, spec.layers, rect).pixels.area for rect in _tiles(spec, size, tile_px))


def halo_overhead(spec: Layered, size: Size, tile_px: int) -> float:
    """Input pixels that the last pass reads, over all pixels of the input: what tiles cost."""
    canvas = [side * spec.factor for side in size]
    sums = []
    for axis, side in enumerate(canvas):
        starts = range(0, side, tile_px)
        rects = [Rect(start, min(start + tile_px, side), 0, 1) for start in starts]
        # both axes have the same layers, so that one function of rows serves both
        square = (size[axis], size[axis])
        sums.append(sum(geometry.window(spec, square, spec.layers, rect).pixels.height for rect in rects))
    return sums[0] * sums[1] / (size[0] * size[1])


def flop(spec: Layered, size: Size, layers: tuple[Layer, ...]) -> int:
    """Floating-point operations of these layers over a whole image."""
    height, width = (side + 2 * spec.start_padding_px for side in size)
    total = 0
    for layer in layers:
        for conv in convs_of([layer]):
            height, width = conv.size(height), conv.size(width)
            total += 2 * conv.kernel**2 * conv.channels_in * conv.channels_out * height * width
        if isinstance(layer, Pool):
            height, width = layer.size(height), layer.size(width)
    return total


def parameters_bytes(spec: Layered) -> int:
    """Bytes of the weights in float64, as they are kept, and once more as they are used."""
    return 2 * 8 * sum(conv.kernel**2 * conv.channels_in * conv.channels_out for conv in convs_of(spec.layers))


def _tiles(spec: Layered, size: Size, tile_px: int) -> list[Rect]:
    """Of each axis the first tile, the second (which has a halo on both sides, if any has) and the last."""
    height, width = (side * spec.factor for side in size)
    rows, columns = ([tile.inner[:2] for tile in grid(side, 1, tile_px)] for side in (height, width))
    chosen = [sorted({*parts[:2], parts[-1]}) for parts in (rows, columns)]
    return [Rect(*row, *column) for row in chosen[0] for column in chosen[1]]


def _window_bytes(spec: Layered, window: Window, itemsize: int) -> int:
    peak = 0
    for index, layer in enumerate(window.layers):
        held, wanted, size = window.held[index], window.held[index + 1], window.sizes[index]
        if isinstance(layer, Pool):
            continue  # its input was the output of a convolution, which needs more
        if isinstance(layer, Conv):
            peak = max(peak, _conv_values(layer, held, wanted, itemsize))
            continue
        first, second = layer.convs
        inner_size = first.size(size[0]), first.size(size[1])
        inner = geometry.held_rect(second, wanted, inner_size)
        skip = held.area * first.channels_in
        own = _conv_values(first, geometry.held_rect(first, inner, size), inner, itemsize)
        peak = max(peak, own, skip + _conv_values(second, inner, wanted, itemsize))
    return peak * itemsize


def _conv_values(conv: Conv, held: Rect, wanted: Rect, itemsize: int) -> int:
    """Values in memory at once: the input, enlarged, padded, the output; in float64 also the unfolded input."""
    rows, columns = (geometry.raw_of(conv, part) for part in (wanted[:2], wanted[2:]))
    taken = (rows[1] - rows[0]) * (columns[1] - columns[0]) * conv.channels_in
    given = held.area * conv.channels_in
    enlarged = given * conv.enlargement**2 if conv.enlargement > 1 else 0
    out = wanted.area * conv.channels_out
    # torch has no direct float64 convolution on the CPU
    unfolded = wanted.area * conv.channels_in * conv.kernel**2 + out if itemsize == 8 else 0
    # padding joins rows first and then columns; the kernel needs the result in another layout
    return given + max(enlarged + 3 * taken, 2 * taken + out + unfolded)
