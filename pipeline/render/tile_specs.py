"""What the tasks on tiles are given, and what they return; both can be sent to worker processes.

Axes in names: 1 batch, C channels, H rows, W columns.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.core import profiler
from pipeline.core.errors import DeviceMemoryError
from pipeline.core.tiling import Rect, Tile
from pipeline.core.vgg_layers import LAYER_BY_NAME
from pipeline.losses import objective
from pipeline.losses.color import ColorMap
from pipeline.losses.color_space import Basis
from pipeline.losses.objective import Gram
from pipeline.network import NetworkSpec
from pipeline.render import device_io
from pipeline.render.mask_tasks import read_guides
from pipeline.store import UNGUIDED, ChunkSums, Guides, StageArray, content_features_name, open_array

# On the CPU, torch and oneDNN raise a plain RuntimeError when they run out of memory.
_NO_MEMORY = re.compile(r"can't allocate memory|could not create a (primitive|memory)")


@contextmanager
def device_memory(spec: TileSpec) -> Iterator[None]:
    """Raise DeviceMemoryError where the block runs out of memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not _NO_MEMORY.search(str(error)):
            raise
        inner = spec.tile.inner
        raise DeviceMemoryError(
            f"{spec.network.device} has no memory for tile {spec.tile.index} of {spec.stage_dir.name}, "
            f"{inner.width}×{inner.height} px and its halo: another program uses it, or the plan is wrong. Nothing is "
            "lost: run the same command again when there is more memory, or use a smaller store.chunk_px in a new "
            "work_dir."
        ) from error


@dataclass(frozen=True)
class TileSpec:
    """A tile of one array of a stage, and the network that sees it.

    `checksums`: packed checksums of the arrays that the task reads, by name; an array without them is not checked.
    `color`: map applied to the pixels before the network. `guides`: masks of the stage; `guides_dir`: their folder, if
    it is not the stage's.
    """

    stage_dir: Path
    array: str
    tile: Tile
    network: NetworkSpec
    checksums: Mapping[str, str]
    color: ColorMap | None = field(default=None, kw_only=True)
    guides: Guides = field(default=UNGUIDED, kw_only=True)
    guides_dir: Path | None = field(default=None, kw_only=True)

    def open(self, name: str) -> StageArray:
        """Open an array for reading; its chunks are checked."""
        return open_array(self.stage_dir, name, self.checksums.get(name))

    def read_outer(self, halo: int) -> tuple[Tensor, Rect]:
        """The tile's pixels with their halo, (1, 3, H, W) on the device, and their rectangle."""
        outer = self.tile.outer(halo)
        return self.load(self.array, outer), outer

    def load(self, name: str, rect: Rect) -> Tensor:
        """A rectangle of an array, (1, C, H, W) in at least float32 on the device. Raises DeviceMemoryError."""
        # bfloat16 and tf32 apply inside the network only: the differences of nearly equal numbers need float32
        dtype = torch.float64 if self.network.dtype == "float64" else torch.float32
        with profiler.span("read", tile=self.tile.index, array=name), device_memory(self):
            return device_io.load(self.open(name), rect, self.network.device, dtype)

    def read_guides(self, rect: Rect) -> NDArray[np.uint8] | None:
        """The masks of a rectangle of the canvas, (H, W, K); None where the stage has none."""
        if not self.guides.arrays:
            return None
        with profiler.span("read", tile=self.tile.index, array="guides"):
            return read_guides(self.guides_dir or self.stage_dir, self.guides, self.checksums, rect)


@dataclass(frozen=True)
class GramSpec(TileSpec):
    """Sum the Gram matrices of `layers` over the tile's inner rectangle, per mask region if there are any.

    `with_mean`: of the features and a channel of ones (losses/wasserstein.py).
    """

    layers: tuple[str, ...]
    with_mean: bool = field(default=False, kw_only=True)


@dataclass(frozen=True)
class ContentSpec(TileSpec):
    """Store the features of `layers` of the content image, and measure their energy."""

    layers: tuple[str, ...]


@dataclass(frozen=True)
class SeedSpec(TileSpec):
    """A tile whose gradient is computed.

    `content_factors`: per layer, the factor of φ(p) − φ(o) in dJ/dφ. `tv_weight`: w_tv; 0 leaves the term out. If
    `color` is set it is luminance: the gradient is dJ/dY, in all three channels, so that the canvas moves along greys.
    `basis`: M of the optimiser's colour coordinates, in which the gradient is written; None for RGB.
    """

    content_factors: Mapping[str, float]
    tv_weight: float = field(default=0.0, kw_only=True)
    basis: Basis | None = field(default=None, kw_only=True)

    def read_content(self, outer: Rect) -> dict[str, tuple[Tensor, Rect]]:
        """Per content layer, the content's features at the positions of `outer`, and their rectangle."""
        regions = {name: outer.positions(LAYER_BY_NAME[name]) for name in self.content_factors}
        return {name: (self.load(content_features_name(name), region), region) for name, region in regions.items()}


@dataclass(frozen=True)
class GradientSpec(SeedSpec):
    """The gradient of the tile's inner rectangle. `style_seeds_CM`: by style key, the matrix of dJ/dφ (StyleTerm)."""

    style_seeds_CM: Mapping[str, Gram]


@dataclass(frozen=True)
class WholeSpec(SeedSpec):
    """The gradient of a canvas that is one tile: its Gram sums are the canvas's, so one forward pass is enough."""

    style_targets: Mapping[str, objective.StyleTarget]


@dataclass(frozen=True)
class ContentResult:
    """Per content layer ‖φ_l(o)‖² over the inner rectangle, and the checksums of the feature chunks written."""

    energies: Mapping[str, float]
    sums: Mapping[str, ChunkSums]


@dataclass(frozen=True)
class GradientResult:
    """Per content layer Σ(φ(p) − φ(o))² over the inner rectangle, max|g| there, and the checksums of its chunks.

    `variation`: the tile's share of 3N·Ltv; 0 without that term.
    """

    content_squares: Mapping[str, float]
    max_abs_gradient: float
    sums: ChunkSums
    variation: float = 0.0


@dataclass(frozen=True)
class WholeResult:
    """The results of the Gram and the gradient pass of a canvas that is one tile."""

    terms: Mapping[str, objective.StyleTerm]
    gradient: GradientResult
