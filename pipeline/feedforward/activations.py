"""What each pass over a network begins at, computes and writes, by itself or with activations on the disk.

A pass that begins at the content computes every layer up to its norm again. With `keeps` the maps of the residual
blocks, at a quarter of the size, stay on the disk instead, and a pass continues from them:

    pass of the norm of     begins at                     writes
    first, down1            the content
    down2                   the content                   activations_0
    block j, conv1          activations_0, skip_(j−1)     skip_j, activations_1
    block j, conv2          activations_1                 activations_0
    up1, up2; the pixels    activations_0, skip_j

`activations` are maps before their norm, `skip` the input of a block. Each has two slots (j mod 2), so that a pass
overwrites nothing that it reads, and can be repeated. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from pipeline.core.tiling import Rect, Size, Tile, grid
from pipeline.feedforward import geometry
from pipeline.feedforward.geometry import Window
from pipeline.feedforward.spec import Conv, Layer, Layered, Residual, TransformSpec
from pipeline.store import ArraySpec, activations_name, skip_name


@dataclass(frozen=True)
class Origin:
    """A map of `size` (rows, columns) that a pass begins at: `array`, before the norm of `conv`, normed.

    `skip`: the array that is added to it, which has `margin` positions more on each side.
    """

    conv: Conv
    size: Size
    array: str
    skip: str | None = None
    margin: int = 0

    @property
    def maps(self) -> int:
        """How many maps are read."""
        return 1 if self.skip is None else 2


@dataclass(frozen=True)
class Step:
    """One pass over a network: `layers`, from `origin`; None: from the content.

    `keeps`: the array that the map at the origin is written to, where it is the input of a block. `writes`: that of the
    last layer's output, before its norm. `adds_content`: whether the output is added to the content, enlarged.
    """

    layers: tuple[Layer, ...]
    origin: Origin | None = None
    keeps: str | None = None
    writes: str | None = None
    adds_content: bool = False

    @property
    def written(self) -> tuple[str, ...]:
        """The arrays that it writes."""
        return tuple(name for name in (self.keeps, self.writes) if name is not None)


def step_of(spec: TransformSpec, number: int, size: Size, norm: Conv | None, keeps: bool) -> Step:
    """The pass that measures the norm of the convolution `norm`, or gives the pixels if it is None.

    `number`: of the network. `size`: (height, width) of the content. `keeps`: whether activations are on the disk.
    """
    adds_content = norm is None and spec.skip == "bicubic"
    if not keeps or not spec.measured_norms():
        layers = spec.layers if norm is None else geometry.layers_until(spec, norm)
        return Step(layers, adds_content=adds_content)
    before, blocks, after = _parts(spec)
    maps = [activations_name(number, slot) for slot in (0, 1)]
    if norm in before:
        return Step(before[: before.index(norm) + 1], writes=maps[0] if norm == before[-1] else None)
    for index, block in enumerate(blocks):
        first, second = block.convs
        origin = _behind(spec, number, size, index)
        if norm == first:
            return Step((first,), origin, keeps=skip_name(number, (index + 1) % 2), writes=maps[1])
        if norm == second:
            return Step((second,), Origin(first, geometry.size_after(origin.size, (first,)), maps[1]), writes=maps[0])
    layers = after if norm is None else after[: after.index(norm) + 1]
    return Step(layers, _behind(spec, number, size, len(blocks)), adds_content=adds_content)


def _behind(spec: TransformSpec, number: int, size: Size, block: int) -> Origin:
    """What the first `block` blocks give."""
    before, blocks, _ = _parts(spec)
    entered, array = geometry.grid_size(spec, size, before), activations_name(number, 0)
    if block == 0:
        return Origin(before[-1], entered, array)
    last = blocks[block - 1]
    left = geometry.size_after(entered, blocks[:block])
    return Origin(last.convs[1], left, array, skip_name(number, block % 2), geometry.skip_margin(last))


def steps_of(spec: TransformSpec, number: int, size: Size, keeps: bool) -> list[Step]:
    """All passes over a network, in order."""
    return [step_of(spec, number, size, norm, keeps) for norm in (*spec.measured_norms(), None)]


def window(spec: Layered, size: Size, step: Step, wanted: Rect) -> Window:
    """The window that gives `wanted` of the step's output. `size`: (height, width) of the content."""
    if step.origin is None:
        return geometry.window(spec, size, step.layers, wanted)
    return geometry.inner_window(step.origin.size, step.layers, wanted)


def wanted(spec: Layered, size: Size, step: Step, tile: Tile) -> Rect:
    """The positions of the step's output that belong to one of its tiles."""
    output = output_size(spec, size, step)
    if step.writes is None:
        return geometry.owned(tile.inner, (tile.height, tile.width), output)
    return tile.inner.intersection(Rect(0, output[0], 0, output[1]))


def kept(step: Step, tile: Tile) -> Rect:
    """The positions of the map at the step's origin that a tile writes; none where the step does not keep it."""
    if step.keeps is None or step.origin is None:
        return Rect(0, 0, 0, 0)
    return tile.inner.intersection(Rect(0, step.origin.size[0], 0, step.origin.size[1]))


def output_size(spec: Layered, size: Size, step: Step) -> Size:
    """(rows, columns) of the step's output."""
    if step.origin is None:
        return geometry.grid_size(spec, size, step.layers)
    return geometry.size_after(step.origin.size, step.layers)


def array_specs(spec: TransformSpec, number: int, size: Size, chunk_px: int, form: str) -> dict[str, ArraySpec]:
    """The arrays for the activations of a network; `form`: of their numbers."""
    if not spec.measured_norms():
        return {}
    before, blocks, _ = _parts(spec)
    shape = (*geometry.grid_size(spec, size, before), before[-1].channels_out)
    names = [activations_name(number, slot) for slot in range(1 + bool(blocks))]
    names += [skip_name(number, block % 2) for block in range(1, min(len(blocks), 2) + 1)]
    return dict.fromkeys(names, ArraySpec(shape, chunk_px // position_px(spec), form))


def divided(spec: Layered, size: Size, step: Step) -> tuple[Size, int]:
    """(height, width) of what is divided into tiles, in px of the canvas, and log2 of px per position of the tiles.

    A step that writes activations has tiles in positions of their arrays, which are whole chunks.
    """
    if step.writes is None:
        return (size[0] * spec.factor, size[1] * spec.factor), 0
    assert isinstance(spec, TransformSpec)
    side = position_px(spec)
    rows, columns = geometry.grid_size(spec, size, _parts(spec)[0])
    return (rows * side, columns * side), side.bit_length() - 1


def tiles(spec: Layered, size: Size, step: Step, tile_px: int) -> tuple[Tile, ...]:
    """The tiles of a step."""
    (height, width), scale = divided(spec, size, step)
    return tuple(tile.shrunk(scale) for tile in grid(height, width, tile_px))


def position_px(spec: TransformSpec) -> int:
    """The side of a position of the residual blocks, in px of the canvas: a power of 2."""
    return spec.factor * prod(conv.stride for conv in _parts(spec)[0])


def bytes_moved(steps: Sequence[Step], arrays: Mapping[str, ArraySpec]) -> int:
    """Bytes of activations that the passes read and write, without halos."""
    names = [name for step in steps for name in step.written]
    for step in steps:
        if step.origin is not None:
            names += [name for name in (step.origin.array, step.origin.skip) if name is not None]
    return sum(arrays[name].stored_bytes for name in names)


def _parts(spec: TransformSpec) -> tuple[tuple[Conv, ...], tuple[Residual, ...], tuple[Conv, ...]]:
    """The layers up to the blocks, the blocks, and the layers behind them."""
    blocks = tuple(layer for layer in spec.layers if isinstance(layer, Residual))
    convs = [layer for layer in spec.layers if isinstance(layer, Conv)]
    # without blocks too, the maps are smallest before they are enlarged
    before = 1 + max((index for index, conv in enumerate(convs) if conv.stride > 1), default=0)
    return tuple(convs[:before]), blocks, tuple(convs[before:])
