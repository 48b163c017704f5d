"""The sizes of canvas and styles in every stage (algorithm.md, "Stages")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path

from pipeline.config import Config, StyleConfig
from pipeline.core.tiling import Size
from pipeline.images import ImageHeader


def fit(size: Size, long_px: int) -> Size:
    """(height, width) of `size` scaled so that its long side is exactly `long_px`."""
    height, width = size
    scale = long_px / max(size)
    return (long_px, max(1, round(width * scale))) if height >= width else (max(1, round(height * scale)), long_px)


def stage_sizes(config: Config, images: Mapping[Path, ImageHeader]) -> Sequence[tuple[Size, tuple[Size, ...]]]:
    """(canvas size, style sizes) of every stage, each size as (height, width).

    There are K + 1 stages. K is the smallest number for which r0·2^K reaches the long side of the output image, and
    at which every style of the last stage has its full size.
    """
    shape = canvas_shape(config, images)
    target = config.target_px or max(shape)
    longest = max(target, *(_full_size_at_px(style, images) for style in config.for_stage(target).styles), 0)
    stages, long_px = [], config.initial_size
    while True:
        canvas = fit(shape, min(long_px, target))
        styles = config.for_stage(max(canvas)).styles
        stages.append((canvas, tuple(_style_size(style, images, long_px) for style in styles)))
        if long_px >= longest:
            return stages
        long_px *= 2


def canvas_shape(config: Config, images: Mapping[Path, ImageHeader]) -> Size:
    """(height, width) of the content, or of `size` without a content: the output image has its aspect ratio."""
    if config.content is not None:
        return size_of(images[config.content])
    width, height = config.size if isinstance(config.size, tuple) else (config.size, config.size)
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
