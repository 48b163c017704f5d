"""The memory, disk and work of a run of `apply`: pure sums, upper bounds. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import AnyConfig, ApplyConfig
from pipeline.core.errors import ConfigError
from pipeline.core.image_formats import RGB8, PixelKind, compressed_bytes, format_of, picture_kind
from pipeline.core.text import size_text
from pipeline.core.tiling import Rect, Size
from pipeline.core.vgg_layers import ceil_to
from pipeline.feedforward import cost, geometry
from pipeline.feedforward.activations import Step
from pipeline.feedforward.arrays import CANVAS
from pipeline.feedforward.spec import Layered
from pipeline.images import ImageHeader
from pipeline.plan import BASE_BYTES, STAGING_THREADS, WORKERS, Device, Plan, Sheet, StagePlan, sheets_of
from pipeline.plan.image_memory import export_bytes, ingest_bytes, levels_on_disk_bytes
from pipeline.plan.memory import ACTIVATION_OVERHEAD, CONTEXT_BYTES
from pipeline.plan.print_sheets import has_edges
from pipeline.plan.sizes import output_dpi
from pipeline.rundir.paths import refuse_own_state
from pipeline.rundir.preflight import with_checked_output
from pipeline.store import ALPHA, STYLE, ArraySpec

_MAX_TILE_PX = 4096
# A tile far from all borders, of which the halo is measured.
_MIDDLE = Rect(2**18, 2**18 + 512, 2**18, 2**18 + 512)


@dataclass(frozen=True)
class ApplyWork:
    """Everything that the plan depends on. `steps`: the passes over each of `specs`."""

    config: ApplyConfig
    specs: tuple[Layered, ...]
    steps: tuple[tuple[Step, ...], ...]
    content_size: Size
    canvas: Size
    content: PixelKind
    images: Mapping[Path, ImageHeader]
    device: Device
    arrays: Mapping[str, ArraySpec]
    passes: int
    file_bytes: int
    one_at_a_time: bool = False
    notes: tuple[str, ...] = ()

    def checked_plan(self) -> Plan:
        """The plan, once all that can be refused is refused."""
        refuse_own_state(self.config.output, self.config.work_dir)
        return with_checked_output(self.config, self._plan(), self.images)

    @property
    def _itemsize(self) -> int:
        return 8 if self.config.compute.dtype == "float64" else 4

    def _plan(self) -> Plan:
        config = self.config
        dpi = output_dpi(config, self.canvas, self.images)
        sheets = sheets_of(config.output, self.canvas, config.export.model_copy(update={"dpi": dpi}))
        picture = picture_kind(config.output, config.export.bits, config.export.compression, self.content)
        tile_px = self._tile_px(sheets, picture)
        stage = self._stage(tile_px)
        output_px = sum(sheet.size[0] * sheet.size[1] for sheet in sheets)
        spec = max(self.specs, key=lambda one: len(one.layers))
        window = geometry.window(spec, (10**6, 10**6), spec.layers, _MIDDLE)
        return Plan(
            stages=(stage,),
            tile_px=tile_px,
            tile_step_px=config.store.chunk_px,
            chunk_px=config.store.chunk_px,
            halo_px=max(_MIDDLE.y0 // spec.factor - window.pixels.y0, 0),
            device=self.device.name,
            devices=self.device.label if self.device.processes or self.device.cluster else "",
            cluster=self.device.cluster,
            host_bytes=self._host_bytes(tile_px, sheets, picture),
            tile_device_bytes=self._device_bytes(tile_px),
            device_bytes=self._device_bytes(tile_px),
            disk_bytes=stage.store_bytes,
            picture=picture,
            dpi=dpi,
            outputs={str(sheet.path): sheet.size for sheet in sheets},
            output_bytes=compressed_bytes(output_px * picture.pixel_bytes * 4 // 3, config.export.compression),
            levels_bytes=self._levels_bytes(sheets, picture),
            flop=stage.flop_per_iteration * stage.max_iterations,
            memory_limit_bytes=config.memory.limit_bytes,
            notes=self._notes(),
        )

    def _notes(self) -> tuple[str, ...]:
        notes = [*self.notes, *(f"{image.path}: {note}" for image in self.images.values() for note in image.notes)]
        if self.images[self.config.content].kind.alpha and not self.content.alpha:
            notes.append("the content's transparent parts are laid on white: super-resolution keeps no alpha")
        return tuple(notes)

    def _stage(self, tile_px: int) -> StagePlan:
        arrays = self.arrays
        kept = [arrays[name] for name in (CANVAS, ALPHA) if name in arrays]
        overhead = max(cost.halo_overhead(spec, self.content_size, tile_px) for spec in self.specs)
        flop = sum(
            cost.flop(spec, self.content_size, step) * cost.halo_overhead(spec, self.content_size, tile_px, step)
            for spec, steps in zip(self.specs, self.steps, strict=True)
            for step in steps
        )
        height, width = self.canvas
        return StagePlan(
            index=0,
            size=self.canvas,
            style_sizes=(),
            scales=1,
            tiles=ceil_to(height, tile_px) * ceil_to(width, tile_px) // tile_px**2,
            gram_px=0,
            gradient_px=int(overhead * height * width),
            store_bytes=sum(array.stored_bytes for array in arrays.values())
            + max(image.scratch_bytes for image in self.images.values()),
            store_chunks=sum(array.chunks for array in arrays.values()),
            kept_bytes=sum(array.stored_bytes for array in kept),
            kept_chunks=sum(array.chunks for array in kept),
            overviews_bytes=0,
            resident_bytes=0,
            content=self.content,
            prepare_flop=0,
            flop_per_iteration=int(flop) // self.passes,
            max_iterations=self.passes,
            carries=False,
        )

    def _tile_px(self, sheets: Sequence[Sheet], picture: PixelKind) -> int:
        """The largest tile that fits the limits, or the one that the config asks for. Raises ConfigError."""
        config, step = self.config, self.config.store.chunk_px
        asked, limit = config.compute.tile_px, config.memory.limit_bytes
        if asked != "auto" and asked % step:
            raise ConfigError(f"compute.tile_px: {asked} is not a multiple of store.chunk_px = {step}.")
        largest = ceil_to(min(max(self.canvas), _MAX_TILE_PX), step)
        candidates = list(range(largest, 0, -step)) if asked == "auto" else [asked]
        for tile_px in candidates:
            host = self._host_bytes(tile_px, sheets, picture)
            on_device = self._device_bytes(tile_px)
            if max(host.values()) <= limit and (on_device <= self.device.memory_bytes or self.device.name == "cpu"):
                return tile_px
        phase = max(host, key=lambda name: host[name])
        need, have = (host[phase], limit) if host[phase] > limit else (on_device, self.device.memory_bytes)
        raise ConfigError(
            f"compute.tile_px: {asked} needs {size_text(need)} of memory (phase: {phase}), but {size_text(have)} is "
            "the limit. Raise memory.limit, or use a smaller store.chunk_px, fewer processes or a narrower network."
        )

    def _tile_bytes(self, tile_px: int) -> int:
        """Peak bytes of one tile that is computed: feature maps and weights."""
        size = self.content_size
        maps = max(
            cost.tile_bytes(spec, size, tile_px, self._itemsize, steps)
            for spec, steps in zip(self.specs, self.steps, strict=True)
        )
        weights = sum(cost.parameters_bytes(spec) for spec in self.specs)
        return int(maps * ACTIVATION_OVERHEAD) + weights

    def _flight_bytes(self, tile_px: int) -> int:
        """Windows and results of the tiles in flight: as stored, as floats, and the output with its mask."""
        values = [
            [cost.waiting_values(spec, self.content_size, tile_px, step) for step in cost.heaviest(steps)]
            for spec, steps in zip(self.specs, self.steps, strict=True)
        ]
        largest = max(map(max, values))
        if not self.one_at_a_time:  # the last pass reads what it needs for all networks
            largest = max(largest, sum(each[-1] for each in values))
        masks = 2 + len(self.config.masks)
        return WORKERS * (int(1.5 * largest) + masks * 3 * tile_px**2) * self._itemsize

    def _device_bytes(self, tile_px: int) -> int:
        """Peak bytes on a GPU: of its process, or of all worker processes, which share it; 0 on a CPU."""
        if self.device.name == "cpu":
            return 0
        process = self._tile_bytes(tile_px) + self._flight_bytes(tile_px)
        if self.device.processes:  # each has a GPU, or its share of one
            return process + CONTEXT_BYTES
        workers = self.config.compute.workers
        return workers * (process + CONTEXT_BYTES) if workers else process

    def _host_bytes(self, tile_px: int, sheets: Sequence[Sheet], picture: PixelKind) -> dict[str, int]:
        """Resident bytes of every phase, over all processes; of a cluster, of the largest process on any machine."""
        chunk_px, processes = self.config.store.chunk_px, self.config.compute.workers or len(self.device.processes)
        on_cpu = self.device.name == "cpu"
        base = BASE_BYTES["cpu" if on_cpu else "gpu"]
        if on_cpu:
            tiles = self._tile_bytes(tile_px) + self._flight_bytes(tile_px)
        else:
            chunk_bytes = max(array.stored_bytes // array.chunks for array in self.arrays.values())
            tiles = 4 * STAGING_THREADS * max(chunk_bytes, chunk_px**2 * 3 * self._itemsize)
        weights = 2 * self.file_bytes
        idle = base + sum(cost.parameters_bytes(spec) for spec in self.specs)
        own = {
            "ingest": self._ingest_bytes(),
            "export": max(self._export_bytes(sheet.size, picture) for sheet in sheets),
        }
        in_tasks = {"weights": weights, "passes": tiles}
        if self.device.cluster:
            own = {phase: BASE_BYTES["cpu"] + size for phase, size in own.items()}
            return own | {phase: idle + size for phase, size in in_tasks.items()}
        resting = base + processes * idle
        return {
            **{phase: resting + size for phase, size in own.items()},
            **{phase: resting + max(1, processes) * size for phase, size in in_tasks.items()},
        }

    def _ingest_bytes(self) -> int:
        config, width = self.config, self.content_size[1]
        in_float = config.canvas_space != "srgb"
        images = [(self.images[config.content], width, self.content)]
        images += [(self.images[path], self.canvas[1], RGB8) for path in config.masks]
        images += [(self.images[config.style], self.arrays[STYLE].shape[1], RGB8)] if config.style else []
        return max(ingest_bytes(image, side, config.store.chunk_px, kind, in_float) for image, side, kind in images)

    def _export_bytes(self, size: Size, picture: PixelKind) -> int:
        export = self.config.export
        tables = isinstance(export.profile, Path) or export.profile == "content"
        kind = PixelKind(16, picture.alpha) if tables else picture
        return export_bytes(
            size,
            kind,
            tiff=_is_tiff(self.config),
            pyramid=export.has_levels,
            compression=export.compression,
            edges=has_edges(export),
        )

    def _levels_bytes(self, sheets: Sequence[Sheet], picture: PixelKind) -> int:
        export = self.config.export
        if not (_is_tiff(self.config) and export.has_levels):
            return 0
        return max(levels_on_disk_bytes(sheet.size, picture, export.compression) for sheet in sheets)


def _is_tiff(config: AnyConfig) -> bool:
    form = format_of(config.output)
    return form is not None and form.name == "TIFF"
