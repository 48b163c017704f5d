"""The sizes of canvas and styles in every stage (algorithm.md, "Stages"), their scales, and the size on paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import TypeVar

from pipeline.config import MAX_ITERATIONS, MAX_SIDE_PX, AnyConfig, ApplyConfig, Config, PrintSize, StyleConfig
from pipeline.core.errors import ConfigError
from pipeline.core.lengths import DEFAULT_DPI, sensible_dpi
from pipeline.core.tiling import Size
from pipeline.core.vgg_layers import ALIGN_PX, ceil_to, min_side_px, receptive_field_px
from pipeline.images import ImageHeader
from pipeline.plan.network_cost import LayerUse, layer_names

# A stage that is enlarged by less than this for the next would have its work done twice.
_LEAST_STEP = 1.1
# The least short side of an automatic first stage: a panorama has a composition there too.
_LEAST_SHORT_PX = 64
# Stages of at least this long side have max_iterations: about twice the field that the network sees at once.
_COARSE_PX = 320

C = TypeVar("C", Config, ApplyConfig, AnyConfig)


def fit(size: Size, long_px: int) -> Size:
    """(height, width) of `size` scaled so that its long side is exactly `long_px`."""
    height, width = size
    scale = long_px / max(size)
    return (long_px, max(1, round(width * scale))) if height >= width else (max(1, round(height * scale)), long_px)


def stage_sizes(config: Config, images: Mapping[Path, ImageHeader]) -> Sequence[tuple[Size, tuple[Size, ...]]]:
    """(canvas size, style sizes) of every stage, each size as (height, width).

    The last stage is the first at which the canvas has the long side of the output image, and, with `style_stages`,
    every style its full size.
    """
    shape = canvas_shape(config, images)
    target = config.target_px or max(shape)
    ends = [target]
    if config.style_stages:
        ends += [_full_size_at_px(style, images) for style in config.for_stage(target).styles]
    stages = []
    for side_px in long_sides(initial_px(config, images), config.stage_ratio, target, max(ends)):
        long_px = side_px if config.style_stages else min(side_px, target)
        canvas = fit(shape, min(long_px, target))
        styles = config.for_stage(max(canvas)).styles
        stages.append((canvas, tuple(_style_size(style, images, long_px) for style in styles)))
    return stages


def stage_configs(config: Config, long_sides_px: Sequence[int]) -> list[Config]:
    """The config of every stage, with its own number of iterations.

    Colours and large forms arise in the small stages, where an iteration costs little: those before the last get
    `coarse_iterations` times as many, but no more than make them as expensive as a stage of `_COARSE_PX`. A number that
    `stages` gives to a size is what it says.
    """
    configs = []
    for index, long_px in enumerate(long_sides_px, start=1):
        own, entry = config.for_stage(long_px), config.override_at(long_px)
        given = (
            entry is not None and entry.optimizer is not None and "max_iterations" in entry.optimizer.model_fields_set
        )
        if not given and index < len(long_sides_px):
            factor = max(1.0, min(own.optimizer.coarse_iterations, (_COARSE_PX / long_px) ** 2))
            number = min(round(factor * own.optimizer.max_iterations), MAX_ITERATIONS)
            optimizer = own.optimizer.model_copy(update={"max_iterations": number})
            own = own.model_copy(update={"optimizer": optimizer})
        configs.append(own)
    return configs


def with_size_in_px(config: C, content: Size | None) -> C:
    """The config with `size` in px, and the resolution of a size on paper as export.dpi.

    `content`: its (height, width), None without a content. Raises ConfigError for a size that no image can have.
    """
    given = config.size
    if not isinstance(given, PrintSize):
        return config
    dpi = given.dpi or config.export.dpi or DEFAULT_DPI
    lengths = {name: getattr(given, name) for name in ("long_side", "width", "height")}
    sides_px = {name: length.px(dpi) for name, length in lengths.items() if length is not None}
    size: int | tuple[int, int]
    if content is None and len(sides_px) == 2:
        size = sides_px["width"], sides_px["height"]
    else:
        ((name, side_px),) = sides_px.items()
        size = side_px if content is None else _long_side_px(name, side_px, content)
    for side_px in size if isinstance(size, tuple) else (size,):
        if not ALIGN_PX <= side_px <= MAX_SIDE_PX:
            text = " and ".join(f"{name} {lengths[name]}" for name in sides_px)
            raise ConfigError(
                f"size: {text} at {dpi:g} dpi would be {side_px:,} px, but {ALIGN_PX} to {MAX_SIDE_PX:,} px are "
                "possible. Choose another size, or another dpi."
            )
    export = config.export.model_copy(update={"dpi": dpi})
    return config.model_copy(update={"size": size, "export": export})


def _long_side_px(name: str, side_px: int, content: Size) -> int:
    """The long side of a canvas with the content's aspect ratio that has `side_px` as its width, height or long side.

    `fit` gives the short side back exactly: it divides by more than this multiplies.
    """
    height, width = content
    if name == "width" and width < height:
        return round(side_px * height / width)
    return round(side_px * width / height) if name == "height" and height < width else side_px


def output_dpi(config: AnyConfig, canvas: Size, images: Mapping[Path, ImageHeader]) -> float:
    """The resolution of the output images: export.dpi, else that which gives the canvas the content's size on paper."""
    if config.export.dpi is not None:
        return config.export.dpi
    content = images[config.content] if config.content is not None else None
    if content is None or content.dpi is None:
        return DEFAULT_DPI
    return sensible_dpi(content.dpi * max(canvas) / max(size_of(content))) or DEFAULT_DPI


def initial_px(config: Config, images: Mapping[Path, ImageHeader]) -> int:
    """`initial_size` in px. `auto`: what one position of the deepest layer sees, so that it sees the composition.

    It is more where the short side of the canvas, or of a style, would be too small for the network, and never more
    than the output image.
    """
    if config.initial_size != "auto":
        return config.initial_size
    first, shape = config.for_first_stage, canvas_shape(config, images)
    style_layers, content_layers = layer_names(first)
    layers, padding = style_layers + content_layers, config.network.padding
    sides = [receptive_field_px(layers) // ALIGN_PX * ALIGN_PX]
    sides.append(_long_px(shape, max(_LEAST_SHORT_PX, min_side_px(layers, padding))))
    for style in first.styles if style_layers else ():
        size = size_of(images[style.image])
        needed_px = min(_long_px(size, min_side_px(style_layers, padding)), _largest_px(style, size))
        sides.append(ceil(needed_px / style.scale))
    return min(max(sides), config.target_px or max(shape))


def _long_px(size: Size, short_px: int) -> int:
    """The long side of `size` scaled so that its short side is `short_px`."""
    return ceil_to(short_px * max(size), min(size)) // min(size)


def long_sides(initial_px: int, ratio: float, *ends_px: int) -> list[int]:
    """round(r0·ratio^i) for i = 0, 1, … up to the first that reaches all of `ends_px`: the long sides of the stages.

    A stage that an end exceeds by less than a tenth is left out, because the next one repeats it, unless it is the
    first. The doubled sizes of a ratio of 2 are the paper's, and all kept.
    """
    sides, exact_px = [initial_px], float(initial_px)
    while sides[-1] < max(ends_px):
        exact_px *= ratio  # not a power, whose last bit depends on the machine's mathematical library
        sides.append(round(exact_px))
    if ratio == 2:
        return sides
    return sides[:1] + [side for side in sides[1:] if not any(side < end < _LEAST_STEP * side for end in ends_px)]


def canvas_shape(config: Config, images: Mapping[Path, ImageHeader]) -> Size:
    """(height, width) of the content, or of `size` without a content: the output image has its aspect ratio."""
    if config.content is not None:
        return size_of(images[config.content])
    width, height = config.size_px if isinstance(config.size_px, tuple) else (config.size_px, config.size_px)
    assert width is not None and height is not None  # the config requires a size where there is no content
    return height, width


def size_of(image: ImageHeader) -> Size:
    """(height, width) of an image."""
    return image.height_px, image.width_px


def _style_size(style: StyleConfig, images: Mapping[Path, ImageHeader], long_px: int) -> Size:
    """The size of a style in the stage of `long_px`; a style is never enlarged."""
    size = size_of(images[style.image])
    return fit(size, max(1, min(round(long_px * style.scale), _largest_px(style, size))))


def _largest_px(style: StyleConfig, size: Size) -> int:
    return min(max(size), style.max_size or max(size))


def _full_size_at_px(style: StyleConfig, images: Mapping[Path, ImageHeader]) -> int:
    """The long side of a canvas at which a style has its full size.

    A scale below 1 adds no stages: they would all have the full size of the canvas.
    """
    return ceil(_largest_px(style, size_of(images[style.image])) / max(style.scale, 1.0))


def scales_in_use(config: Config, layer_use: LayerUse, first_px: int, canvas: Size, styles: Sequence[Size]) -> int:
    """The scales of `loss.scales` that a stage uses: none is smaller than the first stage, or lacks a layer.

    `first_px`: the long side of the first stage.
    """
    padding, scales = config.network.padding, 1
    while scales < config.loss.scales and max(canvas) >= first_px << scales:
        scales += 1
    scales = fitting_scales(scales, canvas, layer_use.names, padding)
    for style in styles:
        scales = fitting_scales(scales, style, layer_use.style_layers, padding)
    return scales


def fitting_scales(scales: int, size: Size, layers: Sequence[str], padding: str) -> int:
    """The first of `scales` at which an image of this size has a position at every layer; at least one."""
    while scales > 1 and layers and min(size) >> scales - 1 < min_side_px(layers, padding):
        scales -= 1
    return scales
