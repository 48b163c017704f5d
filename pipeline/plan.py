"""What a run will do and need, as pure sums over the config and the image headers; nothing is rendered.

`run` refuses what does not fit, and a test holds measured memory to what is projected here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from pipeline.config import Config
from pipeline.errors import ConfigError, InputError
from pipeline.layers import LAYER_BY_NAME, Layer, ceil_to, halo_px, min_side_px, needed_layers
from pipeline.tiling import Tile, grid

MIB = 2**20
# Tasks in flight: one reads the next tile, one computes, one writes the last.
WORKERS = 3
# Resident memory of the program before it touches a picture: interpreter, torch, dask, zarr, libvips.
BASE_BYTES = {"cpu": 420 * MIB, "gpu": 1600 * MIB}
# What the kernels and the allocator take beyond the feature maps: measured by tools/bench_memory.py.
ACTIVATION_OVERHEAD = 1.25


class ImageSize(Protocol):
    """What the plan needs of an image's header."""

    @property
    def width_px(self) -> int:
        """Columns as shown, after EXIF orientation."""

    @property
    def height_px(self) -> int:
        """Rows as shown."""

    @property
    def bits(self) -> int:
        """Bits per channel in the file."""

    @property
    def decode_bytes(self) -> int:
        """Host memory that decoding takes beyond streaming: the whole image for a progressive JPEG."""


@dataclass(frozen=True)
class StagePlan:
    """One stage: sizes in px (height, width), tiles, pixels computed per iteration, and bytes of its arrays."""

    index: int
    size: tuple[int, int]
    style_sizes: tuple[tuple[int, int], ...]
    tiles: int
    gram_px: int
    gradient_px: int
    store_bytes: int
    flop_per_iteration: int

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
    output_bytes: int
    flop: int
    memory_limit_bytes: int

    @property
    def projected_mem_bytes(self) -> int:
        """Peak resident host memory of the run, page cache not counted: that of its largest phase."""
        return max(self.host_bytes.values())

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON-able data."""
        return {**asdict(self), "projected_mem_bytes": self.projected_mem_bytes}


@dataclass(frozen=True)
class Model:
    """The network as the plan sees it: widths and the layers that the losses use."""

    widths: Mapping[str, int]
    style_layers: tuple[str, ...]
    content_layers: tuple[str, ...]
    itemsize: int

    @property
    def names(self) -> tuple[str, ...]:
        """All layers in use."""
        return self.style_layers + self.content_layers

    def channels(self) -> list[tuple[Layer, int, int]]:
        """(layer, channels in, channels out) of every row of the table that runs."""
        rows, channels = [], 3
        for layer in needed_layers(self.names):
            out = self.widths.get(layer.name, channels)
            rows.append((layer, channels, out))
            channels = out
        return rows

    def flop_per_px(self) -> int:
        """Forward floating-point operations per canvas pixel: 2·9·C_in·C_out per position."""
        return sum(
            18 * c_in * c_out // layer.stride**2 for layer, c_in, c_out in self.channels() if layer.kind == "conv"
        )

    def gradient_bytes_per_px(self) -> int:
        """Device bytes per outer pixel of the gradient pass: feature maps, pooling indices, seeds, gradients."""
        maps = 4 * 3 * self.itemsize  # the tile, its scaled copy and their gradients
        largest = 0
        for layer, c_in, c_out in self.channels():
            positions = 1 / layer.stride**2
            maps += int(c_out * positions * self.itemsize)
            if layer.kind == "pool":
                maps += int(c_out * positions * 8)  # int64 indices of the maxima
            if layer.name in self.names:
                maps += int(c_out * positions * self.itemsize)  # its seed
            largest = max(largest, int((c_in + c_out) * positions * self.itemsize))
        return maps + largest

    def forward_bytes_per_px(self) -> int:
        """Device bytes per outer pixel of a pass without gradient: its two largest neighbouring maps."""
        pairs = (c_in * (4 if layer.kind == "pool" else 1) + 2 * c_out for layer, c_in, c_out in self.channels())
        strides = (layer.stride**2 for layer, _, _ in self.channels())
        return max(int(pair * self.itemsize / area) for pair, area in zip(pairs, strides, strict=True))


def model_of(config: Config, widths: Mapping[str, int]) -> Model:
    """The layers that carry weight in `config`. Raises InputError if the weights file lacks one of them."""
    style = tuple(config.network.style_layers) if config.loss.style_weight > 0 else ()
    content = tuple(config.network.content_layers) if config.loss.content_weight > 0 else ()
    missing = [name for name in style + content if name not in widths]
    if missing:
        raise InputError(
            f"{config.network.weights}: has no layer {', '.join(missing)}, which network.style_layers or "
            f"content_layers asks for. It has {', '.join(widths)}."
        )
    return Model(widths, style, content, 8 if config.compute.dtype == "float64" else 4)


def fit(size: tuple[int, int], long_px: int) -> tuple[int, int]:
    """(height, width) of `size` scaled so that its long side is exactly `long_px`."""
    height, width = size
    scale = long_px / max(size)
    return (long_px, max(1, round(width * scale))) if height >= width else (max(1, round(height * scale)), long_px)


def stage_sizes(
    content: tuple[int, int], styles: Sequence[tuple[int, int]], initial_px: int, target_px: int | None
) -> list[tuple[tuple[int, int], tuple[tuple[int, int], ...]]]:
    """(canvas size, style sizes) of every stage, sizes as (height, width); algorithm.md, "Stages".

    K + 1 stages, K the least with r0·2^K at least the long side of the result and of every style.
    """
    target = target_px or max(content)
    longest = max(target, *(max(style) for style in styles))
    stages, long_px = [], initial_px
    while True:
        canvas = fit(content, min(long_px, target))
        stages.append((canvas, tuple(fit(style, min(long_px, max(style))) for style in styles)))
        if long_px >= longest:
            return stages
        long_px *= 2


def make_plan(
    config: Config,
    content: ImageSize,
    styles: Sequence[ImageSize],
    widths: Mapping[str, int],
    device: str,
    device_memory_bytes: int,
) -> Plan:
    """Plan the run of `config`.

    `device_memory_bytes`: what a GPU has free; not looked at for the CPU, where memory.limit rules.
    Raises ConfigError if it cannot fit in memory, InputError if an image or the weights cannot serve.
    """
    model = model_of(config, widths)
    sizes = stage_sizes(
        (content.height_px, content.width_px),
        [(style.height_px, style.width_px) for style in styles],
        config.initial_size,
        config.size,
    )
    _check_sizes(config, model, sizes)
    tile_px = _choose_tile(config, model, sizes, (content, *styles), device, device_memory_bytes)
    stages = tuple(_plan_stage(config, model, index, size, tile_px) for index, size in enumerate(sizes))
    finished = [canvas_bytes(stage.size, config) for stage in stages]
    disk = max(stage.store_bytes + sum(finished[: stage.index]) for stage in stages)
    last = stages[-1]
    return Plan(
        stages=stages,
        tile_px=tile_px,
        chunk_px=config.store.chunk_px,
        halo_px=halo_px(model.names),
        device=device,
        host_bytes=_host_bytes(config, model, sizes, (content, *styles), tile_px, device),
        device_bytes=_device_bytes(config, model, sizes, tile_px),
        disk_bytes=disk,
        output_bytes=int(last.pixels * 3 * config.export.bits / 8 * 4 / 3),  # a pyramid adds a third
        flop=sum(stage.flop_per_iteration * config.optimizer.max_iterations for stage in stages),
        memory_limit_bytes=config.memory.limit_bytes,
    )


def _check_sizes(
    config: Config, model: Model, sizes: list[tuple[tuple[int, int], tuple[tuple[int, int], ...]]]
) -> None:
    """Refuse images too small for the network at some stage."""
    canvas, styles = sizes[0]
    named = [("content", config.content, canvas, model.names)]
    named += [
        ("style", style.image, size, model.style_layers) for style, size in zip(config.styles, styles, strict=True)
    ]
    for what, path, size, names in named:
        least = min_side_px(names, config.network.padding) if names else 1
        if min(size) < least:
            raise InputError(
                f"{what} image {path}: its first stage is {size[1]}×{size[0]} px, but the deepest layer in use needs "
                f"{least} px on each side ({config.network.padding} padding). Use a larger image, a larger "
                "initial_size, or shallower layers."
            )


def _plan_stage(
    config: Config, model: Model, index: int, sizes: tuple[tuple[int, int], tuple[tuple[int, int], ...]], tile_px: int
) -> StagePlan:
    size, style_sizes = sizes
    tiles = grid(*size, tile_px)
    gram_px = computed_px(tiles, halo_px(model.style_layers)) if model.style_layers else 0
    gradient_px = computed_px(tiles, 2 * halo_px(model.names))
    return StagePlan(
        index=index,
        size=size,
        style_sizes=style_sizes,
        tiles=len(tiles),
        gram_px=gram_px,
        gradient_px=gradient_px,
        store_bytes=store_bytes(size, style_sizes, model, config),
        # the backward pass to the pixels costs as much as the forward one: no weight has a gradient
        flop_per_iteration=model.flop_per_px() * (gram_px + 2 * gradient_px),
    )


def computed_px(tiles: Sequence[Tile], halo: int) -> int:
    """Pixels that a pass over `tiles` computes, halo included."""
    return sum(tile.outer(halo).area for tile in tiles)


def _array_bytes(size: tuple[int, int], channels: int, chunk_px: int, itemsize: int) -> int:
    """Bytes of an uncompressed array; chunks at the far border are stored whole."""
    return ceil_to(size[0], chunk_px) * ceil_to(size[1], chunk_px) * channels * itemsize


def canvas_bytes(size: tuple[int, int], config: Config) -> int:
    """Bytes of one float canvas: what a finished stage keeps."""
    return _array_bytes(size, 3, config.store.chunk_px, 8 if config.compute.dtype == "float64" else 4)


def store_bytes(size: tuple[int, int], style_sizes: Sequence[tuple[int, int]], model: Model, config: Config) -> int:
    """Bytes of all arrays of one stage: content u1, canvas, m, v twice, gradient, content features, styles u1."""
    chunk_px = config.store.chunk_px
    features = 0
    for name in model.content_layers:
        stride = LAYER_BY_NAME[name].stride
        positions = (size[0] // stride, size[1] // stride)
        features += _array_bytes(positions, model.widths[name], chunk_px // stride, model.itemsize)
    styles = max(_array_bytes(style, 3, chunk_px, 1) for style in style_sizes)  # one at a time, deleted after use
    return _array_bytes(size, 3, chunk_px, 1) + 7 * canvas_bytes(size, config) + features + styles


def _largest_outer_px(sizes: Sequence[tuple[int, int]], tile_px: int, halo: int) -> int:
    return max(min(height, tile_px + 2 * halo) * min(width, tile_px + 2 * halo) for height, width in sizes)


def _device_bytes(
    config: Config, model: Model, sizes: list[tuple[tuple[int, int], tuple[tuple[int, int], ...]]], tile_px: int
) -> int:
    """Peak bytes of feature maps and their companions, wherever the network runs."""
    canvases = [canvas for canvas, _ in sizes]
    styles = [style for _, row in sizes for style in row]
    gradient = _largest_outer_px(canvases, tile_px, 2 * halo_px(model.names)) * model.gradient_bytes_per_px()
    forward = _largest_outer_px([*canvases, *styles], tile_px, halo_px(model.names)) * model.forward_bytes_per_px()
    weights = sum(9 * c_in * c_out * model.itemsize for layer, c_in, c_out in model.channels() if layer.kind == "conv")
    return int(max(gradient, forward) * ACTIVATION_OVERHEAD) + 2 * weights


def _host_bytes(
    config: Config,
    model: Model,
    sizes: list[tuple[tuple[int, int], tuple[tuple[int, int], ...]]],
    images: Sequence[ImageSize],
    tile_px: int,
    device: str,
) -> dict[str, int]:
    """Projected resident bytes of every phase of the run."""
    base = BASE_BYTES["cpu" if device == "cpu" else "gpu"]
    compute = _device_bytes(config, model, sizes, tile_px) if device == "cpu" else 0
    canvases = [canvas for canvas, _ in sizes]
    window = _largest_outer_px(canvases, tile_px, 2 * halo_px(model.names)) * 3 * model.itemsize
    features = sum(
        _largest_outer_px(canvases, tile_px, 2 * halo_px(model.names))
        // LAYER_BY_NAME[name].stride ** 2
        * model.widths[name]
        * model.itemsize
        for name in model.content_layers
    )
    chunk = config.store.chunk_px**2 * 3 * model.itemsize
    width = max(size[1] for size in canvases)
    grams = sum(model.widths[name] ** 2 * 8 for name in model.style_layers)
    styles = [[style_sizes[index] for _, style_sizes in sizes] for index in range(len(images) - 1)]
    ingest = (
        _ingest_bytes(image, max(size[1] for size in targets), config.store.chunk_px)
        for image, targets in zip(images, [canvases, *styles], strict=True)
    )
    return {
        "ingest": base + max(ingest),
        "upsample": base + WORKERS * 6 * chunk,
        "tiles": base + compute + WORKERS * (2 * window + features + chunk + grams) + 2 * grams,
        "update": base + WORKERS * 5 * chunk,
        "export": base + _export_bytes(width, config.export.bits),
    }


def _ingest_bytes(image: ImageSize, width_px: int, band_px: int) -> int:
    """Decoding, resizing and handing over one image: upper bounds fitted to measurements (docs/log.md)."""
    rows = 9_000 * image.width_px * image.bits // 8 + (4_000 * width_px if width_px > image.width_px else 0)
    return 40 * MIB + image.decode_bytes + rows + 3 * band_px * width_px * 3


def _export_bytes(width_px: int, bits: int) -> int:
    """Two bands of rows, what the encoders hold, and the reader's own rows; fitted to measurements (docs/log.md)."""
    band = min(64 * MIB, 512 * width_px * 3 * bits // 8)
    return 40 * MIB + 3 * band + 8_000 * width_px * bits // 8


def _choose_tile(
    config: Config,
    model: Model,
    sizes: list[tuple[tuple[int, int], tuple[tuple[int, int], ...]]],
    images: Sequence[ImageSize],
    device: str,
    device_memory_bytes: int,
) -> int:
    """The largest tile that fits the limits, or the one asked for. Raises ConfigError if none does."""
    chunk_px = config.store.chunk_px
    largest = ceil_to(max(max(canvas) for canvas, _ in sizes), chunk_px)
    asked = config.compute.tile_px
    candidates = range(largest, 0, -chunk_px) if asked == "auto" else [int(asked)]
    host = on_device = 0
    for tile_px in candidates:
        host = max(_host_bytes(config, model, sizes, images, tile_px, device).values())
        on_device = 0 if device == "cpu" else _device_bytes(config, model, sizes, tile_px)
        if host <= config.memory.limit_bytes and on_device <= device_memory_bytes:
            return tile_px
    what, need, have, where = (
        ("host memory", host, config.memory.limit_bytes, "memory.limit")
        if host > config.memory.limit_bytes
        else ("memory of " + device, on_device, device_memory_bytes, "the memory of another device")
    )
    raise ConfigError(
        f"compute.tile_px: {asked} needs {need / 2**30:.2f} GiB of {what}, but {have / 2**30:.2f} GiB is the limit"
        + (f", even with the smallest tile ({chunk_px} px, one chunk)" if asked == "auto" else "")
        + f". Raise {where}, or use "
        + ("a smaller store.chunk_px" if asked == "auto" else "compute.tile_px: auto")
        + " or a narrower network."
    )
