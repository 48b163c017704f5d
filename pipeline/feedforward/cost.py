"""What a pass of a network costs: memory of a tile, and arithmetic. Pure sums; loads no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pipeline.core.tiling import Rect, Size, Tile, grid
from pipeline.feedforward import activations, geometry
from pipeline.feedforward.activations import Step
from pipeline.feedforward.geometry import Window
from pipeline.feedforward.spec import Conv, Layered, Pool, convs_of


def tile_bytes(spec: Layered, size: Size, tile_px: int, itemsize: int, steps: Sequence[Step] = ()) -> int:
    """Peak bytes of the feature maps of one tile of any pass. `size`: (height, width) of the input.

    `steps`: the passes; by default all layers from the content.
    """
    return max(
        _window_bytes(spec, window, itemsize)
        + (_skip_values(step, window) + _content_values(spec, size, step, window) * (1 + spec.factor**2)) * itemsize
        for step in heaviest(steps or [Step(spec.layers)])
        for window in _some_windows(spec, size, step, tile_px)
    )


def heaviest(steps: Iterable[Step]) -> list[Step]:
    """Of steps that begin and end at the same kind of map the last one, which has the most layers."""
    return list({(step.origin is None, step.keeps is None, step.writes is None): step for step in steps}.values())


def waiting_values(spec: Layered, size: Size, tile_px: int, step: Step) -> int:
    """The most values that a tile reads, and then writes to arrays of activations."""
    return max(
        _read_values(step, window)
        + len(step.written) * _output_values(window)
        + _content_values(spec, size, step, window)
        for window in _some_windows(spec, size, step, tile_px)
    )


def halo_overhead(spec: Layered, size: Size, tile_px: int, step: Step | None = None) -> float:
    """Positions that a pass reads over all of its tiles, per position that is there: what tiles cost.

    `step`: by default all layers from the content.
    """
    step = step or Step(spec.layers)
    (height, width), _ = activations.divided(spec, size, step)
    rows, columns = _parts(height, tile_px), _parts(width, tile_px)
    # the rows that a tile reads do not depend on its columns
    read_rows = sum(one.pixels.height for one in _windows(spec, size, step, [Rect(*part, 0, width) for part in rows]))
    across = [Rect(0, height, *part) for part in columns]
    read_columns = sum(one.pixels.width for one in _windows(spec, size, step, across))
    whole = size if step.origin is None else step.origin.size
    return read_rows * read_columns / (whole[0] * whole[1])


def flop(spec: Layered, size: Size, step: Step) -> int:
    """Floating-point operations of a pass over a whole image."""
    before = geometry.grid_size(spec, size, ()) if step.origin is None else step.origin.size
    total = 0
    for layer in step.layers:
        height, width = before
        for conv in convs_of([layer]):
            height, width = conv.size(height), conv.size(width)
            total += 2 * conv.kernel**2 * conv.channels_in * conv.channels_out * height * width
        before = geometry.size_after(before, (layer,))
    return total


def parameters_bytes(spec: Layered) -> int:
    """Bytes of the weights in float64, as they are kept, and once more as they are used."""
    return 2 * 8 * sum(conv.kernel**2 * conv.channels_in * conv.channels_out for conv in convs_of(spec.layers))


def _parts(side_px: int, tile_px: int) -> list[tuple[int, int]]:
    return [(tile.inner.y0, tile.inner.y1) for tile in grid(side_px, 1, tile_px)]


def _some_windows(spec: Layered, size: Size, step: Step, tile_px: int) -> list[Window]:
    """Of each axis the first tile, the second (which has a halo on both sides, if any has) and the last."""
    rows, columns = (_parts(side, tile_px) for side in activations.divided(spec, size, step)[0])
    chosen = [sorted({*parts[:2], parts[-1]}) for parts in (rows, columns)]
    return _windows(spec, size, step, [Rect(*row, *column) for row in chosen[0] for column in chosen[1]])


def _windows(spec: Layered, size: Size, step: Step, rects: Iterable[Rect]) -> list[Window]:
    """The windows of the tiles at `rects` of the canvas."""
    (height, width), scale = activations.divided(spec, size, step)
    tiles = [Tile(0, rect, height, width).shrunk(scale) for rect in rects]
    wanted = [activations.wanted(spec, size, step, tile) for tile in tiles]
    return [activations.window(spec, size, step, rect) for rect in wanted if rect.area]


def _read_values(step: Step, window: Window) -> int:
    """Values of the content, or of the activations and what is added to them."""
    if step.origin is None:
        return window.pixels.area * 3
    return window.pixels.area * step.origin.conv.channels_out * step.origin.maps


def _skip_values(step: Step, window: Window) -> int:
    """Values of what is added to the activations that a pass begins at."""
    return 0 if step.origin is None else _read_values(step, window) * (step.origin.maps - 1) // step.origin.maps


def _content_values(spec: Layered, size: Size, step: Step, window: Window) -> int:
    """Values of the content that is enlarged and added to the output."""
    return 3 * geometry.enlarged_from(window.held[-1], size, spec.factor).area if step.adds_content else 0


def _output_values(window: Window) -> int:
    last = window.layers[-1]
    assert isinstance(last, Conv)
    return window.held[-1].area * last.channels_out


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
