"""The passes of whitening and colouring: of each level the moments of style and content, and a canvas."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline import store
from pipeline.core import profiler
from pipeline.core.tiling import Rect, Tile, grid
from pipeline.executors import Executor
from pipeline.feedforward import geometry, wct
from pipeline.feedforward.passes import Known, Passes, PassResult, not_finite
from pipeline.feedforward.plan import WctUse
from pipeline.feedforward.tile_tasks import keeping_color
from pipeline.feedforward.wct import Transport, WctNetwork
from pipeline.feedforward.wct_file import WctLevel
from pipeline.losses.objective import Gram
from pipeline.network.cache import DTYPES, cached
from pipeline.render import device_io
from pipeline.render.tile_specs import device_memory
from pipeline.render.tile_tasks import computing
from pipeline.store import CONTENT, STYLE, ChunkSums, StageArray, merged, open_array


@dataclass(frozen=True)
class LevelSpec:
    """A level in any process; see network.NetworkSpec."""

    path: Path
    sha256: str
    level: WctLevel
    dtype: str
    device: str
    threads: int
    gpu_bytes: int

    def load(self) -> WctNetwork:
        """The level on the device, from the cache of this process."""
        return cached(self, partial(wct.load_wct, self.path, self.level, DTYPES[self.dtype], self.device))


@dataclass(frozen=True)
class WctTile:
    """A tile of the array `array`. `checksums`: of the arrays that are read."""

    stage_dir: Path
    array: str
    tile: Tile
    network: LevelSpec
    checksums: Mapping[str, str]

    @property
    def device(self) -> str:
        """Torch's name of the device that computes."""
        return self.network.device

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the array."""
        return self.tile.height, self.tile.width

    def load(self, name: str, rect: Rect) -> Tensor:
        """A rectangle of an array, (1, C, H, W), on the device."""
        dtype = torch.float64 if self.network.dtype == "float64" else torch.float32
        with profiler.span("read", tile=self.tile.index, array=name), device_memory(self):
            return device_io.load(self.open(name), rect, self.device, dtype)

    def open(self, name: str) -> StageArray:
        """Open an array for reading; its chunks are checked."""
        return open_array(self.stage_dir, name, self.checksums.get(name))


@dataclass(frozen=True)
class WctOutput(WctTile):
    """Write the tile's pixels to the array `target`. `keeps_color`: the colours become those of the content."""

    target: str
    step: Transport = field(compare=False)
    keeps_color: bool


def gram_task(spec: WctTile) -> Gram | None:
    """The sum of φ̃φ̃ᵀ over the tile's own positions; None where it has none."""
    network = spec.network.load()
    window = wct.gram_window(network.level, spec.size, spec.tile.inner)
    if window is None:
        return None
    pixels_1CHW = spec.load(spec.array, window.pixels)
    with computing(spec):
        return network.gram(window, pixels_1CHW)


def add_grams(total: Gram | None, tile: Gram | None) -> Gram | None:
    """The sum over one more tile; called in tile order."""
    if total is None or tile is None:
        return tile if total is None else total
    return total + tile


def output_task(spec: WctOutput) -> ChunkSums:
    """Write the tile's pixels, clipped to 0..255; gives the checksums of its chunks."""
    network, inner = spec.network.load(), spec.tile.inner
    window = geometry.window(network.level, spec.size, network.level.layers, inner)
    pixels_1CHW = spec.load(spec.array, window.pixels)
    content_1CHW = spec.load(CONTENT, inner) if spec.keeps_color else None
    with computing(spec):
        out_1CHW = network.output(window, pixels_1CHW, spec.step).to(pixels_1CHW.dtype)
        if content_1CHW is not None:
            out_1CHW = keeping_color(out_1CHW, content_1CHW)
        out_1CHW.clamp_(0, 255)
    with profiler.span("write", tile=spec.tile.index, array=spec.target), device_memory(spec):
        return device_io.save(open_array(spec.stage_dir, spec.target), inner, out_1CHW[0])


def total_gram(
    executor: Executor, specs: Sequence[WctTile], name: str, on_done: Callable[[], None] = lambda: None
) -> Gram:
    """The sum of φ̃φ̃ᵀ over an array, of which `specs` are the tiles. Raises InputError if it is not finite."""
    initial: Gram | None = None
    total = executor.fold(gram_task, specs, add_grams, initial, on_done)
    assert total is not None  # every position belongs to a tile
    if not np.isfinite(total).all():
        raise not_finite(specs[0].network.path, name)
    return total


class WctPasses(Passes):
    """Three passes per level; the canvas of a level is in the slot that the level before has not written."""

    @property
    def _use(self) -> WctUse:
        assert self.plan.wct is not None
        return self.plan.wct

    def _images(self) -> dict[str, Path]:
        assert self.config.style is not None
        return {STYLE: self.config.style}

    def run(self, number: int, known: Known, checksums: Mapping[str, str]) -> PassResult:
        """As in Passes. Raises InputError for features that are not finite."""
        index, what = divmod(number, 3)
        level = self._use.levels[index]
        source = f"canvas_{index % 2}" if index else CONTENT
        style, content = f"style{index}", f"content{index}"
        if what == 0:
            return self._moments(number, level, STYLE, style, checksums)
        if what == 1:
            return self._moments(number, level, source, content, checksums)
        grams = [_gram(*known[0, name]) for name in (content, style)]
        step = wct.transport(grams[0], grams[1], self.config.wct.strength)
        target, is_last = f"canvas_{(index + 1) % 2}", index == len(self._use.levels) - 1
        keeps_color = is_last and self.config.color == "luminance"
        specs = [
            WctOutput(self.stage_dir, source, tile, self._level(level), checksums, target, step, keeps_color)
            for tile in self.tiles
        ]
        sums = self.executor.map(output_task, specs, self._counter(number, len(specs)), tile=True)
        return PassResult(checksums={target: store.open_array(self.stage_dir, target).packed(merged(sums))})

    def _moments(self, number: int, level: WctLevel, array: str, name: str, checksums: Mapping[str, str]) -> PassResult:
        size = self._use.style_size if array == STYLE else self.plan.stage.size
        specs = [
            WctTile(self.stage_dir, array, tile, self._level(level), checksums) for tile in grid(*size, self.tile_px)
        ]
        total = total_gram(self.executor, specs, name, self._counter(number, len(specs)))
        return PassResult(0, name, tuple(total[-1].tolist()), tuple(total[:-1, :-1].ravel().tolist()))

    def _level(self, level: WctLevel) -> LevelSpec:
        path, dtype = self._use.header.path, self.config.compute.dtype
        return LevelSpec(path, self.sha256[0], level, dtype, self.device, self.threads, self.gpu_bytes)


def _gram(sums: tuple[float, ...], products: tuple[float, ...]) -> Gram:
    """Σφ̃φ̃ᵀ as a record has it: its last row, and the rest."""
    channels = len(sums) - 1
    second, total = np.array(products).reshape(channels, channels), np.array(sums)[None]
    return np.concatenate([np.concatenate([second, total[:, :-1].T], axis=1), total])
