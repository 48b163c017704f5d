"""Which arrays a stage has, and what they are called: one table for whoever makes, reads, checks or mends them."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.core.image_formats import PixelKind
from pipeline.core.vgg_layers import LAYER_BY_NAME, ceil_to
from pipeline.store.encodings import BFLOAT16, ENCODINGS, FIXED16

GRADIENT = "gradient"
CONTENT = "content"
ALPHA = "alpha"  # of the content, where it has one: (H, W, 1)
STYLE = "style"  # while the stage is prepared
METADATA = "zarr.json"  # of an array, and of the stage
CONTENT_GUIDE = "guide_content"
COLOR_AND_ALPHA = (slice(3), slice(3, 4))  # the channels of CONTENT and of ALPHA in an image that has both
_GRAM = re.compile(r"gram_((conv[1-5]_[1-9])(_r[0-9]+)?)")
_GUIDE = re.compile(rf"guide_[0-9]+|{CONTENT_GUIDE}")


@dataclass(frozen=True)
class ArraySpec:
    """An array's shape (H, W, C), the side of its chunks in px, and the form of its numbers.

    `form`: a numpy dtype, or the name of one of formats.ENCODINGS.
    """

    shape: tuple[int, int, int]
    chunk_px: int
    form: str

    @property
    def stored_bytes(self) -> int:
        """Bytes on disk, uncompressed; chunks at the far border are stored whole."""
        itemsize = 2 if self.form in ENCODINGS else np.dtype(self.form).itemsize
        return self.chunks * self.chunk_px**2 * self.shape[2] * itemsize

    @property
    def chunks(self) -> int:
        """How many it has, each a file."""
        height, width, _ = self.shape
        return ceil_to(height, self.chunk_px) * ceil_to(width, self.chunk_px) // self.chunk_px**2


def slot_names(slot: int, *, averaged: bool = False) -> tuple[str, ...]:
    """The arrays that iteration j reads from slot j % 2, and writes to the other: the canvas, m and v.

    `averaged`: the stage has the average of its canvases too, the last of them.
    """
    names = f"canvas_{slot}", f"m_{slot}", f"v_{slot}"
    return (*names, f"average_{slot}") if averaged else names


def is_averaged(names: Container[str]) -> bool:
    """Whether a stage that has not ended, of arrays or checksums of these names, averages its canvases."""
    return "average_0" in names


def result_name(slot: int, names: Container[str]) -> str:
    """The array that is a stage's result, of those named: the newest slot's canvas, or its average if there is one."""
    average = f"average_{slot}"
    return average if average in names else f"canvas_{slot}"


def kept_files(slot: int, names: Container[str]) -> tuple[str, ...]:
    """What is left of a stage when it has ended: its result, the content's alpha, their metadata and the stage's."""
    kept = [result_name(slot, names), *((ALPHA,) if ALPHA in names else ())]
    return (*kept, *(f"{name}/{METADATA}" for name in kept), METADATA)


def content_features_name(layer: str) -> str:
    """The array that keeps the content's features of `layer`."""
    return f"features_{layer}"


def style_key(layer: str, region: int) -> str:
    """The name of a style term where regions have their own; where they have not, it is the layer's (regions.py)."""
    return f"{layer}_r{region}"


def layer_of(key: str) -> str:
    """The layer of a style key."""
    return key.partition("_r")[0]


def gram_name(key: str) -> str:
    """The array that keeps the style target of a style key: (C, C) float64 in one chunk."""
    return f"gram_{key}"


def gram_key(name: str) -> str | None:
    """The style key whose target the array `name` keeps, or None if it is another array."""
    found = _GRAM.fullmatch(name)
    return found[1] if found and found[2] in LAYER_BY_NAME else None


def guide_name(mask: int) -> str:
    """The array that keeps a mask of the styles, by its number in the stage."""
    return f"guide_{mask}"


def is_guide(name: str) -> bool:
    """Whether the array `name` keeps a mask, or the map of the content's weight."""
    return _GUIDE.fullmatch(name) is not None


def is_stage_array(name: str) -> bool:
    """Whether a stage has, at some time, an array of this name."""
    features, _, layer = name.partition("_")
    state = (*slot_names(0, averaged=True), *slot_names(1, averaged=True), CONTENT, ALPHA, STYLE, GRADIENT)
    known = name in state or gram_key(name) is not None or is_guide(name)
    return known or (features == "features" and layer in LAYER_BY_NAME)


def stage_arrays(
    size: tuple[int, int],
    chunk_px: int,
    state: str,
    content_widths: Mapping[str, int],
    averaged: bool,
    content: PixelKind | None,
    guides: Sequence[str] = (),
) -> dict[str, ArraySpec]:
    """Every array of pixels or features of a stage, by name.

    `size`: (height, width) in px. `state`: float32, float64 or compact. `content_widths`: channels of each content
    layer. `averaged`: with the average of its canvases. `content`: None, where there is none. `guides`: the arrays of
    masks. Bytes per px of two slots of canvas, m and v, and of the gradient: 84, 168 or 42, with averages 108, 216 or
    54; the content takes 3 to 8 more, and a mask 1.
    """
    height, width = size
    canvas_form, form = (FIXED16.name, BFLOAT16.name) if state == "compact" else (state, state)
    arrays: dict[str, ArraySpec] = {}
    if content is not None:
        pixels = "uint8" if content.bits == 8 else FIXED16.name
        planes = ((CONTENT, 3), (ALPHA, 1)) if content.alpha else ((CONTENT, 3),)
        arrays |= {name: ArraySpec((height, width, channels), chunk_px, pixels) for name, channels in planes}
    for canvas, m, v, *average in (slot_names(slot, averaged=averaged) for slot in (0, 1)):
        arrays |= dict.fromkeys((canvas, *average), ArraySpec((height, width, 3), chunk_px, canvas_form))
        arrays[m] = arrays[v] = ArraySpec((height, width, 3), chunk_px, form)
    arrays[GRADIENT] = ArraySpec((height, width, 3), chunk_px, form)
    for layer, channels in content_widths.items():
        stride = LAYER_BY_NAME[layer].stride
        shape = (height // stride, width // stride, channels)
        arrays[content_features_name(layer)] = ArraySpec(shape, chunk_px // stride, form)
    arrays |= {name: ArraySpec((height, width, 1), chunk_px, "uint8") for name in guides}
    return arrays
