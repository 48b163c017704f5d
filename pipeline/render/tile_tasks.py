"""Tasks on tiles of the Gram, content and gradient pass. Each reads a tile, computes, and writes whole chunks.

Every task is a pure function of its spec: it may run twice and writes the same bytes. Axes in names: 1 batch,
C channels, H rows, W columns.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from pipeline.core import profiler
from pipeline.core.errors import ConfigError
from pipeline.core.tiling import Rect
from pipeline.core.vgg_layers import ALIGN_PX, halo_px
from pipeline.losses import objective
from pipeline.losses.color_space import Basis
from pipeline.losses.masks import GuideMaps
from pipeline.losses.objective import Gram
from pipeline.losses.total_variation import variation
from pipeline.network.cache import get_network, wider
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
    TileTask,
    WholeResult,
    WholeSpec,
    Window,
    device_memory,
)
from pipeline.store import ChunkSums, content_features_name, layer_of, open_array

# One tile computes at a time, while others in flight read and write: memory is planned for the maps of one tile.
_COMPUTE = threading.Semaphore(1)


@contextmanager
def computing(spec: TileTask) -> Iterator[None]:
    """Reserve the device for one tile until all its kernels have finished. Raises DeviceMemoryError."""
    with device_memory(spec):
        with profiler.span("wait"):
            _COMPUTE.acquire()
        try:
            with profiler.span("compute", tile=spec.tile.index, array=spec.array), torch.no_grad():
                yield
                if spec.device != "cpu":
                    torch.cuda.current_stream(spec.device).synchronize()
        finally:
            _COMPUTE.release()


def gram_task(spec: GramSpec) -> dict[str, Gram]:
    """gram_sum of every style key over the positions of the tile's inner rectangle (eqs. 14, 15)."""
    # the forward halo is enough: no gradient flows back, so the features of the inner rectangle are exact
    windows = spec.windows(halo_px(spec.layers, spec.network.pooling), 0)
    sums: dict[str, Gram] = {}
    with computing(spec):
        for window in windows:
            network_input_1CHW = _network_input(spec, window)
            maps = window.guide_maps(spec.guides, network_input_1CHW)
            for feature_map in _features(spec, window, network_input_1CHW, set(spec.layers), window.tile.inner):
                sums |= _gram_sums(spec, window, feature_map, maps, spec.with_mean)
    return sums


def _gram_sums(
    spec: TileSpec, window: Window, feature_map: FeatureMap, maps: GuideMaps | None, with_mean: bool
) -> dict[str, Gram]:
    """gram_sum of one layer over the inner rectangle: one matrix, or one per mask region."""
    features_CHW, keys = _inner_features(window, feature_map).detach(), spec.guides.keys(window.key(feature_map.layer))
    if maps is None or not spec.guides.regions:
        (key,) = keys
        return {key: objective.gram_sum(features_CHW, with_mean=with_mean)}
    shares_RHW = maps.shares(feature_map.layer, window.tile.inner.positions(feature_map.layer))
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
    windows = spec.windows(halo_px(spec.layers, spec.network.pooling), 0)
    computed: dict[str, tuple[Rect, Tensor]] = {}
    with computing(spec):
        for window in windows:
            network_input_1CHW = _network_input(spec, window)
            for feature_map in _features(spec, window, network_input_1CHW, set(spec.layers), window.tile.inner):
                region = window.tile.inner.positions(feature_map.layer)
                computed[window.key(feature_map.layer)] = region, _inner_features(window, feature_map).clone()
    energies: dict[str, float] = {}
    sums: dict[str, ChunkSums] = {}
    # written after the device is released: another tile computes meanwhile
    for key, (region, features_CHW) in computed.items():
        array = open_array(spec.stage_dir, content_features_name(key))
        with profiler.span("write", tile=spec.tile.index, array=array.path.name), device_memory(spec):
            sums[key] = device_io.save(array, region, features_CHW)
        energies[key] = objective.energy(features_CHW)
    return ContentResult(energies, sums)


def gradient_task(spec: GradientSpec) -> GradientResult:
    """Write dJ/dp of the tile's inner rectangle (eq. 21), from local seeds and whole-image totals.

    Raises ConfigError if the gradient is not finite.
    """
    return _gradient(spec, spec.style_seeds_CM, dict(spec.style_seeds_CM), lambda _seeds, _feature_map: None)


def whole_task(spec: WholeSpec) -> WholeResult:
    """Gram and gradient pass of a canvas that is one tile, with one forward pass. Raises like gradient_task."""
    terms: dict[str, objective.StyleTerm] = {}
    return WholeResult(terms, _gradient(spec, spec.style_targets, {}, partial(_add_terms, spec, terms)))


def _add_terms(spec: WholeSpec, terms: dict[str, objective.StyleTerm], seeds: Seeds, feature_map: FeatureMap) -> None:
    """Add the style terms of a layer, and their seeds."""
    keys = [key for key in spec.guides.keys(seeds.window.key(feature_map.layer)) if key in spec.style_targets]
    if keys:
        with_mean = spec.style_targets[keys[0]].has_mean
        sums = _gram_sums(spec, seeds.window, feature_map, seeds.maps, with_mean)
        own = {key: spec.style_targets[key].term(sums[key]) for key in keys}
        terms |= own
        seeds.style_CM |= {key: term.seed_CM for key, term in own.items()}


def _gradient(
    spec: SeedSpec,
    style_keys: Iterable[str],
    style_CM: dict[str, Gram],
    on_features: Callable[[Seeds, FeatureMap], None],
) -> GradientResult:
    """Write the gradient of the inner rectangle.

    `style_CM`: the matrices of the style's seeds that are known before the forward pass. `on_features` is called with
    each feature map of that pass, and may add others.
    """
    names = {*map(layer_of, style_keys), *map(layer_of, spec.content_factors)}
    halo = halo_px(names, spec.network.pooling) or ALIGN_PX  # total variation reads the neighbouring pixels
    # twice the halo: seeds at the border of the receptive field need exact features themselves
    windows = spec.windows(2 * halo, 2 * halo)
    # read before the device is reserved, while another tile computes
    scales = [Seeds(spec, window, dict(style_CM), spec.read_content(window)) for window in windows]
    tv_sum = 0.0
    with computing(spec):
        total_CHW = torch.empty(0)
        for seeds in scales:
            network_input_1CHW, window = _network_input(spec, seeds.window), seeds.window
            part_CHW = _scale_gradient(spec, seeds, network_input_1CHW, names, halo, on_features)
            if window.scale > 0:
                _add_blocks(total_CHW, part_CHW, 2**window.scale)
                continue
            total_CHW = part_CHW
            if spec.tv_weight:
                top, left = window.outer.y0, window.outer.x0
                tv_sum, smoothing_CHW = variation(network_input_1CHW, top, left, spec.tile, spec.tv_kind)
                total_CHW = total_CHW + spec.tv_weight * smoothing_CHW
        gradient_CHW = _in_coordinates(spec, total_CHW)
    squares = {key: float(value) for seeds in scales for key, value in seeds.squares.items()}
    pull = math.fsum(float(value) for seeds in scales for value in seeds.style_pulls)
    return replace(_written(spec, gradient_CHW, squares, tv_sum), style_pull=pull)


def _scale_gradient(
    spec: SeedSpec,
    seeds: Seeds,
    network_input_1CHW: Tensor,
    names: set[str],
    halo: int,
    on_features: Callable[[Seeds, FeatureMap], None],
) -> Tensor:
    """The gradient of the inner rectangle at one scale, (3, H, W)."""
    window, tape = seeds.window, list[Step]()
    seeds.maps = window.guide_maps(spec.guides, network_input_1CHW)
    needed = window.tile.inner.grown(halo, window.tile.height, window.tile.width)
    for feature_map in _features(spec, window, network_input_1CHW, names, needed, tape):
        on_features(seeds, feature_map)
    # a tile may lie where neither a style nor the content has any weight
    gradient_1CHW = get_network(spec.network).gradient(tape, seeds.of) if tape else torch.zeros_like(network_input_1CHW)
    rows, columns = window.tile.inner.within(window.outer)
    return gradient_1CHW[0, :, rows, columns]


def _add_blocks(total_CHW: Tensor, part_CHW: Tensor, block_px: int) -> None:
    """Add the gradient of a shrunk image to that of the image: each value, divided by its block's pixels, to them."""
    _, height, width = part_CHW.shape
    filled_CHW = total_CHW[:, : height * block_px, : width * block_px]
    # a view, for any memory layout: H and W divided into blocks
    blocks_CHbWb = filled_CHW.view(len(filled_CHW), height, block_px, width, block_px)
    blocks_CHbWb += part_CHW[:, :, None, :, None] / block_px**2


def _in_coordinates(spec: SeedSpec, gradient_CHW: Tensor) -> Tensor:
    """The gradient in the coordinates in which the canvas moves."""
    if spec.color is not None:
        gradient_CHW = gradient_CHW.sum(0, keepdim=True).expand(3, -1, -1)
    if spec.basis is not None:
        gradient_CHW = _mixed(gradient_CHW[None], tuple(zip(*spec.basis, strict=True)), (0.0, 0.0, 0.0))[0]
    return gradient_CHW


def _written(spec: TileSpec, gradient_CHW: Tensor, squares: dict[str, float], tv_sum: float) -> GradientResult:
    gradient = open_array(spec.stage_dir, "gradient")
    # rounding is monotonic: the largest value stays the largest
    max_abs = gradient.rounded(float(torch.linalg.vector_norm(gradient_CHW, float("inf"))))
    if not np.isfinite(max_abs):
        # refused before the update: one NaN would spread over the whole canvas within a few iterations
        raise ConfigError(
            f"the gradient of tile {spec.tile.index} of {spec.stage_dir.name} is not finite: compute.dtype "
            f"{spec.network.dtype} overflows with these weights and losses. Use {wider(spec.network.dtype)}smaller "
            "weights."
        )
    with profiler.span("write", tile=spec.tile.index, array="gradient"), device_memory(spec):
        sums = device_io.save(gradient, spec.tile.inner, gradient_CHW)
    return GradientResult(squares, max_abs, sums, tv_sum)


def _features(
    spec: TileSpec,
    window: Window,
    network_input_1CHW: Tensor,
    layers: set[str],
    required: Rect,
    tape: list[Step] | None = None,
) -> Iterator[FeatureMap]:
    size = (window.tile.height, window.tile.width)
    return get_network(spec.network).features(network_input_1CHW, window.outer, size, layers, required, tape)


def _inner_features(window: Window, feature_map: FeatureMap) -> Tensor:
    """(C, H, W) of the positions that belong to the tile's inner rectangle."""
    rows, columns = window.tile.inner.positions(feature_map.layer).within(feature_map.region)
    return feature_map.features_1CHW[0, :, rows, columns]


def _network_input(spec: TileSpec, window: Window) -> Tensor:
    """The window's pixels after the colour map."""
    color = spec.color
    if color is None:
        return window.pixels_1CHW
    mapped_1CHW = _mixed(window.pixels_1CHW, color.matrix, color.bias)
    return mapped_1CHW.clamp_(0, 255) if color.clip else mapped_1CHW


def _mixed(x_1CHW: Tensor, matrix: Basis, bias: tuple[float, float, float]) -> Tensor:
    """matrix·x + bias of every pixel x."""
    # not as a convolution: its kernels, and tf32, may round differently from tile size to tile size
    columns_C1C11 = x_1CHW.new_tensor(matrix).T[:, None, :, None, None]
    mixed_1CHW = x_1CHW.new_tensor(bias)[None, :, None, None].expand(x_1CHW.shape)
    for index, column_1C11 in enumerate(columns_C1C11):
        mixed_1CHW = mixed_1CHW + column_1C11 * x_1CHW[:, index : index + 1]
    return mixed_1CHW
