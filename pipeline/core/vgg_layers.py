"""The layer table of the VGG-19 topology: its convolutions, strides and the halo that follows from them.

    conv1_1 conv1_2 pool1 conv2_1 conv2_2 pool2 conv3_1 … conv3_4 pool3 conv4_1 … conv4_4 pool4 conv5_1
    stride  1             2                     4                       8                       16

Channel widths are not part of the table: they come with the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Layer:
    """One row of the table: a 3×3 convolution with its ReLU, or a pooling.

    `stride` is the distance in canvas pixels between two neighbouring positions of the layer's *output*.
    `torchvision_index` is N of `features.N.weight` in torchvision's VGG-19.
    """

    name: str
    kind: Literal["conv", "pool"]
    stride: int
    torchvision_index: int


_CONVS_PER_BLOCK = (2, 2, 4, 4, 1)


def _make_layers() -> tuple[Layer, ...]:
    layers: list[Layer] = []
    index = 0
    for block, convs in enumerate(_CONVS_PER_BLOCK, start=1):
        stride = 2 ** (block - 1)
        for number in range(1, convs + 1):
            layers.append(Layer(f"conv{block}_{number}", "conv", stride, index))
            index += 2  # the convolution and its ReLU
        if block < len(_CONVS_PER_BLOCK):
            layers.append(Layer(f"pool{block}", "pool", stride * 2, index))
            index += 1
    return tuple(layers)


LAYERS = _make_layers()
CONV_NAMES = tuple(layer.name for layer in LAYERS if layer.kind == "conv")
LAYER_BY_NAME = {layer.name: layer for layer in LAYERS}
# The convolutions whose input is a pooled map.
AFTER_POOLING = tuple(name for name in CONV_NAMES if name.endswith("_1") and name != "conv1_1")
# Channel widths of the original VGG-19: block X has 64·2^(X−1), at most 512.
VGG19_WIDTHS: Mapping[str, int] = {name: min(64 * LAYER_BY_NAME[name].stride, 512) for name in CONV_NAMES}
PoolingKind = Literal["mixed", "max", "average", "tent", "l2"]
# How far the window of a pooling reaches beyond its 2×2 cell, in positions of its input.
POOLING_REACH: Mapping[str, int] = {"mixed": 0, "max": 0, "average": 0, "tent": 1, "l2": 0}
# Every tile and chunk edge is a multiple of this, so that no pooling cell crosses an edge (eq. 11).
ALIGN_PX = max(layer.stride for layer in LAYERS)


def ceil_to(value: int, multiple: int) -> int:
    """`value` rounded up to a multiple of `multiple`."""
    return -(-value // multiple) * multiple


def needed_layers(names: Iterable[str]) -> tuple[Layer, ...]:
    """The rows of the table from the input to the deepest of `names`."""
    rows = (LAYERS.index(LAYER_BY_NAME[name]) for name in names)
    return LAYERS[: max(rows, default=-1) + 1]


def pooling_at(pooling: str, layer: str) -> str:
    """The kind of pooling of one layer: `mixed` takes the average in the first pooling, the maximum in the others."""
    if pooling != "mixed":
        return pooling
    return "average" if layer == "pool1" else "max"


def halo_px(names: Iterable[str], pooling: str) -> int:
    """Width of the border around a tile's inner rectangle that the layers `names` depend on, in px (eqs. 12, 13).

    The sum of 1 px per 3×3 convolution at its stride, and of the poolings' reach at the stride of their input, rounded
    up to ALIGN_PX so that every pooling cell starts where it does in the whole image. The forward and the backward pass
    need the same halo.
    """
    reach = POOLING_REACH[pooling]
    radius = sum(layer.stride if layer.kind == "conv" else reach * layer.stride // 2 for layer in needed_layers(names))
    return ceil_to(radius, ALIGN_PX)


def receptive_field_px(names: Iterable[str]) -> int:
    """Side, in px, of the square that one position of the deepest of `names` depends on."""
    # a convolution adds a neighbour on either side, a pooling one of its input, whose stride is half its own
    return 1 + sum(2 * layer.stride if layer.kind == "conv" else layer.stride // 2 for layer in needed_layers(names))


def min_side_px(names: Iterable[str], padding: str) -> int:
    """Smallest image side, in px, at which the deepest of `names` has as many positions as `padding` needs."""
    positions = 2 if padding == "reflect" else 1  # reflect copies the second position
    return positions * needed_layers(names)[-1].stride
