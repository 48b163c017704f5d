"""Rules between several keys of a config: values that are valid one by one and contradict each other.

Each rule yields conflicts. The first key of a conflict is where the message is placed. The other keys are its causes:
if one of them is invalid by itself, the conflict is not reported, because it may disappear with that error.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipeline.config.messages import Conflict
from pipeline.config.output_sections import ExportConfig
from pipeline.config.regions import regions_of
from pipeline.config.sections import ComputeConfig, InitNetwork, InitWct, PrintSize
from pipeline.config.settings import Settings
from pipeline.config.yaml_reader import Key, dotted
from pipeline.core.files import real, same_file, would_replace
from pipeline.core.image_formats import format_of, is_jpeg_inside, unsupported_options

_STYLE_WEIGHT, _CONTENT_WEIGHT = ("loss", "style_weight"), ("loss", "content_weight")
_STYLE_LAYERS, _CONTENT_LAYERS = ("network", "style_layers"), ("network", "content_layers")


def all_conflicts(settings: Settings, inputs: Iterable[tuple[Key, Path]]) -> Iterator[Conflict]:
    """Every conflict of a config. `inputs`: key and path of each file that it reads."""
    yield from _loss(settings)
    yield from _stages(settings)
    yield from _start(settings)
    yield from _grid(settings)
    yield from _state(settings)
    yield from compute_conflicts(settings.compute)
    yield from picture_conflicts(settings.output, settings.work_dir, settings.export, inputs)


def _stages(settings: Settings) -> Iterator[Conflict]:
    for index, stage in enumerate(settings.stages):
        key = ("stages", index)
        previous = settings.stages[index - 1]
        if index and stage.up_to <= previous.up_to:
            text = f"{stage.up_to} is not above that of the previous entry ({previous.up_to}); sort the entries by size"
            yield Conflict(((*key, "up_to"),), text)
        own = settings.overridden_by(stage)
        if own.optimizer.carry and own.optimizer.color_space != settings.optimizer.color_space:
            text = "carry continues moments, which are in one colour space; use one for all stages, or switch carry off"
            yield Conflict(((*key, "optimizer", "color_space"), (*key, "optimizer", "carry")), text)
        for conflict in _loss(own):
            yield Conflict(tuple((*key, *inner) for inner in conflict.keys), conflict.text)


def _start(settings: Settings) -> Iterator[Conflict]:
    """The size of the output and the initial canvas."""
    content, size, init = ("content",), ("size",), ("init",)
    if settings.content is None:
        if settings.size is None and not settings.loss.content_weight:  # else the missing content is reported
            yield Conflict((size, content), "null uses the content's size, but there is no content; give a size")
        if settings.init == "content":
            yield Conflict((init, content), "there is no content to start from; choose noise, or an image file")
        if isinstance(settings.init, InitNetwork | InitWct):
            yield Conflict((init, content), "there is no content to put through the network; choose noise")
        if settings.color != "style":
            text = f"{settings.color} uses the content's colours, but there is no content; choose style, or add one"
            yield Conflict((("color",), content), text)
    elif isinstance(settings.size, tuple):
        text = "[width, height] is for textures, which have no content; give the long side only"
        yield Conflict((size, content), text)
    yield from _print_size(settings)
    if isinstance(settings.init, InitWct):
        styles = settings.for_first_stage.styles
        if not styles or any(style.mask is not None for style in styles):
            text = "gives the whole picture the look of all styles, and {}; choose content, or an image file"
            yield Conflict((init, ("styles",)), text.format("they have masks" if styles else "there are none"))
    if settings.init == "gray" and not settings.for_first_stage.loss.content_weight:
        text = "without a content loss every pixel of a gray canvas has the same gradient, and it stays gray"
        yield Conflict((init, _CONTENT_WEIGHT), f"{text}; choose noise")


def _print_size(settings: Settings) -> Iterator[Conflict]:
    """The size on paper, and the resolution that it is rendered at."""
    if not isinstance(given := settings.size, PrintSize):
        return
    size, content, dpi = ("size",), ("content",), ("export", "dpi")
    sides = [name for name in ("long_side", "width", "height") if getattr(given, name) is not None]
    if not sides:
        yield Conflict((size,), "no length; give one, such as 60cm or {width: 60cm}")
    elif len(sides) > 1 and (settings.content is not None or "long_side" in sides):
        text = f"{' and '.join(sides)} together; give one of them, and the content's aspect ratio gives the other side"
        yield Conflict((size, content), text)
    if None not in (given.dpi, settings.export.dpi) and given.dpi != settings.export.dpi:
        text = f"{settings.export.dpi:g}, so a picture of {given.dpi:g} dpi (size.dpi) would have another size on paper"
        yield Conflict((dpi, (*size, "dpi")), f"{text}; give one of the two, or size in px")


def _loss(settings: Settings) -> Iterator[Conflict]:
    total = sum(style.weight for style in settings.styles)
    if settings.content is None and settings.loss.content_weight:
        text = "missing; expected a path (content image). Only textures (loss.content_weight: 0) have no content"
        yield Conflict((("content",),), text)
    if not settings.styles:
        if settings.loss.style_weight:
            text = "expected a list with at least one entry, unless loss.style_weight is 0"
            yield Conflict((("styles",), _STYLE_WEIGHT), text)
    elif not 0 < total < math.inf:
        yield Conflict((("styles",),), f"the weights sum to {total}, so they cannot be normalised")
    else:
        yield from _regions(settings)
    yield from _nothing_to_optimise(settings)
    if settings.network.name == "random" and settings.network.weights is not None:
        text = "network random draws its weights from the seed and would ignore this file; set it to null"
        yield Conflict((("network", "weights"), ("network", "name")), text)


def _nothing_to_optimise(settings: Settings) -> Iterator[Conflict]:
    weights = settings.loss.content_weight, settings.loss.style_weight
    layers = settings.network.content_layers, settings.network.style_layers
    keys, layer_keys = (_STYLE_WEIGHT, _CONTENT_WEIGHT), (_STYLE_LAYERS, _CONTENT_LAYERS)
    nothing = "so there is nothing to optimise"
    if not any(weights):
        yield Conflict(keys, f"0, like loss.content_weight, {nothing}")
    elif not any(layers):
        yield Conflict(layer_keys, f"no layers, and none in network.content_layers, {nothing}")
    elif not any(weight and names for weight, names in zip(weights, layers, strict=True)):
        yield Conflict((*keys, *layer_keys), f"the only weight above 0 belongs to an empty list of layers, {nothing}")


def _regions(settings: Settings) -> Iterator[Conflict]:
    """Styles with the same mask share its region by their weights, so one of the weights must be above 0."""
    for region in regions_of(settings.styles):
        if not sum(settings.styles[index].weight for index in region.styles) > 0:
            keys = tuple(("styles", index, "weight") for index in region.styles)
            where = "without a mask" if region.mask is None else f"with the mask {region.mask}"
            text = f"0 for every style {where}, so no style would apply there; give one a weight, or remove them"
            yield Conflict(keys, text)


def _grid(settings: Settings) -> Iterator[Conflict]:
    tile_px, chunk_px = settings.compute.tile_px, settings.store.chunk_px
    if tile_px != "auto" and tile_px % chunk_px:
        text = f"{tile_px} is not a multiple of store.chunk_px = {chunk_px}; tiles are written as whole chunks"
        yield Conflict((("compute", "tile_px"), ("store", "chunk_px")), text)


def compute_conflicts(compute: ComputeConfig) -> Iterator[Conflict]:
    """Every conflict between the keys that say what computes."""
    devices, scheduler = ("compute", "devices"), ("compute", "scheduler")
    if compute.devices != "auto":
        kinds = {name.partition(":")[0] for name in compute.devices}
        if len(kinds) > 1:
            yield Conflict((devices,), "CPU and GPU round differently, so they cannot share a run; list one kind")
        if compute.device not in ("auto", *kinds):
            yield Conflict((devices, ("compute", "device")), "compute.device is for a single one; give one of the two")
    if compute.scheduler != "none":
        text = "computes on the cluster's workers, and {} is for this machine; give one of the two"
        if compute.devices != "auto":
            yield Conflict((scheduler, devices), text.format("compute.devices"))
        if compute.workers:
            yield Conflict((scheduler, ("compute", "workers")), text.format("compute.workers"))


def _state(settings: Settings) -> Iterator[Conflict]:
    if settings.store.state_dtype != "compact":
        return
    key = ("store", "state_dtype")
    if not settings.optimizer.clip:
        text = "compact stores canvas values within 0..255, and optimizer.clip: false exceeds them; choose float"
        yield Conflict((key, ("optimizer", "clip")), f"{text}, or clip")
    if settings.compute.dtype == "float64":
        text = "compact would round off the precision of compute.dtype float64; choose float, or float32"
        yield Conflict((key, ("compute", "dtype")), text)


def picture_conflicts(
    output: Path, work_dir: Path, export: ExportConfig, inputs: Iterable[tuple[Key, Path]]
) -> Iterator[Conflict]:
    """Conflicts of the files that any command reads and writes."""
    yield from _format(output, export)
    yield from _paths(output, work_dir, inputs)


def _format(path: Path, export: ExportConfig) -> Iterator[Conflict]:
    image_format = format_of(path)
    bits, compression, output = ("export", "bits"), ("export", "compression"), ("output",)
    if export.bits == 16 and image_format is not None and 16 not in image_format.bits:
        text = f"{image_format.suffixes[0]} images have 8 bits; choose 8, or a .tif, .png or .zarr output"
        yield Conflict((bits, output), text)
    if export.bits == 16 and is_jpeg_inside(path, export.compression):
        text = "jpeg stores 8 bits only; choose another compression, or export.bits 8"
        yield Conflict((compression, bits, output), text)
    yield from panel_conflicts(export)
    for option, reason in unsupported_options(path, export.changed):
        yield Conflict((("export", option), output), reason)


def panel_conflicts(export: ExportConfig) -> Iterator[Conflict]:
    """Every conflict between the width of the panels and their overlap."""
    panels, overlap, width = export.panels, ("export", "panels", "overlap"), ("export", "panels", "width")
    if panels.width is None and panels.overlap.mm:
        text = "needs the width of a panel, export.panels.width; without it there is one file"
        yield Conflict((overlap,), text)
    if panels.width is not None and panels.overlap.mm >= panels.width.mm:
        yield Conflict((overlap, width), f"{panels.overlap} is not less than export.panels.width ({panels.width})")


def _paths(output: Path, work_dir: Path, inputs: Iterable[tuple[Key, Path]]) -> Iterator[Conflict]:
    output_key, work_dir_key = ("output",), ("work_dir",)
    for key, path in inputs:
        if same_file(path, output):
            yield Conflict((output_key, key), f"the same file as {dotted(key)}, which would be overwritten")
        elif would_replace(output, path):
            text = f"a folder that holds {dotted(key)}, which would be lost when it is replaced; choose another name"
            yield Conflict((output_key, key), text)
        if same_file(path, work_dir):
            text = f"the same path as {dotted(key)}; choose a folder for the run directory"
            yield Conflict((work_dir_key, key, output_key), text)
    output, work_dir = real(output), real(work_dir)
    if output == work_dir or output in work_dir.parents:
        text = "at or inside the output, which is replaced as a whole at the end; choose another folder"
        yield Conflict((work_dir_key, output_key), text)
