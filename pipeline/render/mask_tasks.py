"""Reading masks for a rectangle of the canvas, and the areas of their regions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline import store
from pipeline.core.tiling import Rect, Tile
from pipeline.core.vgg_layers import LAYER_BY_NAME
from pipeline.losses.masks import GuideMaps
from pipeline.render import device_io
from pipeline.store import Guides


def read_guides(
    stage_dir: Path, guides: Guides, checksums: Mapping[str, str], rect: Rect, scale: int = 0
) -> NDArray[Any]:
    """The guides of a rectangle of the canvas, (H, W, K), shrunk by 2^scale as the canvas is. Raises ChunkError."""
    windows = [store.open_array(stage_dir, name, checksums.get(name)).read_window(rect) for name in guides.arrays]
    pixels_HWK: NDArray[Any] = np.concatenate(windows, axis=-1)
    if scale:
        pixels_1KHW = torch.from_numpy(pixels_HWK).double().permute(2, 0, 1)[None]
        pixels_HWK = device_io.shrunk(pixels_1KHW, scale)[0].permute(1, 2, 0).numpy()
    return pixels_HWK


@dataclass(frozen=True)
class AreaSpec:
    """Sum the regions' shares of the tile's inner rectangle, at every position of `layers` at each scale."""

    stage_dir: Path
    tile: Tile
    guides: Guides
    layers: tuple[str, ...]
    checksums: Mapping[str, str]
    scales: int = 1


def area_task(spec: AreaSpec) -> dict[str, float]:
    """The tile's part of n_r,l, by style key."""
    areas: dict[str, Any] = {}
    for scale in range(spec.scales):
        inner = spec.tile.inner.shrunk(scale)
        pixels_HWK = read_guides(spec.stage_dir, spec.guides, spec.checksums, spec.tile.inner, scale)
        maps = GuideMaps(spec.guides, pixels_HWK, inner, torch.empty(0, dtype=torch.float64))
        for name in spec.layers:
            layer = LAYER_BY_NAME[name]
            if (region := inner.positions(layer)).area:
                keys = spec.guides.keys(store.layer_key(name, scale))
                areas |= zip(keys, maps.shares(layer, region).sum((1, 2)).tolist(), strict=True)
    return areas
