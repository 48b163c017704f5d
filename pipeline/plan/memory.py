"""The memory of a run: bytes in every phase, as pure sums over its stages.

The results are upper bounds: a test compares measured memory with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pipeline.config import Config
from pipeline.core.image_formats import RGB8, PixelKind, format_of, picture_kind
from pipeline.core.tiling import Size, tile_step_px
from pipeline.core.vgg_layers import LAYER_BY_NAME
from pipeline.images import ImageHeader
from pipeline.plan.device import STAGING_THREADS, Device
from pipeline.plan.image_memory import MIB, export_bytes, ingest_bytes, levels_on_disk_bytes
from pipeline.plan.network_cost import LayerUse
from pipeline.plan.print_sheets import has_edges, sheets_of
from pipeline.plan.processes import WORKERS, most_ahead, update_processes, update_threads, update_values
from pipeline.plan.sizes import output_dpi
from pipeline.store import layer_of

# Resident memory of a process without images: interpreter, torch, dask, zarr, libvips, and what the heap keeps between
# passes. Measured in the second stage of 30,000 px: 440 MiB. On a GPU CUDA's libraries are in host memory too: whole
# runs measured at most 1.62 GiB.
BASE_BYTES = {"cpu": 440 * MIB, "gpu": 1600 * MIB}
# malloc_trim returns this much of it to the system before the phases of TRIMMED_PHASES (measured: 52 MiB and more).
TRIMMED_BYTES = 50 * MIB
TRIMMED_PHASES = ("ingest", "upsample", "export")
# The passes over tiles, as phases of the plan: over the styles for their Grams, the Gram pass, and the gradient pass.
TILE_PHASES = ("style statistics", "Gram pass", "gradient pass")
# Those in which a stage's arrays may stay in memory (plan/residency.py).
ITERATION_PHASES = ("Gram pass", "gradient pass", "update pass")
# GPU memory of CUDA's context and its libraries' kernels, in every worker process.
CONTEXT_BYTES = 700 * MIB
# Kernels' workspaces and the allocator's rounding add up to 12 % to the feature maps (tools/bench/memory.py).
ACTIVATION_OVERHEAD = 1.12
# A GPU's kernels index 2^31 values in 32 bits; with more they take three times as long. 1 % less,
# because the padding adds to a map.
_MAX_GPU_VALUES = 0.99 * 2**31


@dataclass(frozen=True)
class StageWork:
    """One stage: its config, the layers in use, and the sizes (height, width) of canvas and styles.

    `content`: the kind of the content's pixels, None without a content. `alphas`: whether each style has alpha.
    `scratch_bytes`: disk for turning its largest input upright.
    """

    config: Config
    layer_use: LayerUse
    canvas: Size
    styles: tuple[Size, ...]
    content: PixelKind | None
    alphas: tuple[bool, ...]
    scratch_bytes: int = 0

    def gpu_bytes(self, tile_px: int) -> int:
        """Peak bytes on a GPU: feature maps with their gradients, weights, and the tiles in flight."""
        layer_use, dtype = self.layer_use, self.config.compute.dtype
        itemsize = 2 if dtype == "bfloat16" else layer_use.itemsize
        copies = 1 if dtype == "float32" else 0  # cuDNN's kernels without tensor cores copy both maps to NCHW
        gradient = self.outer_px(tile_px) * layer_use.gradient_bytes_per_px(itemsize)
        forward = _largest_outer_px([self.canvas, *self.styles], tile_px, self.layer_use.halo_px)
        forward *= layer_use.forward_bytes_per_px(itemsize, copies)
        maps = int(max(gradient, forward) * ACTIVATION_OVERHEAD)
        flight = self.flight_bytes([self.canvas], tile_px, 2 * self.layer_use.halo_px)
        return maps + 2 * layer_use.parameters_bytes() + flight

    def outer_px(self, tile_px: int) -> int:
        """Pixels of the largest tile of the gradient pass, halo included. At coarser scales tiles have fewer."""
        return _largest_outer_px([self.canvas], tile_px, 2 * self.layer_use.halo_px)

    def staged_bytes(self) -> int:
        """Page-locked host buffers through which chunks reach a GPU, and the Grams that come back."""
        store, layer_use = self.config.store, self.layer_use
        values = [
            store.chunk_px**2 // LAYER_BY_NAME[layer_of(key)].stride ** 2 * width
            for key, width in layer_use.content_widths.items()
        ]
        largest = max(store.chunk_px**2 * 3, *values, 0) * layer_use.itemsize
        buffers = 2 * STAGING_THREADS  # each thread fills one while the GPU reads the other
        # torch rounds a page-locked buffer up to a power of two, so it may be twice as large as the chunk.
        return buffers * 2 * largest + 2 * (WORKERS + 1) * layer_use.grams_bytes()

    def forward_pass_bytes(self, sizes: Sequence[Size], tile_px: int) -> int:
        """Peak bytes of a pass without gradient on a CPU, over images of these sizes."""
        outer_px = _largest_outer_px(sizes, tile_px, self.layer_use.halo_px)
        maps = int(outer_px * self.layer_use.forward_bytes_per_px(self.layer_use.itemsize, 0) * ACTIVATION_OVERHEAD)
        flight = self.flight_bytes(sizes, tile_px, self.layer_use.halo_px, windows=1.5)
        return maps + 2 * self.layer_use.parameters_bytes() + flight

    def gradient_pass_bytes(self, tile_px: int) -> int:
        """Peak bytes of the gradient pass on a CPU."""
        outer_px = self.outer_px(tile_px)
        maps = int(outer_px * self.layer_use.gradient_bytes_per_px(self.layer_use.itemsize) * ACTIVATION_OVERHEAD)
        chunks = WORKERS * self.config.store.chunk_px**2 * 3 * self.layer_use.itemsize
        flight = self.flight_bytes([self.canvas], tile_px, 2 * self.layer_use.halo_px)
        return maps + 2 * self.layer_use.parameters_bytes() + flight + chunks

    def flight_bytes(self, sizes: Sequence[Size], tile_px: int, halo: int, windows: float = 2.0) -> int:
        """Windows, content features and Grams of the tiles in flight, without the feature maps.

        `windows`: copies of a window at a time, on average: stored, as floats, as network input, its gradient.
        """
        layer_use, masks = self.layer_use, len(self.layer_use.guides.arrays)
        # the windows of all scales wait for the device together, each shrunk
        outer_px = sum(_largest_outer_px(sizes, tile_px, halo, scale) for scale in range(layer_use.scales))
        window = outer_px * (3 * layer_use.itemsize + masks)
        features = sum(
            outer_px // LAYER_BY_NAME[name].stride ** 2 * layer_use.widths[name] * layer_use.itemsize
            for name in layer_use.content_layers
        )
        grams = layer_use.grams_bytes()
        return (
            WORKERS * (int(windows * window) + self._coarse_bytes(sizes, tile_px, halo) + features + grams) + 2 * grams
        )

    def _coarse_bytes(self, sizes: Sequence[Size], tile_px: int, halo: int) -> int:
        """Bytes of the window of the coarsest scale while it is read and shrunk: stored, and as floats."""
        coarsest, masks = self.layer_use.scales - 1, len(self.layer_use.guides.arrays)
        if not coarsest:
            return 0
        return _largest_outer_px(sizes, tile_px, halo << coarsest) * max(6 * self.layer_use.itemsize, 9 * masks)


@dataclass(frozen=True)
class Workload:
    """Everything that memory depends on, except the tile size.

    `images`: the header of every input image. `weights_bytes`: size of the weights file, which is in memory while it
    is read.
    """

    config: Config
    stages: Sequence[StageWork]
    images: Mapping[Path, ImageHeader]
    weights_bytes: int
    device: Device

    @property
    def on_cpu(self) -> bool:
        """Whether tiles are computed on a CPU."""
        return self.device.name == "cpu"

    @property
    def fewer_processes(self) -> str:
        """A remedy for a plan that does not fit: what a run with several processes can do without."""
        if self.device.processes:
            return ", fewer compute.devices"
        return ", fewer compute.workers" if self.config.compute.workers else ""

    @property
    def picture(self) -> PixelKind:
        """The kind of the output image's pixels."""
        export = self.config.export
        content = self.stages[-1].content or RGB8
        return picture_kind(self.config.output, export.bits, export.compression, content)

    @property
    def _written_rows(self) -> PixelKind:
        """The pixels that the export reads; those for a printer's profile have 16 bits, whatever the output has."""
        tables = isinstance(self.config.export.profile, Path) or self.config.export.profile == "content"
        return PixelKind(16, self.picture.alpha) if tables else self.picture

    @property
    def tile_step_px(self) -> int:
        """What the side of a tile is a multiple of."""
        return tile_step_px(self.config.store.chunk_px, max(stage.layer_use.scales for stage in self.stages))

    @property
    def _is_tiff(self) -> bool:
        form = format_of(self.config.output)
        return form is not None and form.name == "TIFF"

    @cached_property
    def output_dpi(self) -> float:
        """The resolution of the output images."""
        return output_dpi(self.config, self.stages[-1].canvas, self.images)

    @cached_property
    def output_sizes(self) -> Mapping[Path, Size]:
        """The (height, width) of every output image, by its path."""
        options = self.config.export.model_copy(update={"dpi": self.output_dpi})
        return {sheet.path: sheet.size for sheet in sheets_of(self.config.output, self.stages[-1].canvas, options)}

    @property
    def levels_bytes(self) -> int:
        """Disk that a TIFF's smaller levels take, beside the output, while it is written."""
        export = self.config.export
        if not (self._is_tiff and export.has_levels):
            return 0
        return max(levels_on_disk_bytes(size, self.picture, export.compression) for size in self.output_sizes.values())

    @property
    def _itemsize(self) -> int:
        return self.stages[0].layer_use.itemsize

    def gpu_bytes(self, tile_px: int) -> int:
        """Peak bytes on a GPU: of its process, or of all worker processes, which share it; 0 on a CPU."""
        if self.on_cpu:
            return 0
        process = max(stage.gpu_bytes(tile_px) for stage in self.stages)
        if self.device.processes:  # the free memory was measured without their contexts
            return process + CONTEXT_BYTES
        workers = self.config.compute.workers
        return workers * (process + CONTEXT_BYTES) if workers else process

    def has_gpu_sizes(self, tile_px: int) -> bool:
        """Whether every feature map of a tile has few enough values for a GPU's fast kernels."""
        return all(
            stage.outer_px(tile_px) * stage.layer_use.largest_values_per_px() < _MAX_GPU_VALUES for stage in self.stages
        )

    def host_bytes(self, tile_px: int) -> dict[str, int]:
        """Projected resident bytes of every phase of the run, over all its processes, without the page cache.

        Tasks run in the run's own process, or in each of its worker processes; all else runs in its own process. Of a
        run on a cluster: bytes of the largest process, which may be on any machine.
        """
        base = BASE_BYTES["cpu" if self.on_cpu else "gpu"]
        chunk = self.config.store.chunk_px**2 * 3 * self._itemsize
        workers = self.config.compute.workers
        # a worker that also computes tiles has threads for both, and buffers in each
        update = self.update_bytes() * (2 if (workers and not self.device.processes) or self.device.cluster else 1)
        own = {"ingest": self._ingest_bytes(), "export": self._export_bytes()}
        tiles = {"weights": self.weights_bytes, **self._tiles_bytes(tile_px)}
        if self.device.processes or self.device.cluster:
            own["upsample"] = WORKERS * 6 * chunk
            return self._spread_bytes(own, tiles, update)
        in_tasks = {
            "weights": self.weights_bytes,
            "upsample": WORKERS * 6 * chunk,
            **{phase: size + update for phase, size in self._tiles_bytes(tile_px).items()},
            "update pass": update,
        }
        if workers == 0:
            phases = {phase: base + size for phase, size in {**own, **in_tasks}.items()}
            trimmed = TRIMMED_BYTES if self.on_cpu else 0
            return phases | {phase: phases[phase] - trimmed for phase in TRIMMED_PHASES}
        idle = base + max(stage.layer_use.parameters_bytes() for stage in self.stages)  # of a worker process
        processes = {phase: base + size + workers * idle for phase, size in own.items()}
        processes |= {phase: base + workers * (idle + size) for phase, size in in_tasks.items()}
        # Grams of finished tiles wait in the run's process for those of earlier tiles: sums are in tile order.
        grams = max(stage.layer_use.grams_bytes() for stage in self.stages)
        for phase in TILE_PHASES:
            processes[phase] += (workers * (WORKERS + 1) + 4) * grams
        return processes

    def _spread_bytes(self, own: Mapping[str, int], tiles: Mapping[str, int], update: int) -> dict[str, int]:
        """Bytes of each phase where tiles and updates have processes of their own, or a cluster.

        `own`: of the run's process; `tiles`: of each process that computes; `update`: of each that updates.
        """
        base, small = BASE_BYTES["cpu" if self.on_cpu else "gpu"], BASE_BYTES["cpu"]
        idle = base + max(stage.layer_use.parameters_bytes() for stage in self.stages)
        grams = max(stage.layer_use.grams_bytes() for stage in self.stages)
        if self.device.cluster:
            waiting = (most_ahead(self.device) + 4) * grams
            processes = {phase: small + size for phase, size in own.items()}
            processes |= {phase: idle + size + update + waiting for phase, size in tiles.items()}
            return processes | {"update pass": idle + update + waiting}
        computing, updating = len(self.device.processes), update_processes(self.config.compute, self.device)
        resting = base + computing * idle + updating * small
        processes = {phase: resting + size for phase, size in own.items()}
        # Grams of finished tiles wait for those of earlier tiles: sums are in tile order
        waiting = (computing * (WORKERS + 1) + 4) * grams
        processes |= {phase: resting + computing * size + updating * update + waiting for phase, size in tiles.items()}
        return processes | {"update pass": resting + updating * update}

    def update_bytes(self) -> int:
        """Peak bytes of the update pass's threads of a process, which they keep into the next pass.

        A thread holds a block of gradient, canvas, m, v and |u|, and of the canvases' average in a run that has one.
        """
        store = self.config.store
        values = store.chunk_px**2 * 3
        averages = max(int(stage.config.optimizer.average > 0) for stage in self.stages)
        if store.state_dtype == "float":
            stored, per_value = self._itemsize, (5 + averages) * self._itemsize
        else:  # stored in 2 bytes, decoded to float32 (the average reuses m's buffer), and two buffers of the encoder
            stored, per_value = 2, (4 + averages) * 2 + (5 + 2) * 4
        # A compressed chunk is held whole: four are read, three written, and one of them is in its codec.
        whole = 0 if store.codec == "none" else (7 + 2 * averages + 2) * values * stored
        device = self.device
        threads = update_threads(device.name, update_processes(self.config.compute, device) or 1)
        if device.cluster or (self.config.compute.workers and not device.processes):
            threads = WORKERS
        return threads * (update_values(device.name, store.chunk_px) * per_value + whole)

    def _tiles_bytes(self, tile_px: int) -> dict[str, int]:
        """Peak bytes of each pass over tiles: one tile that is computed, and the windows of those in flight."""
        if not self.on_cpu:
            return dict.fromkeys(TILE_PHASES, max(stage.staged_bytes() for stage in self.stages))
        passes = [
            (
                stage.forward_pass_bytes(stage.styles, tile_px),
                stage.forward_pass_bytes([stage.canvas], tile_px),  # the Gram pass, and the content pass before it
                stage.gradient_pass_bytes(tile_px),
            )
            for stage in self.stages
        ]
        return dict(zip(TILE_PHASES, map(max, zip(*passes, strict=True)), strict=True))

    def _export_bytes(self) -> int:
        """Peak bytes of writing the largest output image."""
        options = self.config.export
        largest = max(self.output_sizes.values(), key=lambda size: size[0] * size[1])
        return export_bytes(
            largest,
            self._written_rows,
            tiff=self._is_tiff,
            pyramid=options.has_levels,
            compression=options.compression,
            edges=has_edges(options),
        )

    def _ingest_bytes(self) -> int:
        """Peak bytes of reading the most expensive image, at the width that it is resized to."""
        chunk_px = self.config.store.chunk_px
        targets = self._ingest_targets()
        in_float = self.config.canvas_space != "srgb" or self.config.proof is not None
        return max(
            (ingest_bytes(self.images[path], width, chunk_px, kind, in_float) for path, width, kind in targets),
            default=0,
        )

    def _ingest_targets(self) -> Iterator[tuple[Path, int, PixelKind]]:
        """(image, width in px that it is resized to, kind of pixels stored) for every image of every stage."""
        if isinstance(self.config.init, Path):
            yield self.config.init, self.stages[0].canvas[1], RGB8
        for stage in self.stages:
            if self.config.content is not None and stage.content is not None:
                yield self.config.content, stage.canvas[1], stage.content
            for style, (_height, width) in zip(stage.config.styles, stage.styles, strict=True):
                yield style.image, width, RGB8
            for path in stage.config.masks:
                yield path, stage.canvas[1], RGB8


def _largest_outer_px(sizes: Sequence[Size], tile_px: int, halo: int, scale: int = 0) -> int:
    """Pixels of the largest outer rectangle over images of these sizes, shrunk to a scale; 0 without images."""
    tile_px >>= scale
    areas = (
        _longest(height >> scale, tile_px, halo) * _longest(width >> scale, tile_px, halo) for height, width in sizes
    )
    return max(areas, default=0)


def _longest(side_px: int, tile_px: int, halo: int) -> int:
    """The longest side of an outer rectangle: among the first three tiles is one with a halo on both sides, if any."""
    starts = range(0, min(side_px, 3 * tile_px), tile_px)
    return max(min(side_px, start + tile_px + halo) - max(0, start - halo) for start in starts)
