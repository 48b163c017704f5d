"""Tasks on tiles of a pass of `apply`: pure functions of their specs, in this process or in a worker.

Axes in names: 1 batch, C channels, H rows, W columns, K networks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from pipeline.core import profiler
from pipeline.core.tiling import Rect, Size, Tile
from pipeline.feedforward import activations, geometry, tiled
from pipeline.feedforward.activations import Step
from pipeline.feedforward.network_file import load_network
from pipeline.feedforward.tiled import Moments, Statistics, TiledNetwork
from pipeline.losses.color import LUMINANCE_WEIGHTS
from pipeline.network.cache import DTYPES, cached
from pipeline.render import device_io
from pipeline.render.tile_specs import device_memory
from pipeline.render.tile_tasks import computing
from pipeline.store import CONTENT, ChunkSums, StageArray, open_array


@dataclass(frozen=True)
class NetworksSpec:
    """The networks of a run in any process, each with the share of its styles; see network.NetworkSpec.

    `sha256`: of their files.
    """

    paths: tuple[Path, ...]
    sha256: tuple[str, ...]
    styles: tuple[tuple[float, ...], ...]
    dtype: str
    device: str
    threads: int
    gpu_bytes: int

    def load(self) -> list[TiledNetwork]:
        """The networks on the device, from the cache of this process. Raises InputError for an unusable file."""
        return cached(self, self._build)

    def _build(self) -> list[TiledNetwork]:
        return [
            TiledNetwork(load_network(path), style_S, DTYPES[self.dtype], self.device)
            for path, style_S in zip(self.paths, self.styles, strict=True)
        ]


@dataclass(frozen=True)
class TileSpec:
    """A tile of the canvas. `statistics`: by number of a network, those that are known. `checksums`: of the arrays.

    `keeps`: whether the passes keep activations on the disk.
    """

    stage_dir: Path
    tile: Tile
    networks: NetworksSpec
    checksums: Mapping[str, str]
    statistics: Mapping[int, Mapping[str, Statistics]]
    array: str = field(default=CONTENT, kw_only=True)
    keeps: bool = field(default=False, kw_only=True)

    @property
    def device(self) -> str:
        """Torch's name of the device that computes."""
        return self.networks.device

    def load(self, name: str, rect: Rect) -> Tensor:
        """A rectangle of an array, (1, C, H, W), on the device."""
        dtype = torch.float64 if self.networks.dtype == "float64" else torch.float32
        with profiler.span("read", tile=self.tile.index, array=name), device_memory(self):
            return device_io.load(self.open(name), rect, self.device, dtype)

    def open(self, name: str) -> StageArray:
        """Open an array for reading; its chunks are checked."""
        return open_array(self.stage_dir, name, self.checksums.get(name))

    def save(self, name: str, rect: Rect, x_1CHW: Tensor | None) -> ChunkSums:
        """Write a rectangle of whole chunks to an array; gives their checksums.

        Positions beyond `x_1CHW`, a map that is smaller than the array, become 0.
        """
        array = open_array(self.stage_dir, name)
        with profiler.span("write", tile=self.tile.index, array=name), device_memory(self):
            if x_1CHW is None or x_1CHW.shape[2:] != (rect.height, rect.width):
                whole_1CHW = torch.zeros((1, array.shape[2], rect.height, rect.width), device=self.device)
                if x_1CHW is not None:
                    whole_1CHW = whole_1CHW.to(x_1CHW.dtype)
                    whole_1CHW[:, :, : x_1CHW.shape[2], : x_1CHW.shape[3]] = x_1CHW
                x_1CHW = whole_1CHW
            return device_io.save(array, rect, x_1CHW[0])

    @property
    def content_size(self) -> Size:
        """(height, width) of the content."""
        height, width, _ = self.open(CONTENT).shape
        return height, width

    def at_origin(self, step: Step, rect: Rect) -> list[Tensor]:
        """A rectangle of what a step begins at: of the content, or of activations and of what is added to them."""
        if (origin := step.origin) is None:
            return [self.load(CONTENT, rect)]
        maps = [self.load(origin.array, rect)]
        if origin.skip is not None:
            maps.append(self.load(origin.skip, Rect(*(edge + origin.margin for edge in rect))))
        return maps

    def begun(self, number: int, step: Step, maps: list[Tensor]) -> Tensor:
        """What the layers of a step of network `number` take, from `at_origin`, which is used up."""
        network = self.networks.load()[number]
        raw_1CHW, *skip_1CHW = maps
        maps.clear()
        if step.origin is None:
            return network.input(raw_1CHW)
        return network.normed(step.origin.conv, raw_1CHW, next(iter(skip_1CHW), None), self.statistics[number])


@dataclass(frozen=True)
class MomentsSpec(TileSpec):
    """Sum x and x² before the norm `norm` of network `network` over the tile's own positions.

    Where the pass writes activations, the tile is one of activations.tiles.
    """

    network: int
    norm: str


@dataclass(frozen=True)
class Measured:
    """What a pass has measured and written so far: None of no positions. `sums`: by array, of the chunks written."""

    moments: Moments | None = None
    sums: Mapping[str, ChunkSums] = field(default_factory=dict)


@dataclass(frozen=True)
class OutputSpec(TileSpec):
    """Write the tile's pixels to the array `target`.

    `masks`: by number of a network, its mask's array, None where it has none. `keeps_color`: luminance alone is the
    network's.
    """

    target: str
    masks: tuple[str | None, ...]
    keeps_color: bool


def moments_task(spec: MomentsSpec) -> Measured:
    """The sums over the tile's positions, and the checksums of the activations that it has written."""
    network, size, inner = spec.networks.load()[spec.network], spec.content_size, spec.tile.inner
    conv = next(conv for conv in network.spec.convs() if conv.name == spec.norm)
    step = activations.step_of(network.spec, spec.network, size, conv, spec.keeps)
    wanted, kept = activations.wanted(network.spec, size, step, spec.tile), activations.kept(step, spec.tile)
    window = activations.window(network.spec, size, step, wanted) if wanted.area else None
    # blocks without padding shrink their map: of a last tile may be left what is kept alone, or nothing
    read = kept if window is None else window.pixels
    maps = spec.at_origin(step, read) if read.area else []
    x_1CHW = y_1CHW = moments = None
    with computing(spec):
        if maps:
            x_1CHW = spec.begun(spec.network, step, maps)
        if window is not None:
            assert x_1CHW is not None
            y_1CHW = network.before_norm(window, x_1CHW, spec.statistics.get(spec.network, {}), conv)
            moments = tiled.moments_of(y_1CHW)
    sums = {}
    if step.keeps is not None:
        rows, columns = kept.within(read)
        sums[step.keeps] = spec.save(step.keeps, inner, None if x_1CHW is None else x_1CHW[:, :, rows, columns])
    if step.writes is not None:
        sums[step.writes] = spec.save(step.writes, inner, y_1CHW)
    return Measured(moments, sums)


def add_moments(total: Measured, tile: Measured) -> Measured:
    """What was measured with one more tile; called in tile order, so that sums have the same bits on every run."""
    moments = total.moments or tile.moments
    if total.moments is not None and tile.moments is not None:
        moments = total.moments.plus(tile.moments)
    # a new dict: the executor may call this twice with the same total
    return Measured(moments, {name: {**total.sums.get(name, {}), **sums} for name, sums in tile.sums.items()})


def output_task(spec: OutputSpec) -> ChunkSums:
    """Write the tile's pixels, clipped to 0..255; gives the checksums of its chunks."""
    networks, size, inner = spec.networks.load(), spec.content_size, spec.tile.inner
    steps = [activations.step_of(network.spec, index, size, None, spec.keeps) for index, network in enumerate(networks)]
    windows = [
        activations.window(network.spec, size, step, inner) for network, step in zip(networks, steps, strict=True)
    ]
    maps = [spec.at_origin(step, window.pixels) for step, window in zip(steps, windows, strict=True)]
    factor = networks[0].spec.factor  # of all
    enlarged_from = geometry.enlarged_from(inner, size, factor)
    small_1CHW = spec.load(CONTENT, enlarged_from) if any(step.adds_content for step in steps) else None
    shares = _shares(spec)
    content_1CHW = _content(spec, shares, maps[0][0] if steps[0].origin is None else None, windows[0].pixels)
    with computing(spec):
        skip_1CHW = None if small_1CHW is None else tiled.enlarged_part(small_1CHW, enlarged_from, inner, factor)
        out_1CHW: Tensor | None = None
        for index, network in enumerate(networks):
            dtype = maps[index][0].dtype
            x_1CHW = spec.begun(index, steps[index], maps[index])
            y = network.output(windows[index], x_1CHW, spec.statistics.get(index, {}), skip_1CHW).to(dtype)
            if shares is not None:
                y.mul_(shares[index])
            out_1CHW = y if out_1CHW is None else out_1CHW.add_(y)
        assert out_1CHW is not None
        if content_1CHW is not None:
            if shares is not None and None not in spec.masks:  # black in every mask: left as it is
                out_1CHW.add_(shares[-1] * content_1CHW)
            if spec.keeps_color:
                out_1CHW = keeping_color(out_1CHW, content_1CHW)
        out_1CHW.clamp_(0, 255)
    return spec.save(spec.target, inner, out_1CHW)


def _content(spec: OutputSpec, shares: list[Tensor] | None, pixels_1CHW: Tensor | None, read: Rect) -> Tensor | None:
    """The content of the tile, where the output needs it; from `pixels_1CHW`, which are at `read`, if given."""
    if not (spec.keeps_color or (shares is not None and None not in spec.masks)):
        return None
    if pixels_1CHW is None:
        return spec.load(CONTENT, spec.tile.inner)
    rows, columns = spec.tile.inner.within(read)
    return pixels_1CHW[:, :, rows, columns]


def _shares(spec: OutputSpec) -> list[Tensor] | None:
    """Each network's part of the tile's pixels, (1, 1, H, W), and last the part that no mask covers.

    As of the style masks of `run`: where masks overlap, each gets its part. None without masks.
    """
    if not any(spec.masks):
        return None
    masks = [None if name is None else spec.load(name, spec.tile.inner) / 255 for name in spec.masks]
    total = torch.stack([mask for mask in masks if mask is not None]).sum(0)
    rest = (1 - total).clamp(min=0)
    return [*(rest if mask is None else mask / total.clamp(min=1) for mask in masks), rest]


def keeping_color(x_1CHW: Tensor, content_1CHW: Tensor) -> Tensor:
    """The content with the luminance of x."""
    return content_1CHW + _luminance(x_1CHW - content_1CHW)


def _luminance(x_1CHW: Tensor) -> Tensor:
    weights_C = torch.tensor(LUMINANCE_WEIGHTS, dtype=x_1CHW.dtype, device=x_1CHW.device)
    return (x_1CHW * weights_C[:, None, None]).sum(1, keepdim=True)
