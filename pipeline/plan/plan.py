"""What a run will do and need, as pure sums over the config and the image headers; nothing is rendered.

`run` refuses what does not fit, and a test holds measured memory to what is projected here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Any

from pipeline.config.config import Config
from pipeline.config.sections import StyleConfig
from pipeline.core.errors import ConfigError, InputError
from pipeline.core.image_formats import PixelKind
from pipeline.core.tiling import Size, grid
from pipeline.core.vgg_layers import ceil_to, halo_px, min_side_px
from pipeline.plan.memory import ImageSize, StageWork, Workload
from pipeline.plan.network_cost import LayerUse, layers_in_use
from pipeline.store.layout import ArraySpec, StageLayout, kept_files

# Chunks of an array, each a file, and so the most tiles of a pass: at 512 px that is 520,000×520,000 px.
MAX_CHUNKS = 2**20
# With 160 px of halo on each side a larger tile would save less than 4 % of the work.
MAX_AUTO_TILE_PX = 2**14


@dataclass(frozen=True)
class StagePlan:
    """One stage: sizes in px (height, width), tiles, pixels computed per iteration, bytes and chunks of its arrays.

    `kept_bytes`, `kept_chunks`: of what stays when it has ended. `content`: what its pixels are, None without one.
    """

    index: int
    size: Size
    style_sizes: tuple[Size, ...]
    tiles: int
    gram_px: int
    gradient_px: int
    store_bytes: int
    store_chunks: int
    kept_bytes: int
    kept_chunks: int
    content: PixelKind | None
    flop_per_iteration: int
    max_iterations: int

    @property
    def pixels(self) -> int:
        """N, the pixels of the canvas."""
        return self.size[0] * self.size[1]

    @property
    def halo_overhead(self) -> float:
        """Pixels the gradient pass computes per pixel it keeps."""
        return self.gradient_px / self.pixels


@dataclass(frozen=True)
class Plan:
    """The whole run: stages, tile size, and the projected peaks in bytes."""

    stages: tuple[StagePlan, ...]
    tile_px: int
    chunk_px: int
    halo_px: int
    device: str
    host_bytes: Mapping[str, int]
    device_bytes: int
    disk_bytes: int
    picture: PixelKind
    output_bytes: int
    levels_bytes: int
    flop: int
    memory_limit_bytes: int

    @property
    def projected_mem_bytes(self) -> int:
        """Peak resident host memory of the run, page cache not counted: that of its largest phase."""
        return max(self.host_bytes.values())

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON-able data."""
        return {**asdict(self), "projected_mem_bytes": self.projected_mem_bytes}


def fit(size: Size, long_px: int) -> Size:
    """(height, width) of `size` scaled so that its long side is exactly `long_px`."""
    height, width = size
    scale = long_px / max(size)
    return (long_px, max(1, round(width * scale))) if height >= width else (max(1, round(height * scale)), long_px)


def stage_sizes(config: Config, images: Mapping[Path, ImageSize]) -> Sequence[tuple[Size, tuple[Size, ...]]]:
    """(canvas size, style sizes) of every stage, sizes as (height, width); algorithm.md, "Stages".

    K + 1 stages, K the least with r0·2^K at least the long side of the result, and at which every style of the last
    stage has its full size.
    """
    shape = canvas_shape(config, images)
    target = config.target_px or max(shape)
    longest = max(target, *(_full_at_px(style, images) for style in config.for_stage(target).styles), 0)
    stages, long_px = [], config.initial_size
    while True:
        canvas = fit(shape, min(long_px, target))
        styles = config.for_stage(max(canvas)).styles
        stages.append((canvas, tuple(_style_size(style, images, long_px) for style in styles)))
        if long_px >= longest:
            return stages
        long_px *= 2


def canvas_shape(config: Config, images: Mapping[Path, ImageSize]) -> Size:
    """(height, width) of the content, or of what the config asks for without one: the result has its proportions."""
    if config.content is not None:
        return _size_of(images[config.content])
    width, height = config.size if isinstance(config.size, tuple) else (config.size, config.size)
    assert width is not None and height is not None  # the config refuses it
    return height, width


def _size_of(image: ImageSize) -> Size:
    return image.height_px, image.width_px


def _style_size(style: StyleConfig, images: Mapping[Path, ImageSize], long_px: int) -> Size:
    """A style beside a canvas whose long side is, or would be, `long_px`: never enlarged."""
    size = _size_of(images[style.image])
    return fit(size, max(1, min(round(long_px * style.scale), _largest_px(style, size))))


def _largest_px(style: StyleConfig, size: Size) -> int:
    return min(max(size), style.max_size or max(size))


def _full_at_px(style: StyleConfig, images: Mapping[Path, ImageSize]) -> int:
    """The long side of the canvas beside which a style has its full size; a smaller scale adds no stages."""
    return ceil(_largest_px(style, _size_of(images[style.image])) / max(style.scale, 1.0))


def make_plan(
    config: Config,
    images: Mapping[Path, ImageSize],
    widths: Mapping[str, int],
    weights_bytes: int,
    device: str,
    device_memory_bytes: int,
) -> Plan:
    """Plan the run of `config`.

    `device_memory_bytes`: what a GPU has free; not looked at for the CPU, where memory.limit rules. The rest is as in
    cost.Workload.
    Raises ConfigError if it cannot fit in memory, InputError if an image or the weights cannot serve.
    """
    sizes = stage_sizes(config, images)
    _check_counts(config, sizes)
    _check_overrides(config, [max(canvas) for canvas, _ in sizes])
    configs = [config.for_stage(max(canvas)) for canvas, _ in sizes]
    content = images[config.content].kind if config.content is not None else None
    works = [
        StageWork(one, layers_in_use(one, widths), canvas, styles, content)
        for one, (canvas, styles) in zip(configs, sizes, strict=True)
    ]
    for index, one in enumerate(works):
        _check_sizes(one, index)
    _check_start(config, works[0].canvas, images)
    _check_masks(config, works, images)
    work = Workload(config, works, images, weights_bytes, device)
    tile_px = _choose_tile(work, device_memory_bytes)
    stages = tuple(plan_stage(one, index, tile_px) for index, one in enumerate(works))
    kept = [stage.kept_bytes for stage in stages]
    disk = max(stage.store_bytes + sum(kept[: stage.index]) for stage in stages)
    return Plan(
        stages=stages,
        tile_px=tile_px,
        chunk_px=config.store.chunk_px,
        halo_px=max(one.halo_px for one in works),
        device=device,
        host_bytes=work.host_bytes(tile_px),
        device_bytes=work.gpu_bytes(tile_px),
        disk_bytes=disk,
        picture=work.picture,
        output_bytes=stages[-1].pixels * work.picture.pixel_bytes * 4 // 3,  # a pyramid adds a third
        levels_bytes=work.levels_bytes,
        flop=sum(stage.flop_per_iteration * stage.max_iterations for stage in stages),
        memory_limit_bytes=config.memory.limit_bytes,
    )


def _check_counts(config: Config, sizes: Sequence[tuple[Size, tuple[Size, ...]]]) -> None:
    """Refuse a result, or a number of chunks, that nobody can have meant."""
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
            f"array, more than the {MAX_CHUNKS:,} that are handled. Use larger chunks, or a smaller size."
        )


def _check_overrides(config: Config, canvases_px: Sequence[int]) -> None:
    """Refuse an entry of `stages` that no stage would heed. `canvases_px`: the long side of every stage's canvas."""
    for index, stage in enumerate(config.stages):
        above = config.stages[index - 1].up_to if index else 0
        if not any(above < long_px <= stage.up_to for long_px in canvases_px):
            sizes = ", ".join(map(str, dict.fromkeys(canvases_px)))
            raise ConfigError(
                f"stages.{index}: is for canvases of {above + 1} to {stage.up_to} px, and this run has none, so it "
                f"would change nothing. Its stages have {sizes} px: change up_to, or leave the entry out."
            )


def _check_sizes(work: StageWork, stage: int) -> None:
    """Refuse images too small for the network."""
    config = work.config
    named = [("content image", config.content, work.canvas, work.layer_use.names)]
    named += [
        ("style image", style.image, size, work.layer_use.style_layers)
        for style, size in zip(config.styles, work.styles, strict=True)
    ]
    for what, path, size, names in named:
        least = min_side_px(names, config.network.padding) if names else 1
        if min(size) < least:
            raise InputError(
                f"{what} {path}: at stage {stage} it is {size[1]}×{size[0]} px, but the deepest layer in use needs "
                f"{least} px on each side ({config.network.padding} padding). Use a larger image, a larger "
                "initial_size, or shallower layers."
            )


def _check_start(config: Config, canvas: Size, images: Mapping[Path, ImageSize]) -> None:
    """Refuse a picture to start from that would be squeezed into the canvas."""
    if not isinstance(config.init, Path):
        return
    height, width = _size_of(images[config.init])
    if abs(fit((height, width), max(canvas))[0] - canvas[0]) > 1 + canvas[0] // 100:
        raise InputError(
            f"init {config.init}: has {width}×{height} px, and the canvas that it would start has other proportions "
            f"({canvas[1]}×{canvas[0]} px): it would be squeezed. Crop it to those."
        )


def _check_masks(config: Config, works: Sequence[StageWork], images: Mapping[Path, ImageSize]) -> None:
    """Refuse a mask that would be squeezed: it says where in the content, so it has its proportions."""
    height, width = canvas_shape(config, images)
    for path in dict.fromkeys(path for work in works for path in work.config.masks):
        found_height, found_width = _size_of(images[path])
        # of its two sides, one may be what rounding has made of the other
        if min(abs(found_height - height * found_width / width), abs(found_width - width * found_height / height)) > 1:
            raise InputError(
                f"mask {path}: has {found_width}×{found_height} px, which are not the proportions of "
                f"{'the content' if config.content else 'the result'} ({width}×{height} px): it would be squeezed, and "
                "lie elsewhere than it was drawn. Draw it over the picture, at any size of the same proportions."
            )


def plan_stage(work: StageWork, index: int, tile_px: int) -> StagePlan:
    """The plan of one stage in tiles of `tile_px`."""
    size, layer_use, chunk_px = work.canvas, work.layer_use, work.config.store.chunk_px
    arrays = arrays_of(work.config, size, layer_use, work.content)
    kept = [arrays[name] for name in kept_files(0, arrays) if name in arrays]
    styles = sorted((ArraySpec((*style, 3), chunk_px, "uint8") for style in work.styles), key=lambda one: one.chunks)
    held = [*arrays.values(), *styles[-1:]]  # the styles are there one at a time
    gram_px = computed_px(size, tile_px, halo_px(layer_use.style_layers)) if layer_use.style_layers else 0
    gradient_px = computed_px(size, tile_px, 2 * work.halo_px)
    return StagePlan(
        index=index,
        size=size,
        style_sizes=work.styles,
        tiles=ceil_to(size[0], tile_px) * ceil_to(size[1], tile_px) // tile_px**2,
        gram_px=gram_px,
        gradient_px=gradient_px,
        # without regions the style targets are too little to count
        store_bytes=sum(one.stored_bytes for one in held)
        + (layer_use.grams_bytes() if layer_use.guides.regions else 0),
        store_chunks=sum(one.chunks for one in held) + (len(layer_use.style_keys) if layer_use.guides.regions else 0),
        kept_bytes=sum(one.stored_bytes for one in kept),
        kept_chunks=sum(one.chunks for one in kept),
        content=work.content,
        # the backward pass to the pixels costs as much as the forward one: no weight has a gradient
        flop_per_iteration=layer_use.flop_per_px() * (gram_px + 2 * gradient_px),
        max_iterations=work.config.optimizer.max_iterations,
    )


def computed_px(size: Size, tile_px: int, halo: int) -> int:
    """Pixels that a pass over the tiles of a canvas computes, halo included: the sum over a grid is one of products."""
    height, width = size
    rows = sum(tile.outer(halo).height for tile in grid(height, 1, tile_px))
    return rows * sum(tile.outer(halo).width for tile in grid(1, width, tile_px))


def arrays_of(config: Config, size: Size, layer_use: LayerUse, content: PixelKind | None) -> dict[str, ArraySpec]:
    """The arrays of pixels or features of a stage of `config` whose canvas has this (height, width)."""
    averaged, guides = config.optimizer.average > 0, layer_use.guides.arrays
    layout = StageLayout(size, config.store.chunk_px, config.state, layer_use.content_widths, averaged, content, guides)
    return layout.arrays()


def _choose_tile(work: Workload, device_memory_bytes: int) -> int:
    """The largest tile that fits the limits, or the one asked for. Raises ConfigError if none does."""
    chunk_px, limit = work.config.store.chunk_px, work.config.memory.limit_bytes
    largest = ceil_to(min(max(max(canvas) for canvas in work.canvases), MAX_AUTO_TILE_PX), chunk_px)
    asked = work.config.compute.tile_px
    candidates = list(range(largest, 0, -chunk_px)) if asked == "auto" else [int(asked)]
    if work.device != "cpu":
        candidates = [tile_px for tile_px in candidates if work.has_gpu_sizes(tile_px)] or candidates[-1:]
    host, on_device = {"tiles": 0}, 0
    for tile_px in candidates:
        host = work.host_bytes(tile_px)
        on_device = work.gpu_bytes(tile_px)
        if max(host.values()) <= limit and on_device <= device_memory_bytes:
            return tile_px
    phase = max(host, key=lambda name: host[name])
    what, need, have, remedy = (
        (f"host memory (phase: {phase})", host[phase], limit, "raise memory.limit")
        if host[phase] > limit
        else (f"memory of {work.device}", on_device, device_memory_bytes, "use a device with more memory")
    )
    raise ConfigError(
        f"compute.tile_px: {asked} needs {need / 2**30:.2f} GiB of {what}, but {have / 2**30:.2f} GiB is the limit"
        + (f", even with the smallest tile ({chunk_px} px, one chunk)" if asked == "auto" else "")
        + f". To go on, {remedy}, or use "
        + ("a smaller store.chunk_px" if asked == "auto" else "compute.tile_px: auto")
        + (", fewer compute.workers" if work.config.compute.workers else "")
        + " or a narrower network."
    )
