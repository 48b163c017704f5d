"""The plan of a run: sizes, work, disk and memory, computed from the config and the image headers alone.

`run` refuses a config whose plan does not fit, and a test compares measured with projected memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.config import Config, input_files
from pipeline.core.errors import ConfigError
from pipeline.core.image_formats import PixelKind, compressed_bytes
from pipeline.core.text import size_text
from pipeline.core.tiling import Size, grid
from pipeline.core.vgg_layers import ceil_to
from pipeline.images import ImageHeader
from pipeline.plan import checks
from pipeline.plan.device import Device
from pipeline.plan.memory import StageWork, Workload
from pipeline.plan.network_cost import LayerUse, layers_in_use
from pipeline.plan.residency import buffer_bytes, resident_bytes, room_bytes, with_resident
from pipeline.plan.sizes import scales_in_use, stage_configs, stage_sizes
from pipeline.store import ArraySpec, StageLayout, kept_files, overviews_bytes

# With 160 px of halo on each side a larger tile would save less than 4 % of the work.
MAX_AUTO_TILE_PX = 2**14


@dataclass(frozen=True)
class StagePlan:
    """One stage: sizes in px (height, width), tiles, pixels computed per iteration, bytes and chunks of its arrays.

    `gram_px`, `gradient_px`: over all scales that the losses compare, of which there are `scales`. `kept_bytes`,
    `kept_chunks`: of the arrays that stay when the stage has ended. `carries`: m and v are among them, because the next
    stage starts from them. `overviews_bytes`: of the files for viewers. `resident_bytes`: memory that the stage takes
    to stay there between two commits; 0 if it is read from the disk and written there. `content`: the kind of the
    content's pixels, None without a content. `prepare_flop`: of the style targets and the content's features.
    """

    index: int
    size: Size
    style_sizes: tuple[Size, ...]
    scales: int
    tiles: int
    gram_px: int
    gradient_px: int
    store_bytes: int
    store_chunks: int
    kept_bytes: int
    kept_chunks: int
    overviews_bytes: int
    resident_bytes: int
    content: PixelKind | None
    prepare_flop: int
    flop_per_iteration: int
    max_iterations: int
    carries: bool

    @property
    def pixels(self) -> int:
        """N, the pixels of the canvas."""
        return self.size[0] * self.size[1]

    @property
    def halo_overhead(self) -> float:
        """Pixels that the gradient pass computes per pixel of the canvas."""
        return self.gradient_px / self.pixels


@dataclass(frozen=True)
class Plan:
    """The whole run: stages, tile size, and projected peaks in bytes.

    `tile_step_px`: tiles of another size would be a multiple of it. `picture`: the kind of the output image's pixels.
    `dpi`: the resolution of the print. `outputs`: (height, width) of each output image by its path, several if they are
    panels.
    `devices`: what computes, where that is more than one device; `cluster`: the scheduler of the workers that do, whose
    memory is then that of the largest single process. `tile_device_bytes`: of `device_bytes`, what the passes over
    tiles take. `notes`: what the user should know of how inputs are read, and colours converted.
    """

    stages: tuple[StagePlan, ...]
    tile_px: int
    tile_step_px: int
    chunk_px: int
    halo_px: int
    device: str
    devices: str
    cluster: str
    host_bytes: Mapping[str, int]
    tile_device_bytes: int
    device_bytes: int
    disk_bytes: int
    picture: PixelKind
    dpi: float
    outputs: Mapping[str, Size]
    output_bytes: int
    levels_bytes: int
    flop: int
    memory_limit_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def projected_mem_bytes(self) -> int:
        """Peak resident host memory of the run, without the page cache: that of its largest phase."""
        return max(self.host_bytes.values())

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON-able data."""
        return {**asdict(self), "projected_mem_bytes": self.projected_mem_bytes}


def make_plan(
    config: Config, images: Mapping[Path, ImageHeader], widths: Mapping[str, int], weights_bytes: int, device: Device
) -> Plan:
    """Plan the run of `config`.

    `images`, `weights_bytes`, `device`: see memory.Workload. `widths`: channels of every convolution.
    Raises ConfigError if the run cannot fit into memory, InputError if an image or the weights cannot be used.
    """
    works = _stage_works(config, images, widths)
    work = Workload(config, works, images, weights_bytes, device)
    tile_px = _choose_tile(work)
    carries = [*(stage.config.optimizer.carry for stage in works[1:]), False]
    room = room_bytes(work, tile_px)
    arrays = [arrays_of(stage.config, stage.canvas, stage.layer_use, stage.content) for stage in works]
    resident = [held if (held := resident_bytes(each, device.name)) <= room else 0 for each in arrays]
    on_host = [
        size if device.name == "cpu" else buffer_bytes(each)
        for size, each in zip(resident, arrays, strict=True)
        if size
    ]
    stages = tuple(
        plan_stage(stage, index, tile_px, carries[index], resident[index]) for index, stage in enumerate(works)
    )
    output_px = sum(height * width for height, width in work.output_sizes.values())
    return Plan(
        stages=stages,
        tile_px=tile_px,
        tile_step_px=work.tile_step_px,
        chunk_px=config.store.chunk_px,
        halo_px=max(stage.layer_use.halo_px for stage in works),
        device=device.name,
        devices=device.label if device.processes or device.cluster else "",
        cluster=device.cluster,
        host_bytes=with_resident(work.host_bytes(tile_px), on_host),
        tile_device_bytes=work.gpu_bytes(tile_px),
        device_bytes=0 if device.name == "cpu" else work.gpu_bytes(tile_px) + max(resident),
        disk_bytes=_disk_bytes(stages),
        picture=work.picture,
        dpi=work.output_dpi,
        outputs={str(path): size for path, size in work.output_sizes.items()},
        output_bytes=compressed_bytes(  # a pyramid adds a third
            output_px * work.picture.pixel_bytes * 4 // 3, config.export.compression
        ),
        levels_bytes=work.levels_bytes,
        flop=_flop(stages),
        memory_limit_bytes=config.memory.limit_bytes,
        notes=tuple(f"{image.path}: {note}" for image in images.values() for note in image.notes),
    )


def with_added_stages(planned: Plan, added: Sequence[int]) -> Plan:
    """The plan with stages added after the last, of its size: `added` are their numbers of iterations."""
    last = planned.stages[-1]
    more = (
        replace(last, index=last.index + number, max_iterations=iterations)
        for number, iterations in enumerate(added, start=1)
    )
    stages = (*planned.stages, *more)
    return replace(planned, stages=stages, disk_bytes=_disk_bytes(stages), flop=_flop(stages))


def _disk_bytes(stages: Sequence[StagePlan]) -> int:
    """The most that the store has: a stage beside what the stages before it have kept."""
    most = max(stage.store_bytes + sum(before.kept_bytes for before in stages[: stage.index]) for stage in stages)
    return most + sum(stage.overviews_bytes for stage in stages)


def _flop(stages: Sequence[StagePlan]) -> int:
    return sum(stage.prepare_flop + stage.flop_per_iteration * stage.max_iterations for stage in stages)


def _stage_works(
    config: Config, images: Mapping[Path, ImageHeader], widths: Mapping[str, int]
) -> tuple[StageWork, ...]:
    """The work of every stage. Raises ConfigError or InputError if it cannot be done, whatever the memory."""
    sizes = stage_sizes(config, images)
    checks.check_counts(config, sizes)
    checks.check_overrides(config, [max(canvas) for canvas, _ in sizes])
    content = images[config.content].kind if config.content is not None else None
    configs = stage_configs(config, [max(canvas) for canvas, _ in sizes])
    works = tuple(
        StageWork(
            stage_config,
            _layer_use(stage_config, widths, (max(sizes[0][0]), canvas, styles)),
            canvas,
            styles,
            content,
            tuple(images[style.image].kind.alpha for style in stage_config.styles),
            max((images[path].scratch_bytes for _, path in input_files(stage_config) if path in images), default=0),
        )
        for stage_config, (canvas, styles) in zip(configs, sizes, strict=True)
    )
    for index, work in enumerate(works):
        checks.check_image_sizes(work, index)
    checks.check_initial_image(config, works[0].canvas, images)
    checks.check_masks(config, works, images)
    return works


def _layer_use(config: Config, widths: Mapping[str, int], sizes: tuple[int, Size, Sequence[Size]]) -> LayerUse:
    """`sizes`: the long side of the first stage; the sizes of canvas and styles."""
    layer_use = layers_in_use(config, widths)
    return replace(layer_use, scales=scales_in_use(config, layer_use, *sizes))


def plan_stage(work: StageWork, index: int, tile_px: int, carries: bool = False, resident: int = 0) -> StagePlan:
    """The plan of one stage in tiles of `tile_px`. `carries`: its m and v are kept.

    `resident`: bytes of memory that it stays in, if it does.
    """
    size, layer_use, chunk_px = work.canvas, work.layer_use, work.config.store.chunk_px
    arrays = arrays_of(work.config, size, layer_use, work.content)
    retained = [arrays[name] for name in kept_files(0, arrays, moments=carries) if name in arrays]
    styles = [
        [ArraySpec((*style, channels), chunk_px, "uint8") for channels in ((3, 1) if alpha else (3,))]
        for style, alpha in zip(work.styles, work.alphas, strict=True)
    ]
    # a style is deleted before the next is read
    stored = [*arrays.values(), *max(styles, key=_total_bytes, default=[])]
    # Without regions the targets of the style are too few bytes to count.
    targets = (layer_use.grams_bytes(), len(layer_use.style_keys)) if layer_use.guides.regions else (0, 0)
    scales, style_halo = range(layer_use.scales), layer_use.gram_halo_px
    gram_px = sum(computed_px(size, tile_px, style_halo, scale) for scale in scales) if layer_use.style_layers else 0
    gradient_px = sum(computed_px(size, tile_px, 2 * layer_use.halo_px, scale) for scale in scales)
    prepared_px = sum(computed_px(style, tile_px, style_halo) for style in work.styles)
    if layer_use.content_layers:
        prepared_px += sum(computed_px(size, tile_px, layer_use.halo_px, scale) for scale in scales)
    tiles = ceil_to(size[0], tile_px) * ceil_to(size[1], tile_px) // tile_px**2
    return StagePlan(
        index=index,
        size=size,
        style_sizes=work.styles,
        scales=layer_use.scales,
        tiles=tiles,
        gram_px=gram_px,
        gradient_px=gradient_px,
        store_bytes=_total_bytes(stored) + targets[0] + work.scratch_bytes,
        store_chunks=sum(spec.chunks for spec in stored) + targets[1],
        kept_bytes=_total_bytes(retained),
        kept_chunks=sum(spec.chunks for spec in retained),
        overviews_bytes=overviews_bytes(size, chunk_px),
        resident_bytes=resident,
        content=work.content,
        prepare_flop=layer_use.flop_per_px() * prepared_px,
        # The backward pass to the pixels costs as much as the forward pass: no gradient of a weight is computed. A
        # canvas of one tile gets its Gram matrices in the forward pass of its gradient.
        flop_per_iteration=layer_use.flop_per_px() * ((gram_px if tiles > 1 else 0) + 2 * gradient_px),
        max_iterations=work.config.optimizer.max_iterations,
        carries=carries,
    )


def _total_bytes(specs: Iterable[ArraySpec]) -> int:
    return sum(spec.stored_bytes for spec in specs)


def computed_px(size: Size, tile_px: int, halo: int, scale: int = 0) -> int:
    """Pixels, halo included, that a pass over the tiles of a canvas computes at one scale.

    The areas of a grid of tiles add up to the product of the summed heights and the summed widths.
    """
    height, width = (_summed_px(side_px, tile_px, halo, scale) for side_px in size)
    return height * width


def _summed_px(side_px: int, tile_px: int, halo: int, scale: int) -> int:
    tiles = [tile.shrunk(scale) for tile in grid(side_px, 1, tile_px)]
    return sum(tile.outer(halo).height for tile in tiles if tile.inner.height)  # a tile without pixels is not read


def arrays_of(config: Config, size: Size, layer_use: LayerUse, content: PixelKind | None) -> dict[str, ArraySpec]:
    """The arrays of pixels or features of a stage of `config` whose canvas has this (height, width)."""
    averaged, guides = config.optimizer.average > 0, layer_use.guides.arrays
    layout = StageLayout(size, config.store.chunk_px, config.state, layer_use.content_widths, averaged, content, guides)
    return layout.arrays()


def _choose_tile(work: Workload) -> int:
    """The largest tile that fits the limits, or the one that the config asks for. Raises ConfigError if none fits."""
    step_px, limit = work.tile_step_px, work.config.memory.limit_bytes
    largest = ceil_to(min(max(max(stage.canvas) for stage in work.stages), MAX_AUTO_TILE_PX), step_px)
    requested = work.config.compute.tile_px
    checks.check_tile(work.config, step_px)
    candidates = list(range(largest, 0, -step_px)) if requested == "auto" else [int(requested)]
    device = work.device
    if device.name != "cpu":
        candidates = [tile_px for tile_px in candidates if work.has_gpu_sizes(tile_px)] or candidates[-1:]
    for tile_px in candidates:
        host, device_bytes = work.host_bytes(tile_px), work.gpu_bytes(tile_px)
        if max(host.values()) <= limit and device_bytes <= device.memory_bytes:
            return tile_px
    phase = max(host, key=lambda name: host[name])
    memory, need, have, remedy = (
        (f"host memory (phase: {phase})", host[phase], limit, "raise memory.limit")
        if host[phase] > limit
        else (f"memory of {device.name}", device_bytes, device.memory_bytes, "use a device with more memory")
    )
    raise ConfigError(
        f"compute.tile_px: {requested} needs {size_text(need)} of {memory}, but {size_text(have)} is the limit"
        + (f", even with the smallest tile ({step_px} px)" if requested == "auto" else "")
        + f". To continue, {remedy}, or use "
        + ("a smaller store.chunk_px" if requested == "auto" else "compute.tile_px: auto")
        + work.fewer_processes
        + " or a narrower network."
    )
