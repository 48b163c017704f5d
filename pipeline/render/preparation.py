"""Prepares a stage: creates its arrays, ingests its inputs, computes the style targets, fills the first canvas."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import store
from pipeline.config import InitNetwork, InitWct, regions_of
from pipeline.core.allocator import trim_heap
from pipeline.core.errors import ConfigError, InputError, storage
from pipeline.core.text import stage_name
from pipeline.losses import color as colors
from pipeline.plan import arrays_of
from pipeline.render import color_tasks, ingest, resample, tile_specs, tile_tasks
from pipeline.render.stage import Stage
from pipeline.render.style_targets import check_finite, ingest_aside, store_style_targets
from pipeline.store import (
    ALPHA,
    CONTENT,
    CONTENT_GUIDE,
    STYLE,
    ChunkSums,
    StageArray,
    content_features_name,
    guide_name,
    integrity,
    merged,
    metadata,
)

# Fills an array of a folder, given the checksums of its content; gives the array's own.
FirstCanvas = Callable[[Path, str, Mapping[str, str]], str]


@dataclass(frozen=True)
class Prepared:
    """What a stage starts from: the content's energy ‖φ_l(o)‖² by layer key, and the checksums of all that was written.

    `areas`: n_r,l by style key, where there are mask regions (losses/masks.py).
    """

    content_energies: Mapping[str, float]
    checksums: Mapping[str, str]
    areas: Mapping[str, float]


def prepare(
    stage: Stage,
    previous_canvas: store.StageArray | None,
    content_colors: colors.ColorStatistics | None = None,
    *,
    moments: Sequence[StageArray] = (),
    is_region: bool = False,
    first_canvas: FirstCanvas | None = None,
) -> Prepared:
    """Create all arrays of the stage, and fill its inputs and slot 0. May be repeated from the start.

    `previous_canvas`: the result of the previous stage, None for the first. `content_colors`: statistics of the whole
    content, if the stage covers only a region of it. `moments`: m and v of the previous stage, if this one continues
    them. `is_region`: the stage is a crop, in which a mask may be black. `first_canvas`: fills the first canvas of
    `init: apply` or `init: wct`.

    Raises StorageError, InputError for a broken image or a black mask, ConfigError for features that are not finite,
    ChunkError if the previous canvas is damaged.
    """
    trim_heap()  # memory that the stage before has freed counts as used until glibc returns it to the system
    with storage(stage.partial_dir):
        results = [*([] if previous_canvas is None else [previous_canvas]), *moments]
        if results:  # a damaged pixel would be enlarged into every later stage
            integrity.require_intact(results, stage.executor, stage.reporter("check"))
        return _prepare(stage, previous_canvas, content_colors, moments, is_region, first_canvas)


def _prepare(
    stage: Stage,
    previous_canvas: store.StageArray | None,
    content_colors: colors.ColorStatistics | None,
    moments: Sequence[StageArray],
    is_region: bool,
    first_canvas: FirstCanvas | None,
) -> Prepared:
    folder = stage.partial_dir
    store.create_stage(folder)
    for name, array in arrays_of(stage.config, stage.plan.size, stage.layer_use, stage.plan.content).items():
        store.create_array(folder, name, array.shape, array.chunk_px, array.form, stage.config.store.codec)
    sums = {} if stage.config.content is None else _ingest_content(stage, folder)
    sums |= ingest_guides(stage, folder, stage.layer_use.guides.arrays)
    guides = stage.layer_use.guides
    areas = stage.mask_areas(folder, stage.tiles, guides, sums) if guides.regions else {}
    if not is_region:  # a mask may lie outside a crop
        _refuse_nowhere(stage, areas)
    sums |= store_style_targets(stage, folder, sums.get(CONTENT), content_colors)
    sums["canvas_0"] = _start_canvas(stage, folder, previous_canvas, sums, first_canvas)
    sums |= _start_moments(stage, folder, moments)
    if stage.config.optimizer.average:
        sums["average_0"] = _start_average(stage, folder, sums)
    energies, feature_sums = _content_pass(stage, folder, sums)
    sums |= feature_sums | metadata.metadata_checksums(folder)
    # renamed when complete: after a crash the folder has its name with everything in it, or does not exist
    store.commit_stage(folder, stage.stage_dir)
    return Prepared(energies, sums, areas)


def _ingest_content(stage: Stage, folder: Path) -> dict[str, str]:
    """Ingest the content's colours (transparent parts on white) and its alpha; gives their checksums."""
    assert stage.config.content is not None and stage.plan.content is not None
    names = [CONTENT, ALPHA] if stage.plan.content.alpha else [CONTENT]
    planes = [store.open_array(folder, name) for name in names]
    colors = ingest.canvas_colors(stage.config)
    sums = ingest.ingest_planes(stage.config.content, planes, stage.executor, stage.reporter("content"), colors)
    return dict(zip(names, sums, strict=True))


def ingest_guides(stage: Stage, folder: Path, names: Collection[str]) -> dict[str, str]:
    """Ingest the masks `names` into arrays of `folder`, resized to the array's size; gives their checksums."""
    files = {guide_name(index): region.mask for index, region in enumerate(regions_of(stage.config.styles))}
    files[CONTENT_GUIDE] = stage.config.loss.content_mask
    sums = {}
    for name in names:
        path, array = files[name], store.open_array(folder, name)
        assert path is not None
        sums[name] = ingest.ingest(path, array, stage.executor, stage.reporter("mask"))
    return sums


def _refuse_nowhere(stage: Stage, areas: Mapping[str, float]) -> None:
    """Raise InputError for a mask region without any position in the image."""
    guides, layers = stage.layer_use.guides, stage.layer_use.style_layers
    for number, region in enumerate(regions_of(stage.config.styles) if guides.regions else ()):
        if not any(areas[guides.keys(layer)[number]] for layer in layers):
            image = stage.config.styles[region.styles[0]].image
            what = f"mask {region.mask}: is black" if region.mask else "styles without a mask: the masks are white"
            raise InputError(
                f"{what} all over {stage_name(stage.plan.index)} ({stage.plan.size[1]}×{stage.plan.size[0]} px), so "
                f"that {image} would paint nothing. Draw the masks otherwise, leave this style out (stages: can "
                "do so for the small ones alone), or begin with a larger initial_size."
            )


def _start_canvas(
    stage: Stage,
    folder: Path,
    previous_canvas: store.StageArray | None,
    checksums: Mapping[str, str],
    first_canvas: FirstCanvas | None,
) -> str:
    """Fill the canvas of slot 0; gives its checksums."""
    if stage.config.color != "luminance":
        return _fill_canvas(stage, folder, "canvas_0", previous_canvas, checksums, first_canvas)
    # through the other slot, which is still unused: a task that is repeated must not read its own result
    started = _fill_canvas(stage, folder, "canvas_1", previous_canvas, checksums, first_canvas)
    content = store.open_array(folder, CONTENT, checksums[CONTENT])
    source, target = store.open_array(folder, "canvas_1", started), store.open_array(folder, "canvas_0")
    return color_tasks.recolor(source, content, target, stage.executor)


def _fill_canvas(
    stage: Stage,
    folder: Path,
    name: str,
    previous_canvas: store.StageArray | None,
    checksums: Mapping[str, str],
    first_canvas: FirstCanvas | None,
) -> str:
    canvas, init = store.open_array(folder, name), stage.config.init
    if previous_canvas is not None:
        return resample.enlarge(
            resample.whole(previous_canvas),
            resample.whole(canvas),
            stage.executor,
            stage.reporter("canvas"),
            resample.Filling(smoothing=stage.config.stage_smoothing),
        )
    if isinstance(init, InitNetwork | InitWct):
        if first_canvas is None:  # its statistics are of the whole picture
            raise ConfigError(
                "init: a start from a network is computed for whole pictures. Crop a later stage, or choose another "
                "init."
            )
        return first_canvas(folder, name, checksums)
    if isinstance(init, Path):
        image = store.open_array(folder, STYLE, ingest_aside(stage, folder, init, stage.plan.size))
        sums = _start_from(stage, image, canvas)
        store.delete_array(folder, STYLE)
        return sums
    if init == "content":
        return _start_from(stage, store.open_array(folder, CONTENT, checksums[CONTENT]), canvas)
    written: ChunkSums = {}
    for cy, cx in canvas.chunk_indices():
        stage.executor.cancel.raise_if_set()
        written[cy, cx] = canvas.write_chunk(cy, cx, _initial_chunk(init, stage.config.seed, canvas, (cy, cx)))
    return canvas.packed(written)


def _start_from(stage: Stage, image: StageArray, canvas: StageArray) -> str:
    """Fill the first canvas with an image of its size; gives its checksums. 16 bits have fewer ties, but some too."""
    levels = stage.config.start_noise
    filling = resample.Filling(noise_seed=stage.config.seed, noise_levels=levels) if levels else resample.Filling()
    source, target = resample.whole(image), resample.whole(canvas)
    return resample.enlarge(source, target, stage.executor, stage.reporter("canvas"), filling)


def _start_moments(stage: Stage, folder: Path, moments: Sequence[StageArray]) -> dict[str, str]:
    """Fill m and v of slot 0: zeros, or `moments` enlarged; gives their checksums."""
    m, v = (store.open_array(folder, name) for name in ("m_0", "v_0"))
    if not moments:
        return {"m_0": m.packed_zeros(), "v_0": v.packed_zeros()}
    pairs = zip(moments, (m, v), (resample.Filling(moment="m"), resample.Filling(moment="v")), strict=True)
    return {
        target.path.name: resample.enlarge(
            resample.whole(source), resample.whole(target), stage.executor, filling=filling
        )
        for source, target, filling in pairs
    }


def _start_average(stage: Stage, folder: Path, checksums: Mapping[str, str]) -> str:
    """Fill the average with the canvas: the result of a stage without any step. The first step overwrites it."""
    canvas = store.open_array(folder, "canvas_0", checksums["canvas_0"])
    return resample.enlarge(
        resample.whole(canvas),
        resample.whole(store.open_array(folder, "average_0")),
        stage.executor,
        stage.reporter("average"),
    )


def _content_pass(stage: Stage, folder: Path, checksums: Mapping[str, str]) -> tuple[dict[str, float], dict[str, str]]:
    """Store the content's features; gives ‖φ_l(o)‖² by layer key, and the checksums of the features."""
    layers, color, scales = stage.layer_use.content_layers, stage.color, stage.layer_use.scales
    if not layers:
        return {}, {}
    specs = [
        tile_specs.ContentSpec(folder, "content", tile, stage.network, checksums, layers, color=color, scales=scales)
        for tile in stage.tiles
    ]
    results = stage.executor.map(
        tile_tasks.content_task, specs, stage.counter("content features", len(specs)), tile=True
    )
    energies, packed = {}, {}
    for key in stage.layer_use.content_widths:
        energies[key] = math.fsum(result.energies.get(key, 0.0) for result in results)
        check_finite(stage, energies[key], "content", key)
        name = content_features_name(key)
        sums = merged(result.sums.get(key, {}) for result in results)
        packed[name] = store.open_array(folder, name).packed(sums)
    return energies, packed


def _initial_chunk(init: str, seed: int, array: StageArray, chunk: tuple[int, int]) -> NDArray[Any]:
    """One chunk of mid-grey, or of uniform noise 0..255, which depends on the seed and the chunk's index alone."""
    rows, columns = array.valid_part(*chunk)
    shape = rows.stop, columns.stop, 3
    if init == "gray":
        return np.full(shape, 127.5, array.value_dtype)
    # a generator per chunk: the noise must not depend on the order or the number of tasks
    return np.random.default_rng([seed, *chunk]).uniform(0, 255, shape).astype(array.value_dtype)
