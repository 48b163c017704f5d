"""The plan of `apply`: passes, tiles, memory and disk, from the config and the headers of its files. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import AnyConfig, ApplyConfig, input_files
from pipeline.core.errors import ConfigError, InputError
from pipeline.core.image_formats import RGB8, PixelKind, compressed_bytes, format_of, picture_kind
from pipeline.core.text import shown, size_text
from pipeline.core.tiling import Rect, Size
from pipeline.core.vgg_layers import ceil_to
from pipeline.feedforward import cost, geometry
from pipeline.feedforward.network_file import NetworkHeader, read_network_header
from pipeline.feedforward.spec import Conv, Layered
from pipeline.feedforward.wct_file import WctHeader, WctLevel, is_wct_file, read_wct_header
from pipeline.images import ImageHeader, read_header
from pipeline.plan import BASE_BYTES, STAGING_THREADS, WORKERS, Device, Plan, Sheet, StagePlan, fit, sheets_of
from pipeline.plan.image_memory import export_bytes, ingest_bytes, levels_on_disk_bytes
from pipeline.plan.memory import ACTIVATION_OVERHEAD, CONTEXT_BYTES
from pipeline.plan.print_sheets import has_edges
from pipeline.plan.sizes import output_dpi, size_of
from pipeline.rundir.paths import refuse_own_state
from pipeline.rundir.preflight import with_checked_output
from pipeline.store import (
    ALPHA,
    CONTENT,
    FIXED16,
    STYLE,
    ArraySpec,
    guide_name,
)

CANVAS = "canvas_1"  # slot 0 is the content: see store.result_name
_MAX_TILE_PX = 4096
# A tile far from all borders, of which the halo is measured.
_MIDDLE = Rect(2**18, 2**18 + 512, 2**18, 2**18 + 512)


@dataclass(frozen=True)
class NetworkUse:
    """A network of the config, and the share of each of its styles."""

    header: NetworkHeader
    style_S: tuple[float, ...]

    @property
    def norms(self) -> list[Conv]:
        """The convolutions whose norms need a pass of their own."""
        spec = self.header.spec
        return spec.norms() if spec.norm == "instance" else []


@dataclass(frozen=True)
class WctUse:
    """The levels that are applied, in order, and the size of the style."""

    header: WctHeader
    levels: tuple[WctLevel, ...]
    style_size: Size


@dataclass(frozen=True)
class ApplyPlan:
    """The plan as all commands show it, and what the passes need. `content_size`: as the networks see it."""

    plan: Plan
    networks: tuple[NetworkUse, ...]
    wct: WctUse | None
    content_size: Size
    content: PixelKind

    @property
    def stage(self) -> StagePlan:
        """The only stage."""
        return self.plan.stages[0]

    @property
    def norms(self) -> list[tuple[int, Conv]]:
        """(number of a network, the convolution before its norm) of each pass but the last."""
        return [(index, conv) for index, use in enumerate(self.networks) for conv in use.norms]


def plan_apply(config: ApplyConfig, device: Device) -> ApplyPlan:
    """Plan `config`, which is from `resolved`. Raises ConfigError, InputError."""
    images = {path: read_header(path, config.limits) for key, path in input_files(config) if key[-1] != "file"}
    if is_wct_file(config.networks[0].file):
        return _plan_wct(config, device, images)
    if config.style is not None:
        raise ConfigError(
            f"style: {config.networks[0].file} has its style in it; leave this key out, or name a file of "
            "encoder-decoder pairs in networks."
        )
    networks = _networks(config)
    factor = networks[0].header.spec.factor
    content_size = _content_size(config, size_of(images[config.content]), factor)
    canvas = content_size[0] * factor, content_size[1] * factor
    _check_sizes(config, networks, content_size, images)
    source = images[config.content].kind
    content = PixelKind(source.bits, source.alpha and factor == 1)
    specs = tuple(use.header.spec for use in networks)
    parts = [[geometry.layers_until(use.header.spec, conv) for conv in use.norms] for use in networks]
    flop = sum(
        cost.flop(spec, content_size, layers)
        for spec, until in zip(specs, parts, strict=True)
        for layers in (*until, spec.layers)
    )
    file_bytes = sum(use.header.size_bytes for use in networks)
    passes = 1 + sum(len(use.norms) for use in networks)
    arrays = arrays_of(config, content_size, canvas, content)
    work = _Work(config, specs, content_size, canvas, content, images, device, arrays, passes, flop, file_bytes)
    return ApplyPlan(work.checked_plan(), networks, None, content_size, content)


def _plan_wct(config: ApplyConfig, device: Device, images: Mapping[Path, ImageHeader]) -> ApplyPlan:
    network = config.networks[0]
    header = read_wct_header(network.file, config.limits.max_weights_bytes)
    if len(config.networks) > 1 or network.mask is not None or network.styles is not None:
        raise ConfigError("networks: with a file of encoder-decoder pairs it is the only one, without mask and styles.")
    if config.style is None:
        raise ConfigError(f"style: missing; {network.file} applies the style of an image. Name one (--style).")
    there = {level.number: level for level in header.levels}
    if missing := [level for level in config.wct.levels if level not in there]:
        raise ConfigError(f"wct.levels: {network.file} has no level {missing[0]}, but {', '.join(map(str, there))}.")
    levels = tuple(there[number] for number in config.wct.levels)
    content_size = _content_size(config, size_of(images[config.content]), 1)
    style = size_of(images[config.style])
    style_size = fit(style, min(max(style), max(content_size)))
    least = max(level.least_side_px for level in levels)
    for role, path, size in (("content", config.content, content_size), ("style", config.style, style_size)):
        if min(size) < least:
            raise InputError(f"{role} {path}: at {size[1]}×{size[0]} px it is too small; {least} px are needed.")
    content = images[config.content].kind
    flop = sum(cost.flop(level, content_size, layers) for level in levels for layers in (level.encoder, level.layers))
    arrays = arrays_of(config, content_size, content_size, content)
    arrays |= {STYLE: ArraySpec((*style_size, 3), config.store.chunk_px, "uint8")}
    arrays |= {"canvas_0": arrays[CANVAS]} if len(levels) > 1 else {}
    work = _Work(
        config, levels, content_size, content_size, content, images, device, arrays, 3 * len(levels), flop,
        header.size_bytes, one_at_a_time=True,
    )  # fmt: skip
    return ApplyPlan(work.checked_plan(), (), WctUse(header, levels, style_size), content_size, content)


def _networks(config: ApplyConfig) -> tuple[NetworkUse, ...]:
    uses = []
    for index, network in enumerate(config.networks):
        header = read_network_header(network.file, config.limits.max_weights_bytes)
        uses.append(NetworkUse(header, _style_shares(index, header, network.styles)))
    factors = {use.header.spec.factor for use in uses}
    if len(factors) > 1:
        raise ConfigError(f"networks: they enlarge by {' and '.join(map(str, sorted(factors)))}. Use one factor.")
    if factors != {1}:
        if config.color != "style":
            raise ConfigError(
                f"color: {config.color} is for styles; a network of super-resolution has none. Leave it out."
            )
        if all(network.mask is not None for network in config.networks):
            raise ConfigError("networks: where the masks are black, nothing would be enlarged. Leave out one mask.")
    return tuple(uses)


def _style_shares(index: int, header: NetworkHeader, styles: Mapping[str, float] | None) -> tuple[float, ...]:
    names = header.spec.styles
    if styles is None:
        return (1.0, *(0.0 for _ in names[1:]))
    if unknown := [name for name in styles if name not in names]:
        listed = ", ".join(shown(name, 100) for name in names[:20])
        raise ConfigError(
            f"networks.{index}.styles: {shown(unknown[0])} is no style of {header.path}. It has: {listed}."
        )
    total = sum(styles.values())
    return tuple(styles.get(name, 0.0) / total for name in names)


def _content_size(config: ApplyConfig, content: Size, factor: int) -> Size:
    """(height, width) of the content as the networks see it."""
    if config.size_px is None:
        return content
    if config.size_px % factor:
        raise ConfigError(f"size: {config.size_px} px is no multiple of {factor}, by which the network enlarges.")
    return fit(content, config.size_px // factor)


def _check_sizes(
    config: ApplyConfig, networks: Sequence[NetworkUse], content: Size, images: Mapping[Path, ImageHeader]
) -> None:
    least = max(use.header.spec.least_side_px() for use in networks)
    if min(content) < least:
        raise InputError(
            f"content {config.content}: at {content[1]}×{content[0]} px it is too small for the network, which needs "
            f"{least} px on each side. Use a larger size."
        )
    height, width = size_of(images[config.content])
    for path in config.masks:
        mask_height, mask_width = size_of(images[path])
        if min(abs(mask_height - height * mask_width / width), abs(mask_width - width * mask_height / height)) > 1:
            raise InputError(
                f"mask {path}: has {mask_width}×{mask_height} px, which is another aspect ratio than that of the "
                f"content ({width}×{height} px). Draw it over the image, at any size of the same aspect ratio."
            )


@dataclass(frozen=True)
class _Work:
    """Everything that the plan depends on."""

    config: ApplyConfig
    specs: tuple[Layered, ...]
    content_size: Size
    canvas: Size
    content: PixelKind
    images: Mapping[Path, ImageHeader]
    device: Device
    arrays: Mapping[str, ArraySpec]
    passes: int
    flop: int
    file_bytes: int
    one_at_a_time: bool = False

    def checked_plan(self) -> Plan:
        """The plan, once all that can be refused is refused."""
        refuse_own_state(self.config.output, self.config.work_dir)
        return with_checked_output(self.config, self.plan(), self.images)

    @property
    def _itemsize(self) -> int:
        return 8 if self.config.compute.dtype == "float64" else 4

    def plan(self) -> Plan:
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
            host_bytes=self._host_bytes(tile_px, sheets, picture),
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
        notes = [f"{image.path}: {note}" for image in self.images.values() for note in image.notes]
        if self.images[self.config.content].kind.alpha and not self.content.alpha:
            notes.append("the content's transparent parts are laid on white: super-resolution keeps no alpha")
        return tuple(notes)

    def _stage(self, tile_px: int) -> StagePlan:
        arrays = self.arrays
        kept = [arrays[name] for name in (CANVAS, ALPHA) if name in arrays]
        overhead = max(cost.halo_overhead(spec, self.content_size, tile_px) for spec in self.specs)
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
            content=self.content,
            prepare_flop=0,
            flop_per_iteration=int(self.flop * overhead) // self.passes,
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
            "the limit. Raise memory.limit, or use a smaller store.chunk_px, fewer workers or a narrower network."
        )

    def _tile_bytes(self, tile_px: int) -> int:
        """Peak bytes of one tile that is computed: feature maps and weights."""
        maps = max(cost.tile_bytes(spec, self.content_size, tile_px, self._itemsize) for spec in self.specs)
        weights = sum(cost.parameters_bytes(spec) for spec in self.specs)
        return int(maps * ACTIVATION_OVERHEAD) + weights

    def _flight_bytes(self, tile_px: int) -> int:
        """Windows and results of the tiles in flight: as stored, as floats, and the output with its mask."""
        windows = [cost.window_px(spec, self.content_size, tile_px) for spec in self.specs]
        window = max(windows) if self.one_at_a_time else sum(windows)
        masks = 2 + len(self.config.masks)
        return WORKERS * (int(1.5 * window) * 3 + masks * 3 * tile_px**2) * self._itemsize

    def _device_bytes(self, tile_px: int) -> int:
        """Peak bytes on a GPU, over all processes; 0 on a CPU."""
        if self.device.name == "cpu":
            return 0
        process = self._tile_bytes(tile_px) + self._flight_bytes(tile_px)
        workers = self.config.compute.workers
        return workers * (process + CONTEXT_BYTES) if workers else process

    def _host_bytes(self, tile_px: int, sheets: Sequence[Sheet], picture: PixelKind) -> dict[str, int]:
        """Resident bytes of every phase, over all processes."""
        chunk_px, workers = self.config.store.chunk_px, self.config.compute.workers
        on_cpu = self.device.name == "cpu"
        base = BASE_BYTES["cpu" if on_cpu else "gpu"]
        if on_cpu:
            tiles = self._tile_bytes(tile_px) + self._flight_bytes(tile_px)
        else:
            tiles = 4 * STAGING_THREADS * chunk_px**2 * 3 * self._itemsize
        weights = 2 * self.file_bytes
        idle = (base + sum(cost.parameters_bytes(spec) for spec in self.specs)) * workers
        own = {
            "ingest": self._ingest_bytes(),
            "export": max(self._export_bytes(sheet.size, picture) for sheet in sheets),
        }
        in_tasks = {"weights": weights, "passes": tiles}
        return {
            **{phase: base + size + idle for phase, size in own.items()},
            **{phase: base + max(1, workers) * size + idle for phase, size in in_tasks.items()},
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


def arrays_of(config: ApplyConfig, content_size: Size, canvas: Size, content: PixelKind) -> dict[str, ArraySpec]:
    """The arrays of the stage: content, alpha, masks, and the canvas that the last pass writes."""
    chunk_px = config.store.chunk_px
    pixels = "uint8" if content.bits == 8 else FIXED16.name
    arrays = {CONTENT: ArraySpec((*content_size, 3), chunk_px, pixels)}
    if content.alpha:
        arrays[ALPHA] = ArraySpec((*canvas, 1), chunk_px, pixels)
    arrays |= {guide_name(index): ArraySpec((*canvas, 1), chunk_px, "uint8") for index in range(len(config.masks))}
    form = FIXED16.name if config.store.state_dtype == "compact" else _float(config)
    arrays[CANVAS] = ArraySpec((*canvas, 3), chunk_px, form)
    return arrays


def mask_arrays(config: ApplyConfig) -> tuple[str | None, ...]:
    """The array of each network's mask; None where it has none."""
    numbers = iter(range(len(config.masks)))
    return tuple(None if network.mask is None else guide_name(next(numbers)) for network in config.networks)


def _float(config: ApplyConfig) -> str:
    return "float64" if config.compute.dtype == "float64" else "float32"


def _is_tiff(config: AnyConfig) -> bool:
    form = format_of(config.output)
    return form is not None and form.name == "TIFF"
