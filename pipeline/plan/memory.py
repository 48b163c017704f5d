"""What a run costs: bytes of memory in every phase, as pure sums over its stages.

The figures are upper bounds: a test holds measured memory to them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipeline.config.config import Config
from pipeline.core.image_formats import RGB8, PixelKind, format_of, picture_kind
from pipeline.core.tiling import Size
from pipeline.core.vgg_layers import LAYER_BY_NAME, halo_px
from pipeline.plan.device import STAGING_THREADS
from pipeline.plan.network_cost import LayerUse

MIB = 2**20
# Tasks in flight in a process: one reads the next tile, one computes, one writes the last.
WORKERS = 3
# Resident memory of a process beside its pictures: interpreter, torch, dask, zarr, libvips, and what passes keep.
BASE_BYTES = {"cpu": 440 * MIB, "gpu": 1600 * MIB}
# What of that a CPU's process has given back before a stage is prepared, and before the export.
TRIMMED_BYTES = 50 * MIB
TRIMMED_PHASES = ("ingest", "upsample", "export")
# Threads of the update pass where a GPU leaves the cores to it; more do not make it faster (docs/benchmarks.md).
MAX_UPDATE_THREADS = 8
# Values of a chunk that the update pass has in hand at a time: 64 rows of 512 px, five arrays of which fit a cache.
BLOCK_VALUES = 98_304
# The passes over tiles, as the plan's phases: of the styles' Grams, the Gram pass, and the gradient pass.
TILE_PHASES = ("style statistics", "Gram pass", "gradient pass")
# Of a GPU, what CUDA and its libraries take in every worker process.
CONTEXT_BYTES = 700 * MIB
# What the kernels and the allocator take beyond the feature maps: measured by tools/bench/memory.py.
ACTIVATION_OVERHEAD = 1.12


# libvips puts a level of a TIFF that is larger into a file until the largest is written, and keeps others in memory.
LEVEL_BYTES = 100 * MIB


def update_values(device: str, chunk_px: int) -> int:
    """Values of a chunk that the update pass has in hand at a time.

    A block fits a core's cache; but many threads would spend their time on handing each other Python's lock.
    """
    whole = chunk_px**2 * 3
    return min(whole, BLOCK_VALUES) if device == "cpu" else whole


def update_threads(device: str) -> int:
    """Threads of the update pass in the run's own process. A CPU's cores have the network to compute besides."""
    spare = 0 if device == "cpu" else len(os.sched_getaffinity(0)) - WORKERS
    return max(WORKERS, min(spare, MAX_UPDATE_THREADS))


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

    @property
    def kind(self) -> PixelKind:
        """What of its pixels can be kept."""


@dataclass(frozen=True)
class StageWork:
    """One stage: its config, the layers that count in it, the sizes (height, width) of canvas and styles, the content.

    `content`: what its pixels are; None where there is none.
    """

    config: Config
    layer_use: LayerUse
    canvas: Size
    styles: tuple[Size, ...]
    content: PixelKind | None

    @property
    def halo_px(self) -> int:
        """Forward halo of its tiles, which is the backward one too."""
        return halo_px(self.layer_use.names)

    def gpu_bytes(self, tile_px: int) -> int:
        """Peak bytes on a GPU: feature maps and their companions, and the tiles in flight."""
        layer_use, dtype = self.layer_use, self.config.compute.dtype
        itemsize = 2 if dtype == "bfloat16" else layer_use.itemsize
        copies = 1 if dtype == "float32" else 0  # cuDNN's kernels without tensor cores want NCHW
        gradient = self.outer_px(tile_px) * layer_use.gradient_bytes_per_px(itemsize)
        forward = _largest_outer_px([self.canvas, *self.styles], tile_px, self.halo_px)
        forward *= layer_use.forward_bytes_per_px(itemsize, copies)
        maps = int(max(gradient, forward) * ACTIVATION_OVERHEAD)
        return maps + 2 * layer_use.parameters_bytes() + self.flight_bytes(self.outer_px(tile_px))

    def outer_px(self, tile_px: int) -> int:
        """Pixels of the largest tile of the gradient pass, halo included."""
        return _largest_outer_px([self.canvas], tile_px, 2 * self.halo_px)

    def staged_bytes(self) -> int:
        """Page-locked buffers through which chunks go to a GPU, each of twice its size at most, and Grams."""
        store, layer_use = self.config.store, self.layer_use
        values = [
            store.chunk_px**2 // LAYER_BY_NAME[name].stride ** 2 * w for name, w in layer_use.content_widths.items()
        ]
        largest = max(store.chunk_px**2 * 3, *values, 0) * layer_use.itemsize
        return STAGING_THREADS * 2 * 2 * largest + 2 * (WORKERS + 1) * layer_use.grams_bytes()

    def forward_pass_bytes(self, sizes: Sequence[Size], tile_px: int) -> int:
        """Peak bytes of a CPU's pass without gradient over images of these sizes, and what is in flight beside."""
        outer_px = _largest_outer_px(sizes, tile_px, self.halo_px)
        maps = int(outer_px * self.layer_use.forward_bytes_per_px(self.layer_use.itemsize, 0) * ACTIVATION_OVERHEAD)
        return maps + 2 * self.layer_use.parameters_bytes() + self.flight_bytes(outer_px, windows=1.5)

    def gradient_pass_bytes(self, tile_px: int) -> int:
        """Peak bytes of the gradient pass, as above."""
        outer_px = self.outer_px(tile_px)
        maps = int(outer_px * self.layer_use.gradient_bytes_per_px(self.layer_use.itemsize) * ACTIVATION_OVERHEAD)
        chunks = WORKERS * self.config.store.chunk_px**2 * 3 * self.layer_use.itemsize
        return maps + 2 * self.layer_use.parameters_bytes() + self.flight_bytes(outer_px) + chunks

    def flight_bytes(self, outer_px: int, windows: float = 2.0) -> int:
        """Windows, features and Grams of the tiles in flight, without what they compute with.

        `windows`: of one tile, on the average: as stored and as numbers, as the network sees them, their gradient.
        """
        layer_use = self.layer_use
        window = outer_px * 3 * layer_use.itemsize
        features = sum(
            outer_px // LAYER_BY_NAME[name].stride ** 2 * layer_use.widths[name] * layer_use.itemsize
            for name in layer_use.content_layers
        )
        window += outer_px * len(layer_use.guides.arrays)
        grams = layer_use.grams_bytes()
        return WORKERS * (int(windows * window) + features + grams) + 2 * grams


@dataclass(frozen=True)
class Workload:
    """Everything memory depends on, but for the tile size.

    `images`: the header of every input image. `weights_bytes`: size of the weights file, which is in memory for a
    moment while it is read. `device`: as torch names it.
    """

    config: Config
    stages: Sequence[StageWork]
    images: Mapping[Path, ImageSize]
    weights_bytes: int
    device: str

    @property
    def canvases(self) -> list[Size]:
        """The canvas size of every stage."""
        return [stage.canvas for stage in self.stages]

    @property
    def picture(self) -> PixelKind:
        """What the pixels of the output are."""
        export = self.config.export
        content = self.stages[-1].content or RGB8
        return picture_kind(self.config.output, export.bits, export.compression, content)

    @property
    def _is_tiff(self) -> bool:
        form = format_of(self.config.output)
        return form is not None and form.name == "TIFF"

    @property
    def _has_pyramid(self) -> bool:
        """Whether the output is a TIFF with smaller levels."""
        return self._is_tiff and self.config.export.pyramid

    @property
    def levels_bytes(self) -> int:
        """What a TIFF's smaller levels take on the disk beside it while it is written, where they are in files."""
        height_px, width_px = self.canvases[-1]
        size_bytes = height_px * width_px * self.picture.pixel_bytes
        return size_bytes // 3 if self._has_pyramid and size_bytes > 4 * LEVEL_BYTES else 0

    @property
    def _base_bytes(self) -> int:
        return BASE_BYTES["cpu" if self.device == "cpu" else "gpu"]

    @property
    def _idle_bytes(self) -> int:
        """Of a worker process that has nothing to do."""
        return self._base_bytes + max(stage.layer_use.parameters_bytes() for stage in self.stages)

    @property
    def _itemsize(self) -> int:
        return self.stages[0].layer_use.itemsize

    def gpu_bytes(self, tile_px: int) -> int:
        """Peak bytes on the GPU, which all worker processes share; 0 on a CPU."""
        if self.device == "cpu":
            return 0
        one = max(stage.gpu_bytes(tile_px) for stage in self.stages)
        workers = self.config.compute.workers
        return workers * (one + CONTEXT_BYTES) if workers else one

    def has_gpu_sizes(self, tile_px: int) -> bool:
        """Whether no feature map of a tile has more values than a GPU's kernels count in 32 bits.

        Beyond that they take three times as long.
        """
        return all(
            stage.outer_px(tile_px) * stage.layer_use.largest_values_per_px() < 0.99 * 2**31 for stage in self.stages
        )

    def host_bytes(self, tile_px: int) -> dict[str, int]:
        """Projected resident bytes of every phase of the run, all its processes together, page cache not counted.

        Tasks run in the run's own process, or in each of its worker processes; all else is in its own.
        """
        base = self._base_bytes
        chunk = self.config.store.chunk_px**2 * 3 * self._itemsize
        workers = self.config.compute.workers
        update = self.update_bytes() * (2 if workers else 1)  # a worker's threads for two passes all take turns
        own = {
            "ingest": self._ingest_bytes(),
            "export": export_bytes(self.canvases[-1], self.picture, tiff=self._is_tiff, pyramid=self._has_pyramid),
        }
        in_tasks = {
            "weights": self.weights_bytes,
            "upsample": WORKERS * 6 * chunk,
            **{phase: size + update for phase, size in self._tiles_bytes(tile_px).items()},
            "update pass": update,
        }
        if workers == 0:
            phases = {phase: base + size for phase, size in {**own, **in_tasks}.items()}
            trimmed = TRIMMED_BYTES if self.device == "cpu" else 0
            return phases | {phase: phases[phase] - trimmed for phase in TRIMMED_PHASES}
        idle = self._idle_bytes
        processes = {phase: base + size + workers * idle for phase, size in own.items()}
        processes |= {phase: base + workers * (idle + size) for phase, size in in_tasks.items()}
        # of the tiles' Grams that are done or on their way, those that wait for an earlier one, and the seeds
        grams = max(stage.layer_use.grams_bytes() for stage in self.stages)
        for phase in TILE_PHASES:
            processes[phase] += (workers * (WORKERS + 1) + 4) * grams
        return processes

    def update_bytes(self) -> int:
        """What the threads of the update pass keep, into the next pass: gradient, canvas, m, v and |u| of a block.

        And the average of the canvases, where a stage has one.
        """
        store = self.config.store
        values = store.chunk_px**2 * 3
        averages = max(int(stage.config.optimizer.average > 0) for stage in self.stages)
        if store.state_dtype == "float":
            stored, per_value = self._itemsize, (5 + averages) * self._itemsize
        else:  # the same unpacked (the average where m was), beside what is stored, and about two of the encodings' own
            stored, per_value = 2, (4 + averages) * 2 + (5 + 2) * 4
        # a compressed chunk is held whole: four are read, three written, and one of them is at its codec
        whole = 0 if store.codec == "none" else (7 + 2 * averages + 2) * values * stored
        threads = WORKERS if self.config.compute.workers else update_threads(self.device)
        return threads * (update_values(self.device, store.chunk_px) * per_value + whole)

    def _tiles_bytes(self, tile_px: int) -> dict[str, int]:
        """The passes over tiles: one tile that computes, and what belongs to those in flight."""
        if self.device != "cpu":
            return dict.fromkeys(TILE_PHASES, max(stage.staged_bytes() for stage in self.stages))
        passes = [
            (
                stage.forward_pass_bytes(stage.styles, tile_px),
                stage.forward_pass_bytes([stage.canvas], tile_px),  # of the content, and of the canvas
                stage.gradient_pass_bytes(tile_px),
            )
            for stage in self.stages
        ]
        return dict(zip(TILE_PHASES, map(max, zip(*passes, strict=True)), strict=True))

    def _ingest_bytes(self) -> int:
        """The image whose reading takes most, at the size that it is read at."""
        chunk_px = self.config.store.chunk_px
        return max(
            (_ingest_bytes(self.images[path], width_px, chunk_px, kind) for path, width_px, kind in self._targets()),
            default=0,
        )

    def _targets(self) -> Iterator[tuple[Path, int, PixelKind]]:
        """(image, width in px that it is read at, what is kept of its pixels), for every image of every stage."""
        if isinstance(self.config.init, Path):
            yield self.config.init, self.stages[0].canvas[1], RGB8
        for stage in self.stages:
            if self.config.content is not None and stage.content is not None:
                yield self.config.content, stage.canvas[1], stage.content
            for style, (_height, width) in zip(stage.config.styles, stage.styles, strict=True):
                yield style.image, width, RGB8
            for path in stage.config.masks:
                yield path, stage.canvas[1], RGB8


def _largest_outer_px(sizes: Sequence[Size], tile_px: int, halo: int) -> int:
    """Of no images, such as the styles of a run that has none, 0."""
    areas = (_longest(height, tile_px, halo) * _longest(width, tile_px, halo) for height, width in sizes)
    return max(areas, default=0)


def _longest(side_px: int, tile_px: int, halo: int) -> int:
    """The longest side of an outer rectangle along a canvas side: an inner tile's, if there is one."""
    starts = range(0, min(side_px, 3 * tile_px), tile_px)
    return max(min(side_px, start + tile_px + halo) - max(0, start - halo) for start in starts)


def _ingest_bytes(image: ImageSize, width_px: int, band_px: int, kept: PixelKind) -> int:
    """Decoding, resizing and handing over one image: upper bounds fitted to measurements (docs/log.md)."""
    rows = 9_000 * image.width_px * image.bits // 8 + (4_000 * width_px if width_px > image.width_px else 0)
    if kept.bits == 16 and width_px != image.width_px:
        rows = rows * 3 // 2  # resized in float
    return 40 * MIB + image.decode_bytes + rows * kept.channels // 3 + 3 * band_px * width_px * kept.pixel_bytes


def export_bytes(size: Size, kind: PixelKind, *, tiff: bool, pyramid: bool) -> int:
    """Two bands of rows, what the encoders hold, and the reader's own rows; fitted to measurements (docs/log.md).

    `pyramid`: and those smaller levels of a TIFF that libvips does not put into files until the largest is written.
    """
    height_px, width_px = size
    band = min(64 * MIB, 512 * width_px * kind.pixel_bytes)
    rows = (4_000 if tiff else 8_000) * width_px * kind.pixel_bytes // 3
    levels = _levels_in_memory(height_px * width_px * kind.pixel_bytes) if pyramid else 0
    return 40 * MIB + 3 * band + rows + levels


def _levels_in_memory(picture_bytes: int) -> int:
    """Of the smaller levels of a TIFF, each a quarter of the one before it."""
    level = picture_bytes / 4
    while level > 1.05 * LEVEL_BYTES:  # sides are rounded
        level /= 4
    return int(level * 4 / 3 * 1.02)
