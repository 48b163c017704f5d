"""Tasks on tiles of the Gram, content and gradient pass. Each reads a tile, computes, and writes whole chunks.

Every task is a pure function of its spec: it may run twice and writes the same bytes. Axes in names: 1 batch,
C channels, H rows, W columns.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.core import profiler
from pipeline.core.errors import ConfigError, DeviceMemoryError
from pipeline.core.tiling import Rect, Tile
from pipeline.core.vgg_layers import ALIGN_PX, LAYER_BY_NAME, halo_px
from pipeline.losses import objective
from pipeline.losses.color import ColorMap
from pipeline.losses.color_space import Basis
from pipeline.losses.masks import GuideMaps
from pipeline.losses.objective import Gram
from pipeline.losses.total_variation import variation
from pipeline.network import NetworkSpec
from pipeline.network.cache import get_network
from pipeline.network.vgg import FeatureMap, Step
from pipeline.render import device_io
from pipeline.render.mask_tasks import read_guides
from pipeline.store import UNGUIDED, ChunkSums, Guides, StageArray, content_features_name, layer_of, open_array

# One tile computes at a time, while others in flight read and write: memory is planned for the maps of one tile.
_COMPUTE = threading.Semaphore(1)
# On the CPU, torch and oneDNN raise a plain RuntimeError when they run out of memory.
_NO_MEMORY = re.compile(r"can't allocate memory|could not create a (primitive|memory)")


@contextmanager
def _computing(spec: TileSpec) -> Iterator[None]:
    """Reserve the device for one tile until all its kernels have finished. Raises DeviceMemoryError."""
    with _device_memory(spec):
        with profiler.span("wait"):
            _COMPUTE.acquire()
        try:
            with profiler.span("compute", tile=spec.tile.index, array=spec.array), torch.no_grad():
                yield
                if spec.network.on_gpu:
                    torch.cuda.current_stream(spec.network.device).synchronize()
        finally:
            _COMPUTE.release()


@contextmanager
def _device_memory(spec: TileSpec) -> Iterator[None]:
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
        with profiler.span("read", tile=self.tile.index, array=name), _device_memory(self):
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


def gram_task(spec: GramSpec) -> dict[str, Gram]:
    """gram_sum of every style key over the positions of the tile's inner rectangle (eqs. 14, 15)."""
    # the forward halo is enough: no gradient flows back, so the features of the inner rectangle are exact
    pixels_1CHW, outer = spec.read_outer(halo_px(spec.layers, spec.network.pooling))
    guide_pixels = spec.read_guides(spec.tile.inner)
    sums: dict[str, Gram] = {}
    with _computing(spec):
        network_input_1CHW = _network_input(spec, pixels_1CHW)
        maps = _guide_maps(spec, guide_pixels, spec.tile.inner, network_input_1CHW)
        for feature_map in _features(spec, network_input_1CHW, outer, set(spec.layers), spec.tile.inner):
            sums |= _gram_sums(spec, feature_map, maps, spec.with_mean)
    return sums


def _gram_sums(spec: TileSpec, feature_map: FeatureMap, maps: GuideMaps | None, with_mean: bool) -> dict[str, Gram]:
    """gram_sum of one layer over the inner rectangle: one matrix, or one per mask region."""
    features_CHW, keys = _inner_features(feature_map, spec.tile).detach(), spec.guides.keys(feature_map.layer.name)
    if maps is None or not spec.guides.regions:
        (key,) = keys
        return {key: objective.gram_sum(features_CHW, with_mean=with_mean)}
    shares_RHW = maps.shares(feature_map.layer, spec.tile.inner.positions(feature_map.layer))
    return {
        key: objective.gram_sum(features_CHW, share_HW, with_mean=with_mean)
        for key, share_HW in zip(keys, shares_RHW, strict=True)
    }


def add_grams(total: dict[str, Gram], tile: dict[str, Gram]) -> dict[str, Gram]:
    """Add the Gram sums of one more tile; called in tile order, so that the sum has the same bits on every run."""
    # a new dict: the executor may call this twice with the same total
    return {**total, **{layer: total[layer] + gram if layer in total else gram for layer, gram in tile.items()}}


def content_task(spec: ContentSpec) -> ContentResult:
    """Write the content's features of the inner rectangle."""
    pixels_1CHW, outer = spec.read_outer(halo_px(spec.layers, spec.network.pooling))
    with _computing(spec):
        computed = {
            feature_map.layer.name: (feature_map.layer, _inner_features(feature_map, spec.tile).clone())
            for feature_map in _features(
                spec, _network_input(spec, pixels_1CHW), outer, set(spec.layers), spec.tile.inner
            )
        }
    energies: dict[str, float] = {}
    sums: dict[str, ChunkSums] = {}
    # written after the device is released: another tile computes meanwhile
    for name, (layer, features_CHW) in computed.items():
        array = open_array(spec.stage_dir, content_features_name(name))
        with profiler.span("write", tile=spec.tile.index, array=array.path.name), _device_memory(spec):
            sums[name] = device_io.save(array, spec.tile.inner.positions(layer), features_CHW)
        energies[name] = objective.energy(features_CHW)
    return ContentResult(energies, sums)


def gradient_task(spec: GradientSpec) -> GradientResult:
    """Write dJ/dp of the tile's inner rectangle (eq. 21), from local seeds and whole-image totals.

    Raises ConfigError if the gradient is not finite.
    """
    names = {*map(layer_of, spec.style_seeds_CM), *spec.content_factors}
    halo = halo_px(names, spec.network.pooling) or ALIGN_PX  # total variation reads the neighbouring pixels
    # twice the halo: seeds at the border of the receptive field need exact features themselves
    pixels_1CHW, outer = spec.read_outer(2 * halo)
    guide_pixels = spec.read_guides(outer)
    # read before the device is reserved, while another tile computes
    seeds = _Seeds(spec, dict(spec.style_seeds_CM), spec.read_content(outer))
    with _computing(spec):
        network_input_1CHW, tape = _network_input(spec, pixels_1CHW), list[Step]()
        needed = spec.tile.inner.grown(halo, spec.tile.height, spec.tile.width)
        seeds.maps = _guide_maps(spec, guide_pixels, outer, network_input_1CHW)
        for _ in _features(spec, network_input_1CHW, outer, names, needed, tape):
            pass
        gradient_CHW, tv_sum = _gradient(spec, network_input_1CHW, outer, tape, seeds)
    return _written(spec, gradient_CHW, seeds, tv_sum)


def whole_task(spec: WholeSpec) -> WholeResult:
    """Gram and gradient pass of a canvas that is one tile, with one forward pass. Raises like gradient_task."""
    pixels_1CHW, outer = spec.read_outer(0)
    guide_pixels = spec.read_guides(outer)
    seeds = _Seeds(spec, {}, spec.read_content(outer))
    names = {*map(layer_of, spec.style_targets), *spec.content_factors}
    with_mean = any(target.has_mean for target in spec.style_targets.values())
    terms: dict[str, objective.StyleTerm] = {}
    with _computing(spec):
        network_input_1CHW, tape = _network_input(spec, pixels_1CHW), list[Step]()
        seeds.maps = _guide_maps(spec, guide_pixels, outer, network_input_1CHW)
        for feature_map in _features(spec, network_input_1CHW, outer, names, outer, tape):
            if any(key in spec.style_targets for key in spec.guides.keys(feature_map.layer.name)):
                sums = _gram_sums(spec, feature_map, seeds.maps, with_mean)
                terms |= {key: spec.style_targets[key].term(sums[key]) for key in sums if key in spec.style_targets}
        seeds.style_CM |= {key: term.seed_CM for key, term in terms.items()}
        gradient_CHW, tv_sum = _gradient(spec, network_input_1CHW, outer, tape, seeds)
    return WholeResult(terms, _written(spec, gradient_CHW, seeds, tv_sum))


@dataclass
class _Seeds:
    """dJ/dφ of a tile, layer by layer, at all positions. `of` is called once per layer and frees the layer's content.

    `maps`: the masks, None without. `squares`: Σ(φ(p) − φ(o))² over the inner positions, of the content layers so far.
    """

    spec: SeedSpec
    style_CM: dict[str, Gram]
    content: dict[str, tuple[Tensor, Rect]]
    maps: GuideMaps | None = None
    squares: dict[str, Tensor] = field(default_factory=dict)

    def of(self, feature_map: FeatureMap) -> Tensor | None:
        """dJ/dφ, of the shape of the features; None for a layer that J does not use."""
        name, features_1CHW = feature_map.layer.name, feature_map.features_1CHW
        style = self._style(feature_map)
        if name not in self.content:
            return style
        target_1CHW, region = self.content.pop(name)
        rows, columns = feature_map.region.within(region)
        # subtract in the precision of the store: in bfloat16 the difference of nearly equal numbers would be lost
        difference = features_1CHW - target_1CHW[:, :, rows, columns]
        weight_1HW = None if self.maps is None else self.maps.content_weight(feature_map.layer, feature_map.region)
        rows, columns = self.spec.tile.inner.positions(feature_map.layer).within(feature_map.region)
        inner_weight_1HW = None if weight_1HW is None else weight_1HW[:, rows, columns]
        self.squares[name] = objective.squares(difference[0, :, rows, columns], inner_weight_1HW)
        if weight_1HW is not None:
            difference *= weight_1HW
        content = (self.spec.content_factors[name] * difference).to(features_1CHW)
        return content if style is None else style + content

    def _style(self, feature_map: FeatureMap) -> Tensor | None:
        """d(N·w_s·Ls)/dφ at all positions of a layer, summed over the mask regions; None for a layer without style."""
        features_1CHW, guides, total = feature_map.features_1CHW, self.spec.guides, None
        guided = self.maps if guides.regions > 0 else None
        shares_RHW = None if guided is None else guided.shares(feature_map.layer, feature_map.region).to(features_1CHW)
        for region, key in enumerate(guides.keys(feature_map.layer.name)):
            if key in self.style_CM:
                seed_1CHW = objective.style_seed(features_1CHW, self.style_CM[key])
                if shares_RHW is not None:
                    seed_1CHW *= shares_RHW[region]
                total = seed_1CHW if total is None else total.add_(seed_1CHW)
        return total


def _gradient(
    spec: SeedSpec, network_input_1CHW: Tensor, outer: Rect, tape: list[Step], seeds: _Seeds
) -> tuple[Tensor, float]:
    """(the gradient of the inner rectangle, (3, H, W), its share of 3N·Ltv)."""
    # a tile may lie where neither a style nor the content has any weight
    gradient_1CHW = get_network(spec.network).gradient(tape, seeds.of) if tape else torch.zeros_like(network_input_1CHW)
    rows, columns = spec.tile.inner.within(outer)
    gradient_CHW, tv_sum = gradient_1CHW[0, :, rows, columns], 0.0
    if spec.tv_weight:
        tv_sum, smoothing_CHW = variation(network_input_1CHW, outer.y0, outer.x0, spec.tile)
        gradient_CHW = gradient_CHW + spec.tv_weight * smoothing_CHW
    if spec.color is not None:
        gradient_CHW = gradient_CHW.sum(0, keepdim=True).expand(3, -1, -1)
    if spec.basis is not None:
        gradient_CHW = _mixed(gradient_CHW[None], tuple(zip(*spec.basis, strict=True)), (0.0, 0.0, 0.0))[0]
    return gradient_CHW, tv_sum


def _written(spec: TileSpec, gradient_CHW: Tensor, seeds: _Seeds, tv_sum: float) -> GradientResult:
    gradient = open_array(spec.stage_dir, "gradient")
    # rounding is monotonic: the largest value stays the largest
    max_abs = gradient.rounded(float(torch.linalg.vector_norm(gradient_CHW, float("inf"))))
    if not np.isfinite(max_abs):
        # refused before the update: one NaN would spread over the whole canvas within a few iterations
        raise ConfigError(
            f"the gradient of tile {spec.tile.index} of {spec.stage_dir.name} is not finite: compute.dtype "
            f"{spec.network.dtype} overflows with these weights and losses. Use float32 or smaller weights."
        )
    with profiler.span("write", tile=spec.tile.index, array="gradient"), _device_memory(spec):
        sums = device_io.save(gradient, spec.tile.inner, gradient_CHW)
    return GradientResult({name: float(value) for name, value in seeds.squares.items()}, max_abs, sums, tv_sum)


def _features(
    spec: TileSpec,
    pixels_1CHW: Tensor,
    outer: Rect,
    layers: set[str],
    required: Rect,
    tape: list[Step] | None = None,
) -> Iterator[FeatureMap]:
    size = (spec.tile.height, spec.tile.width)
    return get_network(spec.network).features(pixels_1CHW, outer, size, layers, required, tape)


def _inner_features(feature_map: FeatureMap, tile: Tile) -> Tensor:
    """(C, H, W) of the positions that belong to the tile's inner rectangle."""
    rows, columns = tile.inner.positions(feature_map.layer).within(feature_map.region)
    return feature_map.features_1CHW[0, :, rows, columns]


def _guide_maps(spec: TileSpec, pixels_HWK: NDArray[np.uint8] | None, rect: Rect, like: Tensor) -> GuideMaps | None:
    return None if pixels_HWK is None else GuideMaps(spec.guides, pixels_HWK, rect, like)


def _network_input(spec: TileSpec, pixels_1CHW: Tensor) -> Tensor:
    """The pixels after the colour map."""
    color = spec.color
    if color is None:
        return pixels_1CHW
    mapped_1CHW = _mixed(pixels_1CHW, color.matrix, color.bias)
    return mapped_1CHW.clamp_(0, 255) if color.clip else mapped_1CHW


def _mixed(x_1CHW: Tensor, matrix: Basis, bias: tuple[float, float, float]) -> Tensor:
    """matrix·x + bias of every pixel x."""
    # not as a convolution: its kernels, and tf32, may round differently from tile size to tile size
    columns_C1C11 = x_1CHW.new_tensor(matrix).T[:, None, :, None, None]
    mixed_1CHW = x_1CHW.new_tensor(bias)[None, :, None, None].expand(x_1CHW.shape)
    for index, column_1C11 in enumerate(columns_C1C11):
        mixed_1CHW = mixed_1CHW + column_1C11 * x_1CHW[:, index : index + 1]
    return mixed_1CHW
