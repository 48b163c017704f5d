"""Preparing a stage: its arrays on disk, its inputs, the style targets, and the canvas it starts from."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline import store
from pipeline.config.regions import regions_of
from pipeline.core.allocator import trim_heap
from pipeline.core.errors import ConfigError, InputError, storage
from pipeline.core.tiling import Size, grid
from pipeline.losses import color as colors
from pipeline.losses import objective
from pipeline.losses.objective import Gram
from pipeline.plan.plan import arrays_of
from pipeline.render import color_tasks, ingest, mask_tasks, resample, tile_tasks
from pipeline.render.stage import Stage, merged, positions
from pipeline.store import integrity, metadata
from pipeline.store.layout import (
    ALPHA,
    CONTENT,
    CONTENT_GUIDE,
    STYLE,
    content_features_name,
    gram_name,
    guide_name,
)


@dataclass(frozen=True)
class Prepared:
    """What a stage starts from: each content layer's energy ‖φ_l(o)‖², and the checksums of all that was written.

    `areas`: n_r,l by style key, where there are regions (guidance.py).
    """

    content_energies: Mapping[str, float]
    checksums: Mapping[str, str]
    areas: Mapping[str, float]


def prepare(
    stage: Stage,
    previous_canvas: store.StageArray | None,
    content_colors: colors.ColorStatistics | None = None,
    *,
    is_part: bool = False,
) -> Prepared:
    """Make all arrays of the stage, and fill its inputs and slot 0.

    `previous_canvas`: the result of the stage before, or None for the first. `content_colors`: of the whole
    content, if the stage's own is a part of it. `is_part`: the stage is a part of a picture, where masks may be black.
    May be repeated from the start.
    Raises StorageError, InputError for a broken image or a mask that is black, ConfigError for features that are not
    numbers, ChunkError if the previous canvas is damaged.
    """
    trim_heap()
    with storage(stage.partial_dir):
        return _prepare(stage, stage.partial_dir, previous_canvas, content_colors, is_part)


def _prepare(
    stage: Stage,
    folder: Path,
    previous_canvas: store.StageArray | None,
    content_colors: colors.ColorStatistics | None,
    is_part: bool,
) -> Prepared:
    if previous_canvas is not None:
        integrity.require_intact([previous_canvas], stage.engine, stage.told("check"))
    store.create_stage(folder)
    _create_arrays(stage, folder)
    sums = {} if stage.config.content is None else _ingest_content(stage, folder)
    sums |= ingest_guides(stage, folder, stage.layer_use.guides.arrays)
    areas = _areas(stage, folder, sums)
    if not is_part:
        _refuse_nowhere(stage, areas)
    sums |= _store_style_targets(stage, folder, sums.get(CONTENT), content_colors)
    sums["canvas_0"] = _start_canvas(stage, folder, previous_canvas, sums)
    sums |= {name: store.open_array(folder, name).packed_zeros() for name in ("m_0", "v_0")}
    if stage.config.optimizer.average:
        sums["average_0"] = _start_average(stage, folder, sums)
    energies, feature_sums = _content_pass(stage, folder, sums)
    sums |= feature_sums | metadata.metadata_checksums(folder)
    store.commit_stage(folder, stage.stage_dir)
    return Prepared(energies, sums, areas)


def _create_arrays(stage: Stage, folder: Path) -> None:
    for name, array in arrays_of(stage.config, stage.plan.size, stage.layer_use, stage.plan.content).items():
        store.create_array(folder, name, array.shape, array.chunk_px, array.form, stage.config.store.codec)


def _ingest_content(stage: Stage, folder: Path) -> dict[str, str]:
    """The content's colours, on white where it is transparent, and its alpha; gives their checksums."""
    assert stage.config.content is not None and stage.plan.content is not None
    names = [CONTENT, ALPHA] if stage.plan.content.alpha else [CONTENT]
    planes = [store.open_array(folder, name) for name in names]
    sums = ingest.ingest_planes(stage.config.content, planes, stage.engine, stage.told("content"))
    return dict(zip(names, sums, strict=True))


def ingest_guides(stage: Stage, folder: Path, names: Collection[str]) -> dict[str, str]:
    """Reads these masks into arrays of `folder`, resized to their size; gives their checksums."""
    files = {guide_name(index): region.mask for index, region in enumerate(regions_of(stage.config.styles))}
    files[CONTENT_GUIDE] = stage.config.loss.content_mask
    sums = {}
    for name in names:
        path, array = files[name], store.open_array(folder, name)
        assert path is not None
        sums[name] = ingest.ingest(path, array, stage.engine, stage.told("mask"))
    return sums


def _areas(stage: Stage, folder: Path, checksums: Mapping[str, str]) -> dict[str, float]:
    """n_r,l by style key."""
    guides, layers = stage.layer_use.guides, stage.layer_use.style_layers
    if not guides.regions:
        return {}
    specs = [mask_tasks.AreaSpec(folder, tile, guides, layers, checksums) for tile in stage.tiles]
    results = stage.engine.map(mask_tasks.area_task, specs)
    return {key: math.fsum(result.get(key, 0.0) for result in results) for key in stage.layer_use.style_keys}


def _refuse_nowhere(stage: Stage, areas: Mapping[str, float]) -> None:
    """Raise InputError for a region that is nowhere."""
    guides, layers = stage.layer_use.guides, stage.layer_use.style_layers
    for number, region in enumerate(regions_of(stage.config.styles) if guides.regions else ()):
        if not any(areas[guides.keys(layer)[number]] for layer in layers):
            image = stage.config.styles[region.styles[0]].image
            what = f"mask {region.mask}: is black" if region.mask else "styles without a mask: the masks are white"
            raise InputError(
                f"{what} all over stage {stage.plan.index} ({stage.plan.size[1]}×{stage.plan.size[0]} px), so that "
                f"{image} would paint nothing. Draw the masks otherwise, leave this style out (stages: can "
                "do so for the small ones alone), or begin with a larger initial_size."
            )


def _store_style_targets(
    stage: Stage, folder: Path, content_sums: str | None, content_colors: colors.ColorStatistics | None = None
) -> dict[str, str]:
    """Writes, for every layer, the mean Gram of all styles, or of those of each region; gives the checksums."""
    if not stage.layer_use.style_layers:
        return {}
    style_map = _style_map(stage, folder, content_sums, content_colors)
    grams: list[dict[str, Gram]] = []
    for style, size in zip(stage.config.styles, stage.plan.style_sizes, strict=True):
        sums = {STYLE: _ingest_aside(stage, folder, style.image, size)}
        seen = style_map(store.open_array(folder, STYLE, sums[STYLE]))
        specs = [
            tile_tasks.GramSpec(folder, STYLE, tile, stage.network, sums, stage.layer_use.style_layers, color=seen)
            for tile in grid(*size, stage.tile_px)
        ]
        totals = stage.gram_sums(specs, "style Gram")
        grams.append({layer: total / positions(size, layer) for layer, total in totals.items()})
        store.delete_array(folder, STYLE)
    written: dict[str, str] = {}
    for layer in stage.layer_use.style_layers:
        for key, region in zip(stage.layer_use.guides.keys(layer), regions_of(stage.config.styles), strict=True):
            weights = [stage.config.styles[index].weight for index in region.styles]
            target = objective.mean_gram([grams[index][layer] for index in region.styles], weights)
            _check_finite(stage, float(target.sum()), "style", layer)
            written[gram_name(key)] = metadata.write_gram(folder, key, target)
    return written


def _ingest_aside(stage: Stage, folder: Path, image: Path, size: Size) -> str:
    """An image that only the preparation needs, as the array STYLE; gives its packed checksums."""
    settings = stage.config.store
    store.create_array(folder, STYLE, (*size, 3), settings.chunk_px, "uint8", settings.codec)
    return ingest.ingest(image, store.open_array(folder, STYLE), stage.engine, stage.told("style"))


def _style_map(
    stage: Stage, folder: Path, content_sums: str | None, content_colors: colors.ColorStatistics | None
) -> Callable[[store.StageArray], colors.ColorMap | None]:
    """Gives, for a style in the store, what the network sees of it."""
    color = stage.config.color
    if color == "style":
        return lambda style: None
    content = content_colors or color_tasks.statistics(store.open_array(folder, CONTENT, content_sums), stage.engine)
    return lambda style: colors.style_map(color, color_tasks.statistics(style, stage.engine), content)


def _start_canvas(
    stage: Stage, folder: Path, previous_canvas: store.StageArray | None, checksums: Mapping[str, str]
) -> str:
    """Fills slot 0; gives its checksums."""
    if stage.config.color != "luminance":
        return _fill_canvas(stage, folder, "canvas_0", previous_canvas, checksums)
    # by way of the other slot, whose content is nobody's: in place, a task done again would find its own result
    started = _fill_canvas(stage, folder, "canvas_1", previous_canvas, checksums)
    content = store.open_array(folder, CONTENT, checksums[CONTENT])
    source, target = store.open_array(folder, "canvas_1", started), store.open_array(folder, "canvas_0")
    return color_tasks.recolor(source, content, target, stage.engine)


def _fill_canvas(
    stage: Stage, folder: Path, name: str, previous_canvas: store.StageArray | None, checksums: Mapping[str, str]
) -> str:
    canvas, init = store.open_array(folder, name), stage.config.init
    if previous_canvas is not None:
        return resample.enlarge(
            resample.whole(previous_canvas), resample.whole(canvas), stage.engine, stage.told("canvas")
        )
    if isinstance(init, Path):
        picture = store.open_array(folder, STYLE, _ingest_aside(stage, folder, init, stage.plan.size))
        sums = resample.enlarge(resample.whole(picture), resample.whole(canvas), stage.engine, stage.told("canvas"))
        store.delete_array(folder, STYLE)
        return sums
    if init == "content":
        content = store.open_array(folder, CONTENT, checksums[CONTENT])
        return resample.enlarge(resample.whole(content), resample.whole(canvas), stage.engine, stage.told("canvas"))
    start = tile_tasks.initial_noise if init == "noise" else tile_tasks.initial_gray
    return canvas.packed(
        {
            (cy, cx): canvas.write_chunk(cy, cx, start(stage.config.seed, canvas, cy, cx))
            for cy, cx in stage.engine.checked(canvas.chunk_indices())
        }
    )


def _start_average(stage: Stage, folder: Path, checksums: Mapping[str, str]) -> str:
    """The canvas itself: the result of a stage that makes no step. The first step writes over it."""
    canvas = store.open_array(folder, "canvas_0", checksums["canvas_0"])
    return resample.enlarge(
        resample.whole(canvas),
        resample.whole(store.open_array(folder, "average_0")),
        stage.engine,
        stage.told("average"),
    )


def _content_pass(stage: Stage, folder: Path, checksums: Mapping[str, str]) -> tuple[dict[str, float], dict[str, str]]:
    """(‖φ_l(o)‖² of each content layer, checksums of its features)."""
    layers = stage.layer_use.content_layers
    if not layers:
        return {}, {}
    specs = [
        tile_tasks.ContentSpec(folder, "content", tile, stage.network, checksums, layers, color=stage.color)
        for tile in stage.tiles
    ]
    results = stage.engine.map(tile_tasks.content_task, specs, stage.counter("content features", len(specs)))
    energies, packed = {}, {}
    for layer in layers:
        energies[layer] = math.fsum(result.energies.get(layer, 0.0) for result in results)
        _check_finite(stage, energies[layer], "content", layer)
        name = content_features_name(layer)
        sums = merged(result.sums.get(layer, {}) for result in results)
        packed[name] = store.open_array(folder, name).packed(sums)
    return energies, packed


def _check_finite(stage: Stage, total: float, which: str, layer: str) -> None:
    if not math.isfinite(total):
        raise ConfigError(
            f"the {which} image's features at {layer} are not finite: the network's weights are not, or "
            f"compute.dtype {stage.network.dtype} overflows with them. Use other weights, or float32."
        )
