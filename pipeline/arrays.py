"""Which arrays a stage has, and what they are called: one table for whoever makes, reads, checks or mends them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.layers import LAYER_BY_NAME

GRADIENT = "gradient"
CONTENT = "content"


@dataclass(frozen=True)
class ArraySpec:
    """An array's shape (H, W, C), the side of its chunks in px, and its dtype."""

    shape: tuple[int, int, int]
    chunk_px: int
    dtype: str


def slot_names(slot: int) -> tuple[str, str, str]:
    """The arrays that iteration j reads from slot j % 2, and writes to the other."""
    return f"canvas_{slot}", f"m_{slot}", f"v_{slot}"


def content_features_name(layer: str) -> str:
    """The array that keeps the content's features of `layer`."""
    return f"features_{layer}"


def gram_name(layer: str) -> str:
    """The array that keeps the style target of `layer`: (C, C) float64 in one chunk."""
    return f"gram_{layer}"


def stage_arrays(
    size: tuple[int, int], chunk_px: int, itemsize: int, content_widths: Mapping[str, int]
) -> dict[str, ArraySpec]:
    """Every array of pixels or features of a stage, by name.

    `size`: (height, width) in px. `itemsize`: bytes of a number of the state. `content_widths`: channels of each
    content layer.
    """
    height, width = size
    state = f"float{8 * itemsize}"
    arrays = {CONTENT: ArraySpec((height, width, 3), chunk_px, "uint8")}
    for name in (*slot_names(0), *slot_names(1), GRADIENT):
        arrays[name] = ArraySpec((height, width, 3), chunk_px, state)
    for layer, channels in content_widths.items():
        stride = LAYER_BY_NAME[layer].stride
        shape = (height // stride, width // stride, channels)
        arrays[content_features_name(layer)] = ArraySpec(shape, chunk_px // stride, state)
    return arrays
