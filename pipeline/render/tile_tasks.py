"""Tasks on tiles of the Gram, content and gradient pass. Each reads a tile, computes, and writes whole chunks.

Every task is a pure function of its spec: it may run twice and writes the same bytes. Axes in names: 1 batch,
C channels, H rows, W columns.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.core import profiler
from pipeline.core.errors import ConfigError
from pipeline.core.tiling import Rect, Tile
from pipeline.core.vgg_layers import ALIGN_PX, halo_px
from pipeline.losses import objective
from pipeline.losses.color_space import Basis
from pipeline.losses.masks import GuideMaps
from pipeline.losses.objective import Gram
from pipeline.losses.total_variation import variation
from pipeline.network.cache import get_network
from pipeline.network.vgg import FeatureMap, Step
from pipeline.render import device_io
from pipeline.render.seeds import Seeds
from pipeline.render.tile_specs import (
    ContentResult,
    ContentSpec,
    GradientResult,
    GradientSpec,
    GramSpec,
    SeedSpec,
    TileSpec,
    WholeResult,
    WholeSpec,
    device_memory,
)
from pipeline.store import ChunkSums, content_features_name, layer_of, open_array

# One tile computes at a time, while others in flight read and write: memory is planned for the maps of one tile.
_COMPUTE = threading.Semaphore(1)


@contextmanager
def _computing(spec: TileSpec) -> Iterator[None]:
    """Reserve the device for one tile until all its kernels have finished. Raises DeviceMemoryError."""
    with device_memory(spec):
        with profiler.span("wait"):
            _COMPUTE.acquire()
        try:
            with profiler.span("compute", tile=spec.tile.index, array=spec.array), torch.no_grad():
                yield
                if spec.network.on_gpu:
                    torch.cuda.current_stream(spec.network.device).synchronize()
        finally:
            _COMPUTE.release()


def gram_task(spec: GramSpec) -> dict[str, Gram]:
    """gram_sum of every style key over the positions of the tile's inner rectangle (eqs. 14, 15)."""
    # the forward halo is enough: no gradient flows back, so the features of the inner rectangle are exact
    pixels_1CHW, outer = spec.read_outer(halo_px(spec.layers))
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
    pixels_1CHW, outer = spec.read_outer(halo_px(spec.layers))
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
        with profiler.span("write", tile=spec.tile.index, array=array.path.name), device_memory(spec):
            sums[name] = device_io.save(array, spec.tile.inner.positions(layer), features_CHW)
        energies[name] = objective.energy(features_CHW)
    return ContentResult(energies, sums)


def gradient_task(spec: GradientSpec) -> GradientResult:
    """Write dJ/dp of the tile's inner rectangle (eq. 21), from local seeds and whole-image totals.

    Raises ConfigError if the gradient is not finite.
    """
    names = {*map(layer_of, spec.style_seeds_CM), *spec.content_factors}
    halo = halo_px(names) or ALIGN_PX  # total variation reads the neighbouring pixels
    # twice the halo: seeds at the border of the receptive field need exact features themselves
    pixels_1CHW, outer = spec.read_outer(2 * halo)
    guide_pixels = spec.read_guides(outer)
    # read before the device is reserved, while another tile computes
    seeds = Seeds(spec, dict(spec.style_seeds_CM), spec.read_content(outer))
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
    seeds = Seeds(spec, {}, spec.read_content(outer))
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


def _gradient(
    spec: SeedSpec, network_input_1CHW: Tensor, outer: Rect, tape: list[Step], seeds: Seeds
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


def _written(spec: TileSpec, gradient_CHW: Tensor, seeds: Seeds, tv_sum: float) -> GradientResult:
    gradient = open_array(spec.stage_dir, "gradient")
    # rounding is monotonic: the largest value stays the largest
    max_abs = gradient.rounded(float(torch.linalg.vector_norm(gradient_CHW, float("inf"))))
    if not np.isfinite(max_abs):
        # refused before the update: one NaN would spread over the whole canvas within a few iterations
        raise ConfigError(
            f"the gradient of tile {spec.tile.index} of {spec.stage_dir.name} is not finite: compute.dtype "
            f"{spec.network.dtype} overflows with these weights and losses. Use float32 or smaller weights."
        )
    with profiler.span("write", tile=spec.tile.index, array="gradient"), device_memory(spec):
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
