"""Refuses sizes and images with which a run could not work, before anything is rendered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.config import Config
from pipeline.core.errors import ConfigError, InputError
from pipeline.core.text import stage_name
from pipeline.core.tiling import Size
from pipeline.core.vgg_layers import ceil_to, min_side_px
from pipeline.images import ImageHeader
from pipeline.plan.memory import StageWork
from pipeline.plan.sizes import canvas_shape, fit, size_of

# Chunks of an array, each a file, and so the most tiles of a pass: at 512 px that is 520,000×520,000 px.
MAX_CHUNKS = 2**20


def check_counts(config: Config, sizes: Sequence[tuple[Size, tuple[Size, ...]]]) -> None:
    """Raise ConfigError for more pixels or more chunks than a user can have meant."""
    (height, width), _ = sizes[-1]
    if (pixels := height * width) > config.limits.max_result_pixels:
        raise ConfigError(
            f"size: the result would be {width}×{height} px, which is {pixels:,} and beyond limits.max_result_pixels "
            f"({config.limits.max_result_pixels:,}). Choose a smaller size, or raise that limit."
        )
    chunk_px = config.store.chunk_px
    largest = max((size for canvas, styles in sizes for size in (canvas, *styles)), key=lambda size: size[0] * size[1])
    if (chunks := ceil_to(largest[0], chunk_px) * ceil_to(largest[1], chunk_px) // chunk_px**2) > MAX_CHUNKS:
        raise ConfigError(
            f"store.chunk_px: {largest[1]}×{largest[0]} px in chunks of {chunk_px} px are {chunks:,} files for every "
            f"array, more than the supported {MAX_CHUNKS:,}. Use larger chunks, or a smaller size."
        )


def check_overrides(config: Config, canvases_px: Sequence[int]) -> None:
    """Raise ConfigError for an entry of `stages` that matches no stage; `canvases_px`: each stage's long side."""
    for index, stage in enumerate(config.stages):
        above = config.stages[index - 1].up_to if index else 0
        if not any(above < long_px <= stage.up_to for long_px in canvases_px):
            sizes = ", ".join(map(str, dict.fromkeys(canvases_px)))
            raise ConfigError(
                f"stages.{index}: applies to canvases of {above + 1} to {stage.up_to} px, and this run has none, so "
                f"it would change nothing. Its stages have {sizes} px: change up_to, or remove the entry."
            )


def check_tile(config: Config, step_px: int) -> None:
    """Raise ConfigError for a tile that is not aligned at every scale; `step_px`: what its side is a multiple of."""
    tile_px = config.compute.tile_px
    if tile_px != "auto" and tile_px % step_px:
        raise ConfigError(
            f"compute.tile_px: {tile_px} is not a multiple of {step_px}, as loss.scales and chunks of "
            f"{config.store.chunk_px} px require: a pooling window of a coarse scale would lie in two tiles, and the "
            f"tiles would show. Use {ceil_to(tile_px, step_px)}, or compute.tile_px: auto."
        )


def check_image_sizes(work: StageWork, stage: int) -> None:
    """Raise InputError for a content or style that is too small for the deepest layer in use."""
    config = work.config
    images = [("content image", config.content, work.canvas, work.layer_use.names)]
    images += [
        ("style image", style.image, size, work.layer_use.style_layers)
        for style, size in zip(config.styles, work.styles, strict=True)
    ]
    for role, path, size, layers in images:
        minimum = min_side_px(layers, config.network.padding) if layers else 1
        if min(size) < minimum:
            raise InputError(
                f"{role} {path}: at {stage_name(stage)} it is {size[1]}×{size[0]} px, but the deepest layer in use "
                f"needs {minimum} px on each side ({config.network.padding} padding). Use a larger image, a larger "
                "initial_size, or shallower layers."
            )


def check_initial_image(config: Config, canvas: Size, images: Mapping[Path, ImageHeader]) -> None:
    """Raise InputError if `init` is an image of another aspect ratio than the canvas."""
    if not isinstance(config.init, Path):
        return
    height, width = size_of(images[config.init])
    # Rounding to whole pixels, and cropping by hand, may leave a difference of a pixel and a hundredth.
    if abs(fit((height, width), max(canvas))[0] - canvas[0]) > 1 + canvas[0] // 100:
        raise InputError(
            f"init {config.init}: has {width}×{height} px, which is another aspect ratio than the canvas's "
            f"({canvas[1]}×{canvas[0]} px), so it would be distorted. Crop it to that aspect ratio."
        )


def check_masks(config: Config, works: Sequence[StageWork], images: Mapping[Path, ImageHeader]) -> None:
    """Raise InputError for a mask of another aspect ratio than the content, whose regions it marks."""
    height, width = canvas_shape(config, images)
    for path in dict.fromkeys(path for work in works for path in work.config.masks):
        mask_height, mask_width = size_of(images[path])
        # Resizing a mask rounds one of its sides, so one side may be a pixel off.
        if min(abs(mask_height - height * mask_width / width), abs(mask_width - width * mask_height / height)) > 1:
            raise InputError(
                f"mask {path}: has {mask_width}×{mask_height} px, which is another aspect ratio than that of "
                f"{'the content' if config.content else 'the result'} ({width}×{height} px), so its regions would be "
                "distorted and shifted. Draw it over the image, at any size of the same aspect ratio."
            )
