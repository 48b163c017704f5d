"""The names and shapes of a stage's arrays, shared by all code that creates, reads, verifies or repairs them."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.core.image_formats import RGB8, PixelKind
from pipeline.core.tiling import tile_step_px
from pipeline.core.vgg_layers import LAYER_BY_NAME, ceil_to
from pipeline.store.encodings import BFLOAT16, ENCODINGS, FIXED16

GRADIENT = "gradient"
CONTENT = "content"
ALPHA = "alpha"  # of the content, if it has alpha: (H, W, 1)
STYLE = "style"  # only while the stage is prepared
METADATA = "zarr.json"  # of an array, and of the stage
CONTENT_GUIDE = "guide_content"
# Aids for viewers, beside the arrays: no state, and no run or check depends on them.
OVERVIEW = ".overview"  # behind the name of a canvas: the file with its overview, at 1/OVERVIEW_PX
OVERVIEW_PX = 8
OVERVIEW_SUMS_BYTES = 8  # at the start of each of its records
TILE_LOSSES = "tile_losses.json"  # the losses of the newest iteration, tile by tile
COLOR_AND_ALPHA = (slice(3), slice(3, 4))  # the channels of CONTENT and of ALPHA in an RGBA image
_LAYER = r"(conv[1-5]_[1-9])(_s[1-9])?"  # a layer key
_GRAM = re.compile(rf"gram_({_LAYER}(_r[0-9]+)?)")
_FEATURES = re.compile(rf"features_{_LAYER}")
_GUIDE = re.compile(rf"guide_[0-9]+|{CONTENT_GUIDE}")
_ACTIVATIONS = re.compile(r"((?:activations|skip)_[0-9]+_)([01])")


@dataclass(frozen=True)
class ArraySpec:
    """An array's shape (H, W, C), the side of its chunks in px, and the storage form of its numbers.

    `form`: a numpy dtype, or the name of one of encodings.ENCODINGS.
    """

    shape: tuple[int, int, int]
    chunk_px: int
    form: str

    @property
    def stored_bytes(self) -> int:
        """Bytes on disk, uncompressed; chunks at the far border are stored at full size."""
        itemsize = 2 if self.form in ENCODINGS else np.dtype(self.form).itemsize
        return self.chunks * self.chunk_px**2 * self.shape[2] * itemsize

    @property
    def chunks(self) -> int:
        """Number of chunks, each a file."""
        height, width, _ = self.shape
        return ceil_to(height, self.chunk_px) * ceil_to(width, self.chunk_px) // self.chunk_px**2


def is_aid(name: str) -> bool:
    """Whether a stage can have an aid for viewers of this name."""
    return name == TILE_LOSSES or (name.endswith(OVERVIEW) and is_stage_array(name.removesuffix(OVERVIEW)))


def overviews_bytes(size: tuple[int, int], chunk_px: int) -> int:
    """Bytes of both overviews of a stage with a canvas of this (height, width)."""
    chunks = ceil_to(size[0], chunk_px) * ceil_to(size[1], chunk_px) // chunk_px**2
    return 2 * chunks * (OVERVIEW_SUMS_BYTES + 3 * (chunk_px // OVERVIEW_PX) ** 2)


def slot_names(slot: int, *, averaged: bool = False) -> tuple[str, ...]:
    """The arrays of a slot: the canvas, m and v, and with `averaged` the running average of the canvases, last.

    Iteration j reads slot j % 2 and writes the other one.
    """
    names = f"canvas_{slot}", f"m_{slot}", f"v_{slot}"
    return (*names, f"average_{slot}") if averaged else names


def is_averaged(names: Container[str]) -> bool:
    """Whether an unfinished stage with arrays or checksums of these names averages its canvases."""
    return "average_0" in names


def resident_names(names: Iterable[str]) -> list[str]:
    """The arrays among `names` that an iteration reads or writes, except for masks: what a stage in memory holds."""
    state = {*slot_names(0, averaged=True), *slot_names(1, averaged=True), GRADIENT}
    return [name for name in names if name in state or _FEATURES.fullmatch(name)]


def result_name(slot: int, names: Container[str]) -> str:
    """The array with a stage's result: the average of the newest slot if it is among `names`, else its canvas.

    Of `apply` it is the content, until its last pass has written a canvas: to slot 1.
    """
    average, canvas = f"average_{slot}", f"canvas_{slot}"
    if average in names:
        return average
    return CONTENT if slot == 0 and canvas not in names and CONTENT in names else canvas


def kept_files(slot: int, names: Container[str], *, moments: bool = False) -> tuple[str, ...]:
    """What a finished stage retains: its result, the content's alpha, their metadata and the stage's.

    `moments`: m and v too, with which the next stage starts.
    """
    retained = [result_name(slot, names), *((ALPHA,) if ALPHA in names else ())]
    retained += [f"m_{slot}", f"v_{slot}"] if moments else []
    return (*retained, *(f"{name}/{METADATA}" for name in retained), METADATA)


def layer_key(layer: str, scale: int) -> str:
    """The key of a layer at a scale, of the canvas shrunk by 2^scale; at scale 0 the layer's name."""
    return f"{layer}_s{scale}" if scale else layer


def content_features_name(key: str) -> str:
    """The array of the content's features of a layer key."""
    return f"features_{key}"


def style_key(key: str, region: int) -> str:
    """The key of the style term of one region at a layer key; without regions, it is the layer key."""
    return f"{key}_r{region}"


def layer_of(key: str) -> str:
    """The layer of a layer key or style key."""
    return key.partition("_r")[0].partition("_s")[0]


def scale_of(key: str) -> int:
    """The scale of a layer key or style key."""
    return int(key.partition("_r")[0].partition("_s")[2] or 0)


def gram_name(key: str) -> str:
    """The array of the style target of a style key: (C, C) float64 in one chunk."""
    return f"gram_{key}"


def gram_key(name: str) -> str | None:
    """The style key whose target is the array `name`, or None for other arrays."""
    match = _GRAM.fullmatch(name)
    return match[1] if match and match[2] in LAYER_BY_NAME else None


def guide_name(mask: int) -> str:
    """The array of a style mask, by its number in the stage."""
    return f"guide_{mask}"


def activations_name(network: int, slot: int) -> str:
    """The array of a feature map of a network of `apply`, before its norm."""
    return f"activations_{network}_{slot}"


def skip_name(network: int, slot: int) -> str:
    """The array of the input of a residual block of a network of `apply`."""
    return f"skip_{network}_{slot}"


def other_slot(name: str) -> str | None:
    """The other slot of an array of activations, whose content is not used once this one is written; else None."""
    match = _ACTIVATIONS.fullmatch(name)
    return f"{match[1]}{1 - int(match[2])}" if match else None


def is_stage_array(name: str) -> bool:
    """Whether a stage can have an array of this name."""
    features = _FEATURES.fullmatch(name)
    state = (*slot_names(0, averaged=True), *slot_names(1, averaged=True), CONTENT, ALPHA, STYLE, GRADIENT)
    if name in state or gram_key(name) is not None or _GUIDE.fullmatch(name) or _ACTIVATIONS.fullmatch(name):
        return True
    return features is not None and features[1] in LAYER_BY_NAME


@dataclass(frozen=True)
class StageLayout:
    """What determines the arrays of pixels and features of a stage.

    `size`: (height, width) in px. `state`: float32, float64 or compact. `content_widths`: channels of the content
    features, by layer key. `averaged`: with running averages of the canvas. `content`: None for a texture. `guides`:
    the mask arrays.
    """

    size: tuple[int, int]
    chunk_px: int
    state: str
    content_widths: Mapping[str, int]
    averaged: bool = False
    content: PixelKind | None = RGB8
    guides: Sequence[str] = ()

    def arrays(self) -> dict[str, ArraySpec]:
        """Every array by name.

        The two slots and the gradient take 84, 168 or 42 bytes per px, with averages 108, 216 or 54; the content takes
        3 to 8 more, and each mask 1.
        """
        (height, width), chunk_px = self.size, self.chunk_px
        canvas_form, form = (FIXED16.name, BFLOAT16.name) if self.state == "compact" else (self.state, self.state)
        arrays: dict[str, ArraySpec] = {}
        if self.content is not None:
            pixels = "uint8" if self.content.bits == 8 else FIXED16.name
            planes = ((CONTENT, 3), (ALPHA, 1)) if self.content.alpha else ((CONTENT, 3),)
            arrays |= {name: ArraySpec((height, width, channels), chunk_px, pixels) for name, channels in planes}
        for canvas, m, v, *average in (slot_names(slot, averaged=self.averaged) for slot in (0, 1)):
            arrays |= dict.fromkeys((canvas, *average), ArraySpec((height, width, 3), chunk_px, canvas_form))
            arrays[m] = arrays[v] = ArraySpec((height, width, 3), chunk_px, form)
        arrays[GRADIENT] = ArraySpec((height, width, 3), chunk_px, form)
        for key, channels in self.content_widths.items():
            scale, stride = scale_of(key), LAYER_BY_NAME[layer_of(key)].stride
            shape = ((height >> scale) // stride, (width >> scale) // stride, channels)
            # a tile of any size that this scale allows must cover whole chunks
            side_px = tile_step_px(chunk_px, scale + 1) >> scale
            arrays[content_features_name(key)] = ArraySpec(shape, side_px // stride, form)
        arrays |= {name: ArraySpec((height, width, 1), chunk_px, "uint8") for name in self.guides}
        return arrays
