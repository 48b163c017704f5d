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
from pipeline.core.tiling import Rect, Tile
from pipeline.feedforward import tiled
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
    """A tile of the canvas. `statistics`: by number of a network, those that are known. `checksums`: of the arrays."""

    stage_dir: Path
    tile: Tile
    networks: NetworksSpec
    checksums: Mapping[str, str]
    statistics: Mapping[int, Mapping[str, Statistics]]
    array: str = field(default=CONTENT, kw_only=True)

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


@dataclass(frozen=True)
class MomentsSpec(TileSpec):
    """Sum x and x² before the norm `norm` of network `network` over the tile's own positions."""

    network: int
    norm: str


@dataclass(frozen=True)
class OutputSpec(TileSpec):
    """Write the tile's pixels to the array `target`.

    `masks`: by number of a network, its mask's array, None where it has none. `keeps_color`: luminance alone is the
    network's.
    """

    target: str
    masks: tuple[str | None, ...]
    keeps_color: bool


def moments_task(spec: MomentsSpec) -> Moments | None:
    """None where no position belongs to the tile."""
    network = spec.networks.load()[spec.network]
    conv = next(conv for conv in network.spec.convs() if conv.name == spec.norm)
    window = tiled.norm_window(network.spec, spec.open(CONTENT).shape[:2], spec.tile.inner, conv)
    if window is None:
        return None
    pixels_1CHW = spec.load(CONTENT, window.pixels)
    with computing(spec):
        return network.moments(window, pixels_1CHW, spec.statistics.get(spec.network, {}), conv)


def add_moments(total: Moments | None, tile: Moments | None) -> Moments | None:
    """The sums over one more tile; called in tile order, so that they have the same bits on every run."""
    if total is None or tile is None:
        return total or tile
    return total.plus(tile)


def output_task(spec: OutputSpec) -> ChunkSums:
    """Write the tile's pixels, clipped to 0..255; gives the checksums of its chunks."""
    networks, size, inner = spec.networks.load(), spec.open(CONTENT).shape[:2], spec.tile.inner
    windows = [tiled.output_window(network.spec, size, inner) for network in networks]
    pixels = [spec.load(CONTENT, window.pixels) for window in windows]
    shares = _shares(spec)
    with computing(spec):
        out_1CHW: Tensor | None = None
        for index, network in enumerate(networks):
            y = network.output(windows[index], pixels[index], spec.statistics.get(index, {})).to(pixels[index].dtype)
            if shares is not None:
                y.mul_(shares[index])
            out_1CHW = y if out_1CHW is None else out_1CHW.add_(y)
        assert out_1CHW is not None
        if networks[0].spec.factor == 1:
            rows, columns = inner.within(windows[0].pixels)
            content_1CHW = pixels[0][:, :, rows, columns]
            if shares is not None and None not in spec.masks:  # black in every mask: left as it is
                out_1CHW.add_(shares[-1] * content_1CHW)
            if spec.keeps_color:
                out_1CHW = keeping_color(out_1CHW, content_1CHW)
        out_1CHW.clamp_(0, 255)
    with profiler.span("write", tile=spec.tile.index, array=spec.target), device_memory(spec):
        return device_io.save(open_array(spec.stage_dir, spec.target), inner, out_1CHW[0])


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
