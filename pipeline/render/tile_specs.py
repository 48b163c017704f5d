"""What the tasks on tiles are given, and what they return; both can be sent to worker processes.

Axes in names: 1 batch, C channels, H rows, W columns.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.core import profiler
from pipeline.core.errors import DeviceMemoryError
from pipeline.core.tiling import Rect, Tile
from pipeline.core.vgg_layers import LAYER_BY_NAME, Layer
from pipeline.losses import objective
from pipeline.losses.color import ColorMap
from pipeline.losses.color_space import Basis
from pipeline.losses.masks import GuideMaps
from pipeline.losses.objective import Gram
from pipeline.losses.total_variation import TvKind
from pipeline.network import NetworkSpec
from pipeline.render import device_io
from pipeline.render.mask_tasks import read_guides
from pipeline.store import (
    UNGUIDED,
    ChunkSums,
    Guides,
    StageArray,
    content_features_name,
    layer_key,
    layer_of,
    open_array,
    scale_of,
)

# On the CPU, torch and oneDNN raise a plain RuntimeError when they run out of memory.
_NO_MEMORY = re.compile(r"can't allocate memory|could not create a (primitive|memory)")


class TileTask(Protocol):
    """A task on a tile that computes on a device."""

    @property
    def stage_dir(self) -> Path: ...  # noqa: D102
    @property
    def array(self) -> str: ...  # noqa: D102
    @property
    def tile(self) -> Tile: ...  # noqa: D102
    @property
    def device(self) -> str: ...  # noqa: D102


@contextmanager
def device_memory(spec: TileTask) -> Iterator[None]:
    """Raise DeviceMemoryError where the block runs out of memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not _NO_MEMORY.search(str(error)):
            raise
        inner = spec.tile.inner
        raise DeviceMemoryError(
            f"{spec.device} has no memory for tile {spec.tile.index} of {spec.stage_dir.name}, "
            f"{inner.width}×{inner.height} px and its halo: another program uses it, or the plan is wrong. Nothing is "
            "lost: run the same command again when there is more memory, or use a smaller store.chunk_px in a new "
            "work_dir."
        ) from error


@dataclass(frozen=True)
class TileSpec:
    """A tile of one array of a stage, and the network that sees it.

    `checksums`: packed checksums of the arrays that the task reads, by name; an array without them is not checked.
    `color`: map applied to the pixels before the network. `guides`: masks of the stage; `guides_dir`: their folder, if
    it is not the stage's. `scales`: how many scales of the array the network sees, each half the size of the last.
    """

    stage_dir: Path
    array: str
    tile: Tile
    network: NetworkSpec
    checksums: Mapping[str, str]
    color: ColorMap | None = field(default=None, kw_only=True)
    guides: Guides = field(default=UNGUIDED, kw_only=True)
    guides_dir: Path | None = field(default=None, kw_only=True)
    scales: int = field(default=1, kw_only=True)

    @property
    def device(self) -> str:
        """Torch's name of the device that computes."""
        return self.network.device

    def open(self, name: str) -> StageArray:
        """Open an array for reading; its chunks are checked."""
        return open_array(self.stage_dir, name, self.checksums.get(name))

    def reads(self, halo: int) -> Rect:
        """The pixels of the array that the tile needs at any scale, with a halo of `halo` px of that scale."""
        return self.tile.outer(halo << self.scales - 1)

    def windows(self, halo: int, guides_halo: int) -> list[Window]:
        """The tile's pixels at each scale at which it has any, with their halo, and the masks with theirs."""
        windows = []
        for scale in range(self.scales):
            tile = self.tile.shrunk(scale)
            if tile.inner.area:
                # the halo in px of this scale: aligned there as at scale 0, so that blocks are those of the whole image
                outer, guided = self.tile.outer(halo << scale), self.tile.outer(guides_halo << scale)
                pixels_1CHW, guide_pixels = self.load(self.array, outer, scale), self.read_guides(guided, scale)
                windows.append(
                    Window(scale, tile, outer.shrunk(scale), pixels_1CHW, guided.shrunk(scale), guide_pixels)
                )
        return windows

    def load(self, name: str, rect: Rect, scale: int = 0) -> Tensor:
        """A rectangle of an array, (1, C, H, W) in at least float32 on the device. Raises DeviceMemoryError."""
        # bfloat16 and tf32 apply inside the network only: the differences of nearly equal numbers need float32
        dtype = torch.float64 if self.network.dtype == "float64" else torch.float32
        with profiler.span("read", tile=self.tile.index, array=name), device_memory(self):
            return device_io.load(self.open(name), rect, self.network.device, dtype, scale)

    def read_guides(self, rect: Rect, scale: int) -> NDArray[Any] | None:
        """The masks of a rectangle of the canvas, (H, W, K); None where the stage has none."""
        if not self.guides.arrays:
            return None
        with profiler.span("read", tile=self.tile.index, array="guides"):
            return read_guides(self.guides_dir or self.stage_dir, self.guides, self.checksums, rect, scale)


@dataclass
class Window:
    """A tile at one scale, in px of the array shrunk to it: the pixels of its outer rectangle, and its masks.

    `guide_pixels`: of the rectangle `guided`, None without masks.
    """

    scale: int
    tile: Tile
    outer: Rect
    pixels_1CHW: Tensor
    guided: Rect
    guide_pixels: NDArray[Any] | None

    def key(self, layer: Layer) -> str:
        """The layer key at this scale."""
        return layer_key(layer.name, self.scale)

    def guide_maps(self, guides: Guides, like: Tensor) -> GuideMaps | None:
        """The masks on the device of `like`."""
        return None if self.guide_pixels is None else GuideMaps(guides, self.guide_pixels, self.guided, like)


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

    `content_factors`: by layer key, the factor of φ(p) − φ(o) in dJ/dφ. `tv_weight`: w_tv; 0 leaves the term out.
    `tv_kind`: loss.tv_kind. If `color` is set it is luminance: the gradient is dJ/dY, in all three channels, so that
    the canvas moves along greys. `basis`: M of the optimiser's colour coordinates, in which the gradient is written;
    None for RGB.
    """

    content_factors: Mapping[str, float]
    tv_weight: float = field(default=0.0, kw_only=True)
    tv_kind: TvKind = field(default="squared", kw_only=True)
    basis: Basis | None = field(default=None, kw_only=True)

    def read_content(self, window: Window) -> dict[str, tuple[Tensor, Rect]]:
        """By layer key of the window's scale, the content's features at its positions, and their rectangle."""
        keys = [key for key in self.content_factors if scale_of(key) == window.scale]
        regions = {key: window.outer.positions(LAYER_BY_NAME[layer_of(key)]) for key in keys}
        return {key: (self.load(content_features_name(key), region), region) for key, region in regions.items()}


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
    """By layer key ‖φ_l(o)‖² over the inner rectangle, and the checksums of the feature chunks written."""

    energies: Mapping[str, float]
    sums: Mapping[str, ChunkSums]


@dataclass(frozen=True)
class GradientResult:
    """By layer key Σ(φ(p) − φ(o))² over the inner rectangle, max|g| there, and the checksums of its chunks.

    `variation`: the tile's share of 3N·Ltv; 0 without that term. `style_pull`: ⟨dJ/dG, the tile's G⟩ over all style
    terms, estimated, for the map of the losses.
    """

    content_squares: Mapping[str, float]
    max_abs_gradient: float
    sums: ChunkSums
    variation: float = 0.0
    style_pull: float = 0.0


@dataclass(frozen=True)
class WholeResult:
    """The results of the Gram and the gradient pass of a canvas that is one tile."""

    terms: Mapping[str, objective.StyleTerm]
    gradient: GradientResult
