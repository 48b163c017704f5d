"""The style targets of a stage: the mean Gram matrices of its styles, by layer and mask region.

A style's transparent parts have no weight: its alpha is the weight of each position, as a mask's is on the canvas
(losses/masks.py). One style at a time is in the store; only the Gram matrices of all of them are needed together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipeline import images, store
from pipeline.config import regions_of
from pipeline.core.errors import ConfigError, InputError
from pipeline.core.text import stage_name
from pipeline.core.tiling import Size, Tile, grid
from pipeline.losses import color as colors
from pipeline.losses import objective
from pipeline.losses.color import ColorMap, ColorStatistics
from pipeline.losses.objective import Gram
from pipeline.network.cache import wider
from pipeline.render import color_tasks, ingest
from pipeline.render.stage import Stage, positions
from pipeline.store import CONTENT, STYLE, UNGUIDED, Guides, gram_name, guide_name, metadata


def store_style_targets(
    stage: Stage, folder: Path, content_sums: str | None, content_colors: ColorStatistics | None
) -> dict[str, str]:
    """Write the targets of a stage that is prepared in `folder`; gives their checksums.

    `content_sums`: checksums of the content. `content_colors`: see preparation.prepare. Raises InputError for a broken
    or a wholly transparent style, ConfigError for features that are not finite.
    """
    if not stage.layer_use.style_layers:
        return {}
    content = _content_colors(stage, folder, content_sums, content_colors)
    grams = [
        _mean_grams(stage, folder, image, size, content)
        for image, size in zip([style.image for style in stage.config.styles], stage.plan.style_sizes, strict=True)
    ]
    written: dict[str, str] = {}
    for layer in stage.layer_use.style_layer_keys:
        for key, region in zip(stage.layer_use.guides.keys(layer), regions_of(stage.config.styles), strict=True):
            weights = [stage.config.styles[index].weight for index in region.styles]
            target = objective.mean_gram([grams[index][layer] for index in region.styles], weights)
            check_finite(stage, float(target.sum()), "style", layer)
            written[gram_name(key)] = metadata.write_gram(folder, key, target)
    return written


def check_finite(stage: Stage, total: float, which: str, layer: str) -> None:
    """Raise ConfigError if a sum over an image's features is not finite."""
    if not math.isfinite(total):
        raise ConfigError(
            f"the {which} image's features at {layer} are not finite: compute.dtype {stage.network.dtype} overflows "
            f"with the network's weights. Use {wider(stage.network.dtype)}other weights."
        )


def ingest_aside(stage: Stage, folder: Path, image: Path, size: Size) -> str:
    """Ingest an image that only the preparation needs as the array STYLE; gives its packed checksums."""
    array, colors = _new_array(stage, folder, STYLE, (*size, 3)), ingest.canvas_colors(stage.config)
    return ingest.ingest(image, array, stage.executor, stage.reporter("style"), colors)


def _new_array(stage: Stage, folder: Path, name: str, shape: tuple[int, int, int]) -> store.StageArray:
    settings = stage.config.store
    store.create_array(folder, name, shape, settings.chunk_px, "uint8", settings.codec)
    return store.open_array(folder, name)


def _content_colors(
    stage: Stage, folder: Path, content_sums: str | None, content_colors: ColorStatistics | None
) -> ColorStatistics | None:
    """The colours of the whole content; None where the styles keep their own."""
    if stage.config.color == "style":
        return None
    # of the whole content: in a crop, the colours of its region would change the style
    return content_colors or color_tasks.statistics(store.open_array(folder, CONTENT, content_sums), stage.executor)


@dataclass(frozen=True)
class _StyleImage:
    """A style in the store: the checksums of its arrays, and its alpha as a guide if it has alpha."""

    size: Size
    checksums: Mapping[str, str]
    guides: Guides = field(default=UNGUIDED)

    def array(self, folder: Path, name: str) -> store.StageArray:
        return store.open_array(folder, name, self.checksums[name])


def _ingested(stage: Stage, folder: Path, image: Path, size: Size) -> _StyleImage:
    if not images.read_header(image, stage.config.limits).kind.alpha:
        return _StyleImage(size, {STYLE: ingest_aside(stage, folder, image, size)})
    # numbered after the masks of the canvas, which are in the same folder
    guides = Guides(1, first=stage.layer_use.guides.masks)
    names = (STYLE, *guides.arrays)
    planes = [_new_array(stage, folder, name, (*size, channels)) for name, channels in zip(names, (3, 1), strict=True)]
    colors = ingest.canvas_colors(stage.config)
    sums = ingest.ingest_planes(image, planes, stage.executor, stage.reporter("style"), colors)
    return _StyleImage(size, dict(zip(names, sums, strict=True)), guides)


def _mean_grams(
    stage: Stage, folder: Path, image: Path, size: Size, content: ColorStatistics | None
) -> dict[str, Gram]:
    """The mean Gram matrices of one style, by layer."""
    style = _ingested(stage, folder, image, size)
    tiles = grid(*size, stage.tile_px)
    areas = _areas(stage, folder, style, tiles)
    if not all(areas.values()):
        raise InputError(
            f"{image}: is transparent all over, at {size[1]}×{size[0]} px in {stage_name(stage.plan.index)}, so that "
            "it has no style. Use an image that is not, or one without alpha."
        )
    color_map = _color_map(stage, folder, style, content)
    specs = stage.gram_specs(folder, STYLE, tiles, style.checksums, color_map, style.guides)
    totals = stage.gram_sums(specs, "style Gram")
    for name in style.checksums:
        store.delete_array(folder, name)
    keys = stage.layer_use.style_layer_keys
    return {layer: totals[key] / areas[key] for layer in keys for key in style.guides.keys(layer)}


def _areas(stage: Stage, folder: Path, style: _StyleImage, tiles: tuple[Tile, ...]) -> dict[str, float]:
    """The positions of each layer, by style key; with alpha the sums of their weights."""
    if style.guides.arrays:
        return stage.mask_areas(folder, tiles, style.guides, style.checksums)
    return {key: positions(style.size, key) for key in stage.layer_use.style_layer_keys}


def _color_map(stage: Stage, folder: Path, style: _StyleImage, content: ColorStatistics | None) -> ColorMap | None:
    """The colour map that is applied to the style's pixels before the network."""
    if content is None:
        return None
    alpha = style.array(folder, guide_name(style.guides.first)) if style.guides.arrays else None
    own = color_tasks.statistics(style.array(folder, STYLE), stage.executor, alpha)
    return (colors.matched_colors if stage.config.color == "content" else colors.matched_luminance)(own, content)
