"""The tasks on tiles: Gram, content and gradient pass. Each reads a tile, computes, and writes whole chunks.

Every task is a pure function of its spec: it may run twice, and writes the same bytes. Axes in names: 1 batch,
C channels, H rows, W columns.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline import losses, timeline
from pipeline.arrays import content_features_name, layer_of
from pipeline.checksums import ChunkSums
from pipeline.colors import ColorMap
from pipeline.errors import ConfigError, DeviceMemoryError
from pipeline.guidance import GuideMaps, read_guides
from pipeline.layers import LAYER_BY_NAME, halo_px
from pipeline.losses import Gram
from pipeline.network import FeatureMap, get_network
from pipeline.regions import UNGUIDED, Guides
from pipeline.store import StageArray, open_array
from pipeline.tiling import Rect, Tile
from pipeline.variation import variation
from pipeline.weights import NetworkSpec

# One tile computes at a time: its neighbours in flight read and write. Memory is planned for one.
_COMPUTE = threading.Semaphore(1)
# On the CPU, the out-of-memory errors of torch and oneDNN have no class of their own.
_NO_MEMORY = re.compile(r"can't allocate memory|could not create a (primitive|memory)")


@contextmanager
def _computing(spec: TileSpec) -> Iterator[None]:
    """The device, for one tile alone. Raises DeviceMemoryError where its memory does not suffice."""
    try:
        with timeline.span("wait"):
            _COMPUTE.acquire()
        try:
            with timeline.span("compute", tile=spec.tile.index, array=spec.array):
                yield
        finally:
            _COMPUTE.release()
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not _NO_MEMORY.search(str(error)):
            raise
        inner = spec.tile.inner
        raise DeviceMemoryError(
            f"{spec.network.device} has no memory for tile {spec.tile.index} of {spec.stage_dir.name}, "
            f"{inner.width}×{inner.height} px and its halo: something else uses it, or the plan is wrong. Nothing is "
            "lost: the same command goes on once there is more, or with a smaller store.chunk_px in a new work_dir."
        ) from error


@dataclass(frozen=True)
class TileSpec:
    """A tile of one array of a stage, and the network that sees it.

    `checksums`: of the arrays that the task reads, by name; those without are not checked. `color`: what becomes of the
    pixels before the network sees them. `guides`: of the stage, where the losses are guided.
    """

    stage_dir: Path
    array: str
    tile: Tile
    network: NetworkSpec
    checksums: Mapping[str, str]
    color: ColorMap | None = field(default=None, kw_only=True)
    guides: Guides = field(default=UNGUIDED, kw_only=True)

    def open(self, name: str) -> StageArray:
        """An array to read, which checks itself."""
        return open_array(self.stage_dir, name, self.checksums.get(name))

    def read_outer(self, halo: int) -> tuple[NDArray[Any], Rect]:
        """The tile's pixels with their halo, and the rectangle that they cover."""
        outer = self.tile.outer(halo)
        with timeline.span("read", tile=self.tile.index, array=self.array):
            return self.open(self.array).read_window(outer), outer

    def read_guides(self, rect: Rect) -> NDArray[np.uint8] | None:
        """The guides of a rectangle of the canvas, None where there are none."""
        if not self.guides.arrays:
            return None
        with timeline.span("read", tile=self.tile.index, array="guides"):
            return read_guides(self.stage_dir, self.guides, self.checksums, rect)


@dataclass(frozen=True)
class GramSpec(TileSpec):
    """Sum the Grams of `layers` over the tile's inner rectangle, per region if there are some."""

    layers: tuple[str, ...]


@dataclass(frozen=True)
class ContentSpec(TileSpec):
    """Store the features of `layers` of the content image, and measure their energy."""

    layers: tuple[str, ...]


@dataclass(frozen=True)
class SeedSpec(TileSpec):
    """A tile whose gradient is asked for.

    `content_factors`: per layer, what turns φ(p) − φ(o) into the seed. `tv_weight`: w_tv; 0 leaves it out. A `color` is
    luminance here: the gradient is that of moving along the greys, dJ/dY, in all three channels.
    """

    content_factors: Mapping[str, float]
    tv_weight: float = field(default=0.0, kw_only=True)

    def read_content(self, outer: Rect) -> dict[str, tuple[NDArray[Any], Rect]]:
        """The content's features at every position of `outer`, per layer, and what positions these are."""
        found = {}
        for name in self.content_factors:
            region = outer.positions(LAYER_BY_NAME[name])
            with timeline.span("read", tile=self.tile.index, array=content_features_name(name)):
                found[name] = self.open(content_features_name(name)).read_window(region), region
        return found


@dataclass(frozen=True)
class GradientSpec(SeedSpec):
    """The gradient of the tile's inner rectangle. `style_seeds_CC`: by style key, what turns features into the seed."""

    style_seeds_CC: Mapping[str, Gram]


@dataclass(frozen=True)
class WholeSpec(SeedSpec):
    """The gradient of a canvas that is one tile: its own Grams are those of the whole, and one forward is enough."""

    style_targets: Mapping[str, losses.StyleTarget]


@dataclass(frozen=True)
class ContentResult:
    """Per content layer ‖φ_l(o)‖² over the inner rectangle, and the checksums of the chunks of its features."""

    energies: Mapping[str, float]
    sums: Mapping[str, ChunkSums]


@dataclass(frozen=True)
class GradientResult:
    """Per content layer Σ(φ(p) − φ(o))² over the inner rectangle, the largest |g| there, and its chunks' checksums.

    `variation`: the tile's share of 3N·Ltv, 0 where it is left out.
    """

    content_squares: Mapping[str, float]
    max_abs_gradient: float
    sums: ChunkSums
    variation: float = 0.0


@dataclass(frozen=True)
class WholeResult:
    """What the Gram and the gradient pass give, of one task."""

    terms: Mapping[str, losses.StyleTerm]
    gradient: GradientResult


def gram_task(spec: GramSpec) -> dict[str, Gram]:
    """gram_sum of every style key over the positions of the tile's inner rectangle (eqs. 14, 15)."""
    pixels, outer = spec.read_outer(halo_px(spec.layers))
    guide_pixels = spec.read_guides(spec.tile.inner)
    sums: dict[str, Gram] = {}
    with _computing(spec), torch.no_grad():
        seen = _seen(spec, pixels)
        maps = _guide_maps(spec, guide_pixels, spec.tile.inner, seen)
        for found in _features(spec, seen, outer, set(spec.layers), spec.tile.inner):
            sums |= _gram_sums(spec, found, maps)
    return sums


def _gram_sums(spec: TileSpec, found: FeatureMap, maps: GuideMaps | None) -> dict[str, Gram]:
    """gram_sum of one layer over the inner rectangle: one, or one per region."""
    features_CHW, keys = _inner_features(found, spec.tile).detach(), spec.guides.keys(found.layer.name)
    if maps is None or not spec.guides.regions:
        (key,) = keys
        return {key: losses.gram_sum(features_CHW)}
    shares_RHW = maps.shares(found.layer, spec.tile.inner.positions(found.layer))
    return {key: losses.gram_sum(features_CHW, share_HW) for key, share_HW in zip(keys, shares_RHW, strict=True)}


def add_grams(total: dict[str, Gram], tile: dict[str, Gram]) -> dict[str, Gram]:
    """`total` with one more tile: the combine step of the fold, called in tile order."""
    return {**total, **{layer: total[layer] + gram if layer in total else gram for layer, gram in tile.items()}}


def content_task(spec: ContentSpec) -> ContentResult:
    """Write the content's features over the inner rectangle."""
    pixels, outer = spec.read_outer(halo_px(spec.layers))
    energies: dict[str, float] = {}
    sums: dict[str, ChunkSums] = {}
    with _computing(spec), torch.no_grad():
        computed = {
            found.layer.name: (found.layer, _to_host(_inner_features(found, spec.tile)))
            for found in _features(spec, _seen(spec, pixels), outer, set(spec.layers), spec.tile.inner)
        }
    for name, (layer, features_HWC) in computed.items():
        array = open_array(spec.stage_dir, content_features_name(name))
        with timeline.span("write", tile=spec.tile.index, array=array.path.name):
            sums[name] = array.write_window(spec.tile.inner.positions(layer), features_HWC.astype(array.value_dtype))
        energies[name] = float(np.sum(np.square(features_HWC, dtype=np.float64)))
    return ContentResult(energies, sums)


def gradient_task(spec: GradientSpec) -> GradientResult:
    """Write dJ/dp of the tile's inner rectangle (eq. 21), from local seeds and whole-image totals.

    Raises ConfigError if the gradient is not finite.
    """
    names = {*map(layer_of, spec.style_seeds_CC), *spec.content_factors}
    halo = halo_px(names)
    pixels, outer = spec.read_outer(2 * halo)
    content, guide_pixels = spec.read_content(outer), spec.read_guides(outer)
    with _computing(spec):
        canvas_1CHW = _seen(spec, pixels).requires_grad_()
        needed = spec.tile.inner.grown(halo, spec.tile.height, spec.tile.width)
        found = list(_features(spec, canvas_1CHW, outer, names, needed))
        maps = _guide_maps(spec, guide_pixels, outer, canvas_1CHW)
        seeds, squares = _seeds(spec, found, spec.style_seeds_CC, content, maps)
        gradient_HWC, roughness = _gradient(spec, canvas_1CHW, outer, found, seeds)
    return _written(spec, gradient_HWC, squares, roughness)


def whole_task(spec: WholeSpec) -> WholeResult:
    """Gram and gradient pass of a canvas that is one tile, by one forward. Raises ConfigError like gradient_task."""
    pixels, outer = spec.read_outer(0)
    content, guide_pixels = spec.read_content(outer), spec.read_guides(outer)
    names = {*map(layer_of, spec.style_targets), *spec.content_factors}
    with _computing(spec):
        canvas_1CHW = _seen(spec, pixels).requires_grad_()
        found = list(_features(spec, canvas_1CHW, outer, names, outer))
        maps = _guide_maps(spec, guide_pixels, outer, canvas_1CHW)
        terms: dict[str, losses.StyleTerm] = {}
        for one in found:
            if any(key in spec.style_targets for key in spec.guides.keys(one.layer.name)):
                sums = _gram_sums(spec, one, maps)
                terms |= {key: spec.style_targets[key].term(sums[key]) for key in sums if key in spec.style_targets}
        seeds, squares = _seeds(spec, found, {key: term.seed_CC for key, term in terms.items()}, content, maps)
        gradient_HWC, roughness = _gradient(spec, canvas_1CHW, outer, found, seeds)
    return WholeResult(terms, _written(spec, gradient_HWC, squares, roughness))


def _seeds(
    spec: SeedSpec,
    found: list[FeatureMap],
    style_seeds_CC: Mapping[str, Gram],
    content: Mapping[str, tuple[NDArray[Any], Rect]],
    maps: GuideMaps | None,
) -> tuple[list[Tensor], dict[str, float]]:
    """(dJ/dφ of every layer on all its positions, Σ(φ(p) − φ(o))² over the inner ones per content layer)."""
    seeds: list[Tensor] = []
    squares: dict[str, float] = {}
    for one in found:
        name, features_1CHW = one.layer.name, one.features_1CHW.detach()
        seed = _style_seed(spec, one, style_seeds_CC, maps)
        if name in content:
            features_HWC, region = content[name]
            target = _to_device(features_HWC[one.region.within(region)], spec.network)
            # subtract in the precision of the store: bfloat16 would lose what is left of nearly equal numbers
            difference = features_1CHW - target
            weight_1HW = None if maps is None else maps.content_weight(one.layer, one.region)
            rows, columns = spec.tile.inner.positions(one.layer).within(one.region)
            squares_CHW = difference[0, :, rows, columns].double().square()
            if weight_1HW is not None:
                squares_CHW *= weight_1HW[:, rows, columns]
                difference *= weight_1HW
            squares[name] = float(squares_CHW.sum())
            kept = (spec.content_factors[name] * difference).to(features_1CHW)
            seed = kept if seed is None else seed + kept
        assert seed is not None, name
        seeds.append(seed)
    return seeds, squares


def _style_seed(spec: SeedSpec, one: FeatureMap, seeds_CC: Mapping[str, Gram], maps: GuideMaps | None) -> Tensor | None:
    """d(N·w_s·Ls)/dφ on all positions of a layer, summed over the regions; None where no style looks at it."""
    features_1CHW, total = one.features_1CHW.detach(), None
    guided = maps is not None and spec.guides.regions > 0
    shares_RHW = maps.shares(one.layer, one.region).to(features_1CHW) if maps is not None and guided else None
    for region, key in enumerate(spec.guides.keys(one.layer.name)):
        if key in seeds_CC:
            matrix_CC = torch.from_numpy(seeds_CC[key]).to(features_1CHW)
            seed_1CHW = torch.einsum("cd,bdhw->bchw", matrix_CC, features_1CHW)
            if shares_RHW is not None:
                seed_1CHW *= shares_RHW[region]
            total = seed_1CHW if total is None else total.add_(seed_1CHW)
    return total


def _gradient(
    spec: SeedSpec, canvas_1CHW: Tensor, outer: Rect, found: list[FeatureMap], seeds: list[Tensor]
) -> tuple[NDArray[Any], float]:
    """(the gradient of the inner rectangle, its share of 3N·Ltv)."""
    (gradient_1CHW,) = torch.autograd.grad([one.features_1CHW for one in found], canvas_1CHW, seeds)
    rows, columns = spec.tile.inner.within(outer)
    gradient_CHW, roughness = gradient_1CHW[0, :, rows, columns], 0.0
    if spec.tv_weight:
        roughness, smoothing_CHW = variation(canvas_1CHW.detach(), outer.y0, outer.x0, spec.tile)
        gradient_CHW = gradient_CHW + spec.tv_weight * smoothing_CHW
    if spec.color is not None:
        gradient_CHW = gradient_CHW.sum(0, keepdim=True).expand(3, -1, -1)
    return _to_host(gradient_CHW), roughness


def _written(spec: TileSpec, gradient_HWC: NDArray[Any], squares: dict[str, float], roughness: float) -> GradientResult:
    gradient = open_array(spec.stage_dir, "gradient")
    max_abs = gradient.kept(float(np.abs(gradient_HWC).max()))  # rounding keeps the order: the largest stays it
    if not np.isfinite(max_abs):
        raise ConfigError(
            f"the gradient of tile {spec.tile.index} of {spec.stage_dir.name} is not finite: compute.dtype "
            f"{spec.network.dtype} overflows with these weights and losses. Use float32 or smaller weights."
        )
    with timeline.span("write", tile=spec.tile.index, array="gradient"):
        sums = gradient.write_window(spec.tile.inner, gradient_HWC)
    return GradientResult(squares, max_abs, sums, roughness)


def _features(
    spec: TileSpec, pixels_1CHW: Tensor, outer: Rect, layers: set[str], required: Rect
) -> Iterator[FeatureMap]:
    size = (spec.tile.height, spec.tile.width)
    return get_network(spec.network).features(pixels_1CHW, outer, size, layers, required)


def _inner_features(found: FeatureMap, tile: Tile) -> Tensor:
    """(C, H, W) of the positions that belong to the tile's inner rectangle."""
    rows, columns = tile.inner.positions(found.layer).within(found.region)
    return found.features_1CHW[0, :, rows, columns]


def _guide_maps(spec: TileSpec, pixels_HWK: NDArray[np.uint8] | None, rect: Rect, like: Tensor) -> GuideMaps | None:
    return None if pixels_HWK is None else GuideMaps(spec.guides, pixels_HWK, rect, like)


def _seen(spec: TileSpec, pixels_HWC: NDArray[Any]) -> Tensor:
    """(1, C, H, W): the pixels on the device, as the network sees them."""
    pixels_1CHW, color = _to_device(pixels_HWC, spec.network), spec.color
    if color is None:
        return pixels_1CHW
    # no convolution: its kernels, and tf32, would round otherwise from tile to tile
    columns_C1C11 = pixels_1CHW.new_tensor(color.matrix).T[:, None, :, None, None]
    mapped_1CHW = pixels_1CHW.new_tensor(color.bias)[None, :, None, None].expand(pixels_1CHW.shape)
    for index, column_1C11 in enumerate(columns_C1C11):
        mapped_1CHW = mapped_1CHW + column_1C11 * pixels_1CHW[:, index : index + 1]
    return mapped_1CHW.clamp_(0, 255) if color.clip else mapped_1CHW


def _to_device(array_HWC: NDArray[Any], network: NetworkSpec) -> Tensor:
    """(1, C, H, W) in at least float32 on the network's device; the store's layout is channels-last already."""
    dtype = torch.float64 if network.dtype == "float64" else torch.float32
    return torch.from_numpy(array_HWC).to(network.device, dtype).permute(2, 0, 1)[None]


def _to_host(tensor_CHW: Tensor) -> NDArray[Any]:
    """(H, W, C) contiguous numpy, float32 or float64."""
    if tensor_CHW.dtype == torch.bfloat16:
        tensor_CHW = tensor_CHW.float()
    return np.ascontiguousarray(tensor_CHW.permute(1, 2, 0).cpu().numpy())


def initial_gray(_seed: int, array: StageArray, cy: int, cx: int) -> NDArray[Any]:
    """One chunk of the middle between black and white."""
    rows, columns = array.valid_part(cy, cx)
    return np.full((rows.stop, columns.stop, 3), 127.5, array.value_dtype)


def initial_noise(seed: int, array: StageArray, cy: int, cx: int) -> NDArray[Any]:
    """Uniform noise 0..255 of one chunk; the same for the same seed, whatever is drawn before or beside it."""
    rows, columns = array.valid_part(cy, cx)
    generator = np.random.default_rng([seed, cy, cx])
    return generator.uniform(0, 255, (rows.stop, columns.stop, 3)).astype(array.value_dtype)
