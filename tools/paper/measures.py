"""Measurements of an image: seams, differences between tiles, losses by scale, strength of detail.

Images are (H, W, 3) arrays of 0..255. Axes in names: C channels, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyvips
import torch

from pipeline.core.tiling import Rect, Tile
from pipeline.core.vgg_layers import ALIGN_PX, LAYER_BY_NAME
from pipeline.losses.objective import Gram
from pipeline.network.cache import get_network
from pipeline.network.weights import NetworkSpec
from pipeline.render import tile_specs, tile_tasks
from pipeline.render.stage import Stage
from tools.picture.measures import gram_distance, moments, read

STRIP_PX = 32


@dataclass(frozen=True)
class Seams:
    """Mean |step| across a line of the image relative to that of nearby lines.

    `borders`: on tile borders. `lattice`: on all other multiples of 16 px, where the lattice of the poolings is;
    `spread` is their standard deviation.
    """

    borders: float
    lattice: float
    spread: float

    @property
    def deviations(self) -> float:
        """The number of standard deviations between the tile borders and the lattice."""
        return (self.borders - self.lattice) / self.spread


def seams(image: np.ndarray, tile_px: int) -> Seams:
    borders: list[float] = []
    others: list[float] = []
    for axis in (0, 1):
        steps = np.abs(np.diff(image.astype(np.float64), axis=axis)).mean(axis=(1 - axis, 2))
        for line in range(ALIGN_PX, len(steps) - 8, ALIGN_PX):  # the step between rows line - 1 and line
            around = np.r_[steps[line - 8 : line - 3], steps[line + 2 : line + 7]]
            (others if line % tile_px else borders).append(float(steps[line - 1] / around.mean()))
    return Seams(float(np.mean(borders)), float(np.mean(others)), float(np.std(others)))


@dataclass(frozen=True)
class Drift:
    """Differences between tiles.

    `variance`: of the tiles' mean Grams, Σ‖G_t − Ḡ‖² / (tiles · ‖Ḡ‖²), averaged over layers. `jump`: relative
    difference of the mean Grams of two adjacent 32-px strips whose common edge is a tile border; `elsewhere`: the same
    for an edge in the middle of a tile, which measures how much the image itself changes.
    """

    variance: float
    jump: float
    elsewhere: float


def drift(stage: Stage, canvas: str) -> Drift:
    """Measure a canvas in the tiles of its stage, always read with their halo."""
    height, width = stage.plan.size
    layers = stage.layer_use.style_layers

    def grams(rect: Rect) -> dict[str, Gram]:
        spec = tile_specs.GramSpec(stage.stage_dir, canvas, Tile(0, rect, height, width), stage.network, {}, layers)
        return {
            layer: total / rect.positions(LAYER_BY_NAME[layer]).area
            for layer, total in tile_tasks.gram_task(spec).items()
        }

    full = [tile.inner for tile in stage.tiles if tile.inner.area == stage.tile_px**2]
    tiles = [grams(rect) for rect in full or [tile.inner for tile in stage.tiles]]
    variance = np.mean([_variance([tile[layer] for tile in tiles]) for layer in layers])
    on, off = (
        np.mean([_difference(grams(first), grams(second), layers) for first, second in _strips(stage, shift)])
        for shift in (0, stage.tile_px // 2)
    )
    return Drift(float(variance), float(on), float(off))


def _variance(grams: Sequence[Gram]) -> float:
    mean = np.mean(grams, axis=0)
    return float(np.mean([np.sum((gram - mean) ** 2) for gram in grams]) / np.sum(mean**2))


def _difference(first: dict[str, Gram], second: dict[str, Gram], layers: Sequence[str]) -> float:
    return float(
        np.mean(
            [
                np.linalg.norm(first[layer] - second[layer]) / np.linalg.norm(first[layer] + second[layer]) * 2
                for layer in layers
            ]
        )
    )


def _strips(stage: Stage, shift: int) -> Iterator[tuple[Rect, Rect]]:
    """Pairs of strips on both sides of every tile border, moved by `shift` px: one pair per side of a tile."""
    (height, width), tile_px, strip = stage.plan.size, stage.tile_px, STRIP_PX
    for line in range(shift or tile_px, width - strip, tile_px):
        for start in range(0, height, tile_px):
            end = min(start + tile_px, height)
            yield Rect(start, end, line - strip, line), Rect(start, end, line, line + strip)
    for line in range(shift or tile_px, height - strip, tile_px):
        for start in range(0, width, tile_px):
            end = min(start + tile_px, width)
            yield Rect(line - strip, line, start, end), Rect(line, line + strip, start, end)


def content_losses(network: NetworkSpec, image: Path, content: Path, long_px: int) -> dict[str, float]:
    """‖φ(p) − φ(o)‖²/‖φ(o)‖² of every layer, with both images reduced to this long side."""
    actual, target = (features(network, read(path, long_px)) for path in (image, content))
    return {name: float((actual[name] - target[name]).square().sum() / target[name].square().sum()) for name in target}


def style_losses(network: NetworkSpec, image: Path, style: Path, long_px: int) -> dict[str, float]:
    """‖G(p) − G(s)‖²/‖G(s)‖² of every style layer, with both images reduced to this long side."""
    actual, target = (moments(network, read(path, long_px)) for path in (image, style))
    return {name: gram_distance(actual[name], target[name]) for name in target}


def features(network: NetworkSpec, image: np.ndarray) -> dict[str, torch.Tensor]:
    """(C, H, W) of every layer up to conv5_1."""
    height, width = image.shape[:2]
    whole, names = Rect(0, height, 0, width), set(network.source.widths)
    pixels_1CHW = torch.from_numpy(image).permute(2, 0, 1)[None]
    with torch.no_grad():
        maps = get_network(network).features(pixels_1CHW, whole, (height, width), names, whole)
        return {feature.layer.name: feature.features_1CHW[0] for feature in maps}


def detail(image: np.ndarray, sigma: float = 3.0) -> float:
    """Root mean square, in levels, of the brightness minus its Gaussian blur of `sigma` px."""
    grey = pyvips.Image.new_from_array(np.ascontiguousarray(image.mean(axis=2)))
    fine = grey.numpy() - grey.gaussblur(sigma, precision="float").numpy()
    return float(np.sqrt(np.mean(fine**2)))
